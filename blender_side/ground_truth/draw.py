"""Draws what is in the picture once more, with a shader that writes numbers instead of colours.

One draw fills as many attachments as were asked for, and only those are read, each straight into its array. Everything
with the same mesh is one draw call. The projection is turned upside down, so that the first row is the upper one.

What differs from one thing to the next stands in a texture, eleven texels for each, computed in double precision:

====  ==============================================================================================================
0-3   rows of the matrix from object to clip coordinates
4-6   rows of the matrix from object to camera coordinates
7     number, category, and how far aside counts in distances (1; 0 for cameras without perspective)
8-10  rows of the matrix from object coordinates to pixels (x, y, w) at the other time; zeros: it was not there then
====  ==============================================================================================================
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import inf, nan
from typing import TYPE_CHECKING, Any

import gpu
import numpy as np
from bpy.app.handlers import persistent
from numpy.typing import DTypeLike, NDArray

from .. import compat
from ..lifetime import listen
from . import cube_map
from .geometry import Geometry
from .looks import Look
from .scene import Drawn

if TYPE_CHECKING:
    from ..camera import Camera
    from ..panorama import Panorama

_NUM_TEXELS = 11
_THINGS_PER_ROW = 64  # of that texture, which then has room for a million

_VERTEX_SHADER = """
vec4 texel(int i)
{
  int thing = first + gl_InstanceID;
  return texelFetch(things, ivec2(thing % THINGS_PER_ROW * NUM_TEXELS + i, thing / THINGS_PER_ROW), 0);
}

void main()
{
  vec4 point = vec4(position, 1.0);
  gl_Position = vec4(dot(texel(0), point), dot(texel(1), point), dot(texel(2), point), dot(texel(3), point));
  in_camera = vec3(dot(texel(4), point), dot(texel(5), point), dot(texel(6), point));
  what = texel(7);
#ifdef NORMALS
  /* By the cofactors of the matrix, which are its inverse transpose times its determinant. */
  vec3 x = texel(4).xyz, y = texel(5).xyz, z = texel(6).xyz;
  what.w = dot(x, cross(y, z)) < 0.0 ? -1.0 : 1.0;
  shaded = vec3(dot(cross(y, z), normal), dot(cross(z, x), normal), dot(cross(x, y), normal)) * what.w;
  shaded /= max(length(shaded), 1e-30);  /* interpolated after that, as in Blender's shaders */
#endif
#ifdef FLOW
#  ifdef DEFORMED
  point = vec4(other_position, 1.0);
#  endif
  other = vec3(dot(texel(8), point), dot(texel(9), point), dot(texel(10), point));
#endif
}
"""

_FRAGMENT_SHADER = """
vec4 bytes(float number)
{
  return vec4(mod(number, 256.0), mod(floor(number / 256.0), 256.0), floor(number / 65536.0), 0.0) / 255.0;
}

vec4 plane()
{
  /* Of the triangle, in camera coordinates: a normal, and its distance from the camera along that. */
  vec3 across = normalize(cross(dFdx(in_camera), dFdy(in_camera)));
  return vec4(across, dot(across, in_camera));
}

#ifdef NORMALS
vec3 facing_the_viewer()
{
  /* Mirroring turns front and back around: that of the object, and that of the picture. */
  bool front = gl_FrontFacing != (what.w > 0.0);
  return front ? normalize(shaded) : -normalize(shaded);
}
#endif

#ifdef FLOW
vec2 way()
{
  return other.z > 0.0 ? other.xy / other.z - gl_FragCoord.xy : vec2(uintBitsToFloat(0x7fc00000u));
}
#endif

