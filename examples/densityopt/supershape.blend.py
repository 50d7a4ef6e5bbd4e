"""Inside Blender: render the supershapes that the trainer asks for.

The trainer sends `shape_params`, (n, 8), and `shape_ids`, (n,), through the channel CTRL. For each of the n shapes, DATA
publishes `image` and its `shape_id`, in the order of the request.
"""

import bpy
import numpy as np
from numpy.typing import NDArray

import blendtorch.btb as btb

SHAPE = (64, 64)
"""Height and width of the pictures."""
ROWS, COLUMNS = 33, 64
"""Vertices from pole to pole, and around."""


def superformula(angle: NDArray[np.float64], m: float, n1: float, n2: float, n3: float) -> NDArray[np.float64]:
    """The radius of a closed curve with m lobes at each angle (radians).

    J. Gielis, A generic geometric transformation that unifies a wide range of natural and abstract shapes, American Journal
    of Botany 90(3), 2003; here with a = b = 1.
    """
    quarter = m * angle / 4
    return (np.abs(np.cos(quarter)) ** n2 + np.abs(np.sin(quarter)) ** n3) ** (-1 / n1)


def supershape(params: NDArray[np.float64]) -> NDArray[np.float64]:
    """(ROWS, COLUMNS, 3): points on the product of two curves.

    `params`, (8,), holds m, n1, n2 and n3 of the curve around the vertical axis, then those of the curve from pole to pole.
    """
    around = np.linspace(-np.pi, np.pi, COLUMNS, endpoint=False)
    upwards = np.linspace(-np.pi / 2, np.pi / 2, ROWS)[:, None]
    r, s = superformula(around, *params[:4]), superformula(upwards, *params[4:])
    x = r * np.cos(around) * s * np.cos(upwards)
    y = r * np.sin(around) * s * np.cos(upwards)
    z = np.broadcast_to(s * np.sin(upwards), x.shape)
    return np.stack([x, y, z], axis=-1)


def make_mesh() -> bpy.types.Mesh:
    """An object whose mesh is a grid around a sphere; its vertices are in the order of `supershape`."""
    here = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    right = np.roll(here, -1, axis=1)
    faces = np.stack([here[:-1], right[:-1], right[1:], here[1:]], axis=-1).reshape(-1, 4)
    mesh = bpy.data.meshes.new("Supershape")
    mesh.from_pydata(np.zeros((here.size, 3)).tolist(), [], faces.tolist())
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("Supershape", mesh))
    return mesh


def main() -> None:
    args, _ = btb.parse_blendtorch_args()
    bpy.data.objects.remove(bpy.data.objects["Cube"])
    mesh = make_mesh()

    camera = btb.Camera(shape=SHAPE)
    camera.look_at(look_at=(0, 0, 0), look_from=(4.8, -2.6, 4.8))
    renderer = btb.OffScreenRenderer(camera, mode="rgb", color_space="srgb")
    renderer.set_render_style(shading="SOLID", overlays=False)
    publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
    channel = btb.DuplexChannel(args.btsockets["CTRL"], args.btid)

    renderer.render()  # the first picture takes seconds; the trainer, too, has things to load now
    while True:
        request = channel.recv()  # waits for one; the launcher ends this
        for params, shape_id in zip(request["shape_params"], request["shape_ids"], strict=True):
            mesh.vertices.foreach_set("co", supershape(params).ravel())
            mesh.update()
            publisher.publish(image=renderer.render(), shape_id=int(shape_id))


main()