void main()
{
  /* Not by the depth between the clip planes, of which a near one leaves little for what is far away. */
  gl_FragDepth = what.z > 0.0 ? 1e-20 / gl_FragCoord.w : gl_FragCoord.z;
"""


_GLSL_NUMBERS = {"0.0": "0.0", "inf": "uintBitsToFloat(0x7f800000u)", "nan": "uintBitsToFloat(0x7fc00000u)"}


@dataclass(frozen=True)
class Attachment:
    """What one pass is drawn into.

    Attributes:
        texture: its format.
        glsl: type of what the shader writes.
        expression: what the shader writes.
        dtype: elements of the array that it is read into. Integers are the bytes of a colour, little end first.
        components: of a pixel in that array; () for one.
        background: where nothing is drawn, and where a hole is.
        shows_holes: what a hole shows instead is its own surface.
    """

    texture: str
    glsl: str
    expression: str
    dtype: DTypeLike
    components: tuple[int, ...] = ()
    background: float = 0.0
    shows_holes: bool = False


ATTACHMENTS = {
    "depth": Attachment("R32F", "FLOAT", "-in_camera.z", np.float32, background=inf),
    "distance": Attachment("R32F", "FLOAT", "length(in_camera * vec3(what.zz, 1.0))", np.float32, background=inf),
    "plane": Attachment("RGBA32F", "VEC4", "plane()", np.float32, (4,)),
    "normals": Attachment("RGBA32F", "VEC4", "vec4(facing_the_viewer(), 0.0)", np.float32, (3,)),
    "nearest": Attachment("R32F", "FLOAT", "-in_camera.z", np.float32, background=inf, shows_holes=True),
    "flow": Attachment("RG32F", "VEC2", "way()", np.float32, (2,), background=nan),
}


def _number(expression: str, nbytes: int) -> Attachment:
    texture, glsl, components = {1: ("R8", "FLOAT", "x"), 2: ("RG8", "VEC2", "xy"), 4: ("RGBA8", "VEC4", "xyzw")}[
        nbytes
    ]
    return Attachment(texture, glsl, f"bytes({expression}).{components}", np.dtype(f"u{nbytes}"))


ATTACHMENTS |= {f"instance in {nbytes} bytes": _number("what.x", nbytes) for nbytes in (1, 2, 4)}
ATTACHMENTS |= {f"category in {nbytes} bytes": _number("what.y", nbytes) for nbytes in (1, 2, 4)}


@dataclass(frozen=True, eq=False)
class View:
    """What a camera saw at one time.

    Attributes:
        view: (4, 4) float64, world to camera coordinates.
        projection: (4, 4) float64, camera to clip coordinates.
        shape: image height and width in pixels.
        clip_range: of the camera.
        panorama: where in the image things are; None: `projection` says it. Otherwise that is of a side of a cube map.
    """

    view: NDArray[np.float64]
    projection: NDArray[np.float64]
    shape: tuple[int, int]
    clip_range: tuple[float, float]
    panorama: Panorama | None = None

    @classmethod
    def of(cls, camera: Camera) -> View:
        panorama, clip_range = camera.panorama, camera.clip_range
        projection = cube_map.side_projection(clip_range) if panorama else np.array(camera.proj_matrix, np.float64)
        return cls(camera.extrinsics("blender"), projection, camera.shape, clip_range, panorama)

    def of_side(self, to_side: NDArray[np.float64], size: int) -> View:
        """That of a side of a cube map: `to_side` (4, 4) turns camera coordinates, and it has `size` pixels each way."""
        return replace(self, view=to_side @ self.view, shape=(size, size), panorama=None)

    @property
    def has_perspective(self) -> bool:
        return bool(self.projection[3, 3] == 0)

    def to_pixels(self) -> NDArray[np.float64]:
        """(3, 4) matrix from camera coordinates to homogeneous pixel coordinates from the upper left."""
        height, width = self.shape
        x, y, _, w = self.projection
        return np.stack([(w + x) * width / 2, (w - y) * height / 2, w])


class Rasterizer:
    """Draws passes into a frame buffer of its own, the same one for as long as passes and size are."""

    def __init__(self) -> None:
        self._kind: tuple[tuple[str, ...], tuple[int, int]] | None = None
        self._framebuffer: Any = None
        self._textures: list[Any] = []
        self._depth: Any = None

    def draw(
        self,
        arrays: Mapping[str, NDArray[Any]],
        things: Sequence[Drawn],
        view: View,
        others: Sequence[Drawn | None],
        other_view: View | None = None,
    ) -> None:
        """Fill arrays.

        Args:
            arrays: by names in ATTACHMENTS, what to fill; C-contiguous, (H, W, *components) of the dtypes given there.
            things: what to draw.
            view: as seen from where.
            others: the same things at another time, or None, for "flow".
            other_view: the camera at that time.
        """
        if view.panorama is not None:
            backgrounds = {name: ATTACHMENTS[name].background for name in arrays}
            cube_map.draw(self, arrays, things, view, view.panorama, backgrounds)
            return
        _forget_buffers_after_render()
        names, (height, width) = tuple(arrays), view.shape
        if self._kind != (names, view.shape):
            self._allocate(names, height, width)
        for name, texture in zip(names, self._textures, strict=True):
            texture.clear(format="FLOAT", value=(ATTACHMENTS[name].background,) * 4)
        with self._framebuffer.bind():
            self._framebuffer.clear(depth=1.0)
            _draw(self._framebuffer, names, things, view, others, other_view)
            for slot, array in enumerate(arrays.values()):
                kind = "FLOAT" if array.dtype == np.float32 else "UBYTE"
                pixels = array if kind == "FLOAT" else array.view(np.uint8)
                channels = pixels.size // (height * width)
                target = gpu.types.Buffer(kind, (height, width, channels), pixels.reshape(height, width, channels))
                self._framebuffer.read_color(0, 0, width, height, channels, slot, kind, data=target)

    def _allocate(self, names: tuple[str, ...], height: int, width: int) -> None:
        compat.require_size(height, width)
        size = (width, height)
        self._textures = [gpu.types.GPUTexture(size, format=ATTACHMENTS[name].texture) for name in names]
        self._depth = gpu.types.GPUTexture(size, format="DEPTH_COMPONENT32F")  # the frame buffer does not keep it alive
        self._framebuffer = gpu.types.GPUFrameBuffer(depth_slot=self._depth, color_slots=self._textures)
        self._kind = (names, (height, width))


def _draw(
    framebuffer: Any,
    names: tuple[str, ...],
    things: Sequence[Drawn],
    view: View,
    others: Sequence[Drawn | None],
    other_view: View | None,
) -> None:
    """Draw into a frame buffer, which is bound. What cube maps ask for ("plane") begins at a distance from the camera."""
    groups: dict[tuple[Geometry, Geometry | None, Look], list[tuple[Drawn, Drawn | None]]] = {}
    for thing, other in zip(things, others, strict=True):
        deformed = None
        if other is None or other_view is None:
            other = None
        elif other.geometry is not thing.geometry:
            if thing.geometry.corresponds_to(other.geometry):
                deformed = other.geometry
            else:
                other = None
        groups.setdefault((thing.geometry, deformed, thing.look), []).append((thing, other))
    if not groups:
        return
    in_order = sorted(groups.items(), key=lambda group: group[0][2] is Look.IN_FRONT)  # after all others
    texture = _texture([pair for _, group in in_order for pair in group], view, other_view)
    first = 0
    is_in_front = False
    with _nearest_wins():
        for (geometry, deformed, look), group in in_order:
            if look is Look.IN_FRONT and not is_in_front:
                framebuffer.clear(depth=1.0)
                is_in_front = True
            shader = _shader(names, deformed is not None, look is Look.AS_A_HOLE)
            shader.bind()
            shader.uniform_sampler("things", texture)
            if "plane" in names:
                shader.uniform_float("nearest_distance", view.clip_range[0])
            compat.draw_instances(_batch(geometry, deformed), shader, first, len(group))
            first += len(group)


@contextmanager
def _nearest_wins() -> Iterator[None]:
    """Draw both sides of faces, the nearest above all others. Which sides are drawn Python cannot ask: Blender draws both."""
    depth_test, depth_mask, blend = gpu.state.depth_test_get(), gpu.state.depth_mask_get(), gpu.state.blend_get()
    try:
        gpu.state.depth_test_set("LESS_EQUAL")
        gpu.state.depth_mask_set(True)
        gpu.state.blend_set("NONE")
        gpu.state.face_culling_set("NONE")
        yield
    finally:
        gpu.state.depth_test_set(depth_test)
        gpu.state.depth_mask_set(depth_mask)
        gpu.state.blend_set(blend)


def _texture(pairs: Sequence[tuple[Drawn, Drawn | None]], view: View, other_view: View | None) -> Any:
    """What the shader has to know about each thing; the table stands at the top of this module."""
    num_rows = -(-len(pairs) // _THINGS_PER_ROW)
    texels = np.zeros((num_rows * _THINGS_PER_ROW, _NUM_TEXELS, 4), np.float32)
    ours = texels[: len(pairs)]
    to_camera = view.view @ np.array([thing.matrix_world for thing, _ in pairs])
    upside_down = np.diag([1.0, -1.0, 1.0, 1.0])
    ours[:, 0:4] = upside_down @ view.projection @ to_camera
    ours[:, 4:7] = to_camera[:, :3]
    ours[:, 7, :2] = [(thing.id, thing.category) for thing, _ in pairs]
    ours[:, 7, 2] = view.has_perspective
    known = [i for i, (_, other) in enumerate(pairs) if other is not None]
    if known and other_view is not None:
        to_pixels = other_view.to_pixels() @ other_view.view
        ours[known, 8:11] = to_pixels @ np.array([other.matrix_world for _, other in pairs if other is not None])
    size = (_THINGS_PER_ROW * _NUM_TEXELS, num_rows)
    return gpu.types.GPUTexture(size, format="RGBA32F", data=gpu.types.Buffer("FLOAT", texels.size, texels.reshape(-1)))


@cache
def _shader(names: tuple[str, ...], deformed: bool, is_hole: bool) -> Any:
    info = gpu.types.GPUShaderCreateInfo()
    info.define("NUM_TEXELS", str(_NUM_TEXELS))
    info.define("THINGS_PER_ROW", str(_THINGS_PER_ROW))
    info.push_constant("INT", "first")
    info.sampler(0, "FLOAT_2D", "things")
    info.vertex_in(0, "VEC3", "position")
    varying = gpu.types.GPUStageInterfaceInfo("ground_truth_varying")
    varying.smooth("VEC3", "in_camera")
    varying.flat("VEC4", "what")
    if "normals" in names:
        info.define("NORMALS")
        info.vertex_in(1, "VEC3", "normal")
        varying.smooth("VEC3", "shaded")
    if "flow" in names:
        info.define("FLOW")
        varying.smooth("VEC3", "other")
        if deformed:
            info.define("DEFORMED")
            info.vertex_in(2, "VEC3", "other_position")
    info.vertex_out(varying)
    compat.let_write_depth(info)
    writes = []
    for slot, name in enumerate(names):
        info.fragment_out(slot, ATTACHMENTS[name].glsl, f"pass_{slot}")
        attachment = ATTACHMENTS[name]
        value = attachment.expression
        if is_hole and not attachment.shows_holes:
            value = f"{attachment.glsl.lower()}({_GLSL_NUMBERS[str(attachment.background)]})"
        writes.append(f"  pass_{slot} = {value};\n")
    if "plane" in names:  # at the end, or there would be no derivatives
        info.push_constant("FLOAT", "nearest_distance")
        writes.append("  if (length(in_camera) < nearest_distance) discard;\n")
    info.vertex_source(_VERTEX_SHADER)
    info.fragment_source(_FRAGMENT_SHADER + "".join(writes) + "}\n")
    return gpu.shader.create_from_info(info)


@dataclass(frozen=True, eq=False)
class _Buffers:
    """A geometry on the GPU."""

    positions: Any
    normals: Any
    triangles: Any
    batch: Any


_buffers: weakref.WeakKeyDictionary[Geometry, _Buffers] = weakref.WeakKeyDictionary()
_deformed: weakref.WeakKeyDictionary[Geometry, tuple[weakref.ref[Geometry], Any]] = weakref.WeakKeyDictionary()
"""For each geometry, the one it was last drawn as a deformation of, and the batch that has both."""


_was_rendered = False


@persistent  # type: ignore[untyped-decorator]
def _note_render(*_: Any) -> None:
    global _was_rendered  # buffers are freed later: here another context may be active
    _was_rendered = True


def _forget_buffers_after_render() -> None:
    """Upload everything anew if a final render may have spoilt it."""
    global _was_rendered
    if compat.renders_spare_gpu_buffers():
        return
    if not listen(_note_render, "render_post"):
        _was_rendered = True
    if _was_rendered:
        _buffers.clear()
        _deformed.clear()
        _was_rendered = False


def _batch(geometry: Geometry, other: Geometry | None) -> Any:
    """What draws a geometry, with the vertices of a second one as `other_position`."""
    buffers = _buffers.get(geometry)
    if buffers is None:
        positions = _vertex_buffer("position", geometry.vertices[geometry.corners])
        normals = None if geometry.normals is None else _vertex_buffer("normal", geometry.normals)
        triangles = gpu.types.GPUIndexBuf(type="TRIS", seq=geometry.triangles)
        batch = _make_batch(triangles, positions, normals)
        buffers = _buffers[geometry] = _Buffers(positions, normals, triangles, batch)
    if other is None:
        return buffers.batch
    known = _deformed.get(geometry)
    if known is None or known[0]() is not other:
        others = _vertex_buffer("other_position", other.vertices[other.corners])
        known = weakref.ref(other), _make_batch(buffers.triangles, buffers.positions, buffers.normals, others)
        _deformed[geometry] = known
    return known[1]


def _make_batch(triangles: Any, first: Any, *more: Any) -> Any:
    batch = gpu.types.GPUBatch(type="TRIS", buf=first, elem=triangles)
    for buffer in more:
        if buffer is not None:
            batch.vertbuf_add(buffer)
    return batch


def _vertex_buffer(name: str, vectors: NDArray[np.float32]) -> Any:
    layout = gpu.types.GPUVertFormat()
    layout.attr_add(id=name, comp_type="F32", len=3, fetch_mode="FLOAT")
    buffer = gpu.types.GPUVertBuf(len=len(vectors), format=layout)
    buffer.attr_fill(name, vectors)
    return buffer
