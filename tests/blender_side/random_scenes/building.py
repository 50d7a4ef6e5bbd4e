"""Makes the scene that a description says, inside Blender. Knows nothing of the product."""

from __future__ import annotations

import math
from typing import Any

import bmesh
import bpy
from mathutils import Euler, Matrix, Quaternion, Vector

from .pixels import HEIGHT, PALETTE, WIDTH


def build(description: dict[str, Any]) -> dict[str, int]:
    """Replace what is open by the scene, at its first frame.

    Returns:
        the number of each object, by name: its pass index, and its place in the palette.
    """
    bpy.ops.wm.read_factory_settings(use_empty=True)
    return Builder(description).numbers


def go_on(description: dict[str, Any]) -> None:
    """Move on to the last frame, as a script does, and touch what it touches."""
    scene = bpy.context.scene
    set_field(EPISODES[-1])
    for frame in description["frames"][1:]:
        for step in range(2, frame) if scene.rigidbody_world else ():
            scene.frame_set(step)
        scene.frame_set(frame)
    touch(description)


EPISODES = (0.0, -150.0, 150.0)
"""The strength of the force field in each."""


def set_field(strength: float) -> None:
    field = bpy.data.objects.get("field")
    if field:
        field.field.strength = strength


def touch(description: dict[str, Any]) -> None:
    scene = bpy.context.scene
    for i, made in enumerate(description["objects"]):
        if _is_touched(made):
            obj = bpy.data.objects[f"object {i}"]
            obj.location.x += 0.53
            obj.rotation_euler.z += 0.3
    camera = description["camera"]
    if _is_touched(camera):
        scene.camera.location.x += 0.4137
        if not camera.get("keeps_lens"):
            scene.camera.data.lens *= 1.13
            scene.camera.data.ortho_scale *= 1.07


def _is_touched(made: dict[str, Any]) -> bool:
    return (
        bool(made["touched"])
        and made["motion"] in ("still", "shape key")
        and made["parent"] is None
        and made["constraint"] is None
    )


class Builder:
    def __init__(self, description: dict[str, Any]) -> None:
        self.scene = bpy.context.scene
        self.scene.name = "Described"
        self.numbers: dict[str, int] = {}
        self._objects: list[Any] = []
        self._shows_originals = description.get("shows_originals", False)
        self._falling: list[Any] = []
        self._hidden: list[tuple[Any, Any, str]] = []
        if description["second_scene"]:
            another = bpy.data.scenes.new("Another")
            self._link(bpy.data.objects.new("Another cube", _mesh("cube", 3)), another.collection)
        for i, made in enumerate(description["objects"]):
            self._objects.append(self._object(i, made))
        for obj, made in zip(self._objects, description["objects"], strict=True):
            self._relations(obj, made)
        self._camera(description["camera"])
        self._settings(description)
        self._physics(description["episodes"])
        self._layers(description["layers"])
        self._hide()
        self._viewport()
        self.scene.frame_set(description["frames"][0])

    # ------------------------------------------------------------------------------------------------- objects

    def _object(self, i: int, made: dict[str, Any]) -> Any:
        kind = made["kind"]
        name = f"object {i}"  # so that another scene has things of the same name
        if kind == "empty":
            data = None
        elif kind == "armature":
            data = bpy.data.armatures.new(name)
        elif kind == "collection instance":
            data = None
        elif kind in _DATA:
            data = _DATA[kind](name)
        else:
            data = _mesh(
                {"vertices": "plane", "faces": "plane", "nodes": "plane", "particles": "plane"}.get(kind, kind), 1
            )
        obj = bpy.data.objects.new(name, data)
        collection = bpy.data.collections.new(name)
        self.scene.collection.children.link(collection)
        self._link(obj, collection)
        self._number(obj)
        obj.location, obj.rotation_euler, obj.scale = made["location"], made["rotation"], made["scale"]
        obj.location += Vector((0.013, 0.017, 0.011)) * i  # no two faces lie in one plane
        if kind in _INSTANCING:
            self._instance(obj, kind, i, collection)
        for modifier in made["modifiers"]:
            _add_modifier(obj, modifier)
        if obj.type == "MESH" and made["modifiers"]:
            for face in obj.data.polygons:  # of a flat face that is not plane Cycles shades each triangle
                face.use_smooth = True
        _animate(obj, made["motion"])
        if made["motion"] == "falls" and obj.type == "MESH":
            self._falling.append(obj)
        self._show(obj, made["visibility"], collection)
        self._hidden.append((obj, collection, made["hidden"]))
        return obj

    def _instance(self, obj: Any, kind: str, i: int, collection: Any) -> None:
        part = bpy.data.objects.new(f"part of {i}", _mesh("cube", 0.35))
        self._number(part)
        if kind == "collection instance":
            parts = bpy.data.collections.new(f"parts of {i}")
            other = bpy.data.objects.new(f"other part of {i}", _mesh("cone", 0.4))
            self._number(other)
            self._link(part, parts)
            self._link(other, parts)
            part.location, other.location = (-0.6, 0, 0), (0.6, 0.3, 0)
            obj.instance_type, obj.instance_collection = "COLLECTION", parts
            return
        self._link(part, collection)
        if kind in ("vertices", "faces"):
            part.parent = obj
            if self._shows_originals:
                original = bpy.data.objects.new(f"original of {part.name}", part.data)
                self._link(original, collection)
                original.pass_index = part.pass_index
                constraint = original.constraints.new("COPY_TRANSFORMS")
                constraint.target = obj
            obj.instance_type = {"vertices": "VERTS", "faces": "FACES"}[kind]
            return
        part.location.x = 200
        if kind == "nodes":
            obj.modifiers.new("nodes", "NODES").node_group = _instancing_nodes(part)
            return
        obj.modifiers.new("particles", "PARTICLE_SYSTEM")
        settings = obj.particle_systems[0].settings
        settings.count, settings.frame_start, settings.frame_end, settings.lifetime = 5, 1, 1, 1000
        settings.physics_type, settings.render_type, settings.instance_object = "NO", "OBJECT", part
        settings.particle_size = 0.5

    def _relations(self, obj: Any, made: dict[str, Any]) -> None:
        if made["parent"] is not None:
            obj.parent = self._objects[made["parent"]]
        if made["constraint"] is not None:
            target = self._objects[made["constraint"]]
            if obj.type == "CAMERA":
                constraint = obj.constraints.new("TRACK_TO")
                constraint.target, constraint.track_axis, constraint.up_axis = target, "TRACK_NEGATIVE_Z", "UP_Y"
            else:
                constraint = obj.constraints.new("COPY_LOCATION")
                constraint.target, constraint.influence = target, 0.4

    def _number(self, obj: Any) -> None:
        number = self.numbers[obj.name] = len(self.numbers) + 1
        obj.pass_index = number
        color = PALETTE[(number - 1) % len(PALETTE)]
        if hasattr(obj.data, "materials"):
            obj.data.materials.append(
                _material(obj.name, color, is_grease_pencil=obj.type in ("GREASEPENCIL", "GPENCIL"))
            )

    @staticmethod
    def _link(obj: Any, collection: Any) -> None:
        collection.objects.link(obj)

    def _physics(self, episodes: int) -> None:
        if not self._falling:
            return
        bpy.ops.rigidbody.world_add()
        world = self.scene.rigidbody_world
        world.collection = bpy.data.collections.new("falling")
        for obj in self._falling:
            world.collection.objects.link(obj)
            obj.rigid_body.type = "ACTIVE"
        if episodes > 1:
            field = bpy.data.objects.new("field", None)
            field.location = (0.3, 0.2, -3)
            self._link(field, self.scene.collection)
            with bpy.context.temp_override(object=field, active_object=field):
                bpy.ops.object.forcefield_toggle()
            field.field.type = "NONE"  # and back: the operator does not tell Blender that bodies depend on it now
            field.field.type = "FORCE"
            field.field.strength = EPISODES[-1]

    # ------------------------------------------------------------------------------------------------- visibility

    def _show(self, obj: Any, how: str, collection: Any) -> None:
        if how == "holdout":
            obj.is_holdout = True
        elif how == "not by the camera":
            obj.visible_camera = False
        elif how == "shadow catcher":
            obj.is_shadow_catcher = True
        elif how in ("wire", "bounds"):
            obj.display_type = how.upper()
        elif how == "in front":
            obj.show_in_front = True
        elif how in ("collection holdout", "indirect only"):
            layer = self.scene.view_layers[0].layer_collection.children[collection.name]
            if how == "indirect only":
                layer.indirect_only = True
            else:
                layer.holdout = True

    def _hide(self) -> None:
        for obj, collection, how in self._hidden:
            if how in ("hide_viewport", "hide_render"):
                setattr(obj, how, True)
            elif how.startswith("collection hide"):
                setattr(collection, how.split()[1], True)
            for layer in self.scene.view_layers:
                child = layer.layer_collection.children[collection.name]
                if how == "collection excluded":
                    child.exclude = True
                elif how == "layer collection hidden":
                    child.hide_viewport = True
                elif how == "hide_set" and obj.name in layer.objects:
                    obj.hide_set(True, view_layer=layer)

    def _layers(self, how: str) -> None:
        """Two view layers: the first lacks the last object, the second the first one."""
        if not how:
            return
        first = self.scene.view_layers[0]
        second = self.scene.view_layers.new("Second")
        for layer, obj in ((first, self._objects[-1]), (second, self._objects[0])):
            layer.layer_collection.children[obj.name].exclude = True
        window, other = (first, second) if how.startswith("first") else (second, first)
        bpy.context.window.view_layer = window
        if how.endswith("rendered"):
            other.use = False

    # ------------------------------------------------------------------------------------------------- camera, scene

    def _camera(self, made: dict[str, Any]) -> None:
        data = bpy.data.cameras.new("Camera")
        camera = bpy.data.objects.new("Camera", data)
        collection = bpy.data.collections.new("Camera")
        self.scene.collection.children.link(collection)
        self._link(camera, collection)
        self.scene.camera = camera
        if made["type"] in ("PERSP", "ORTHO"):
            data.type = made["type"]
        else:
            data.type = "PANO"
            (data if hasattr(data, "panorama_type") else data.cycles).panorama_type = made["type"]
        data.lens, data.ortho_scale = made["lens"], made["ortho_scale"]
        data.sensor_fit, (data.sensor_width, data.sensor_height) = made["sensor_fit"], made["sensor"]
        data.shift_x, data.shift_y = made["shift"]
        data.clip_start, data.clip_end = made["clip"]
        way = Vector(made["at"]) - Vector(made["location"])
        turned = way.to_track_quat("-Z", "Y") @ Quaternion((0, 0, 1), made["roll"])
        camera.location, camera.rotation_euler = made["location"], turned.to_euler()
        _animate(camera, made["motion"])
        self._relations(camera, made)
        if made["parent"] is not None:  # stay about where it is
            parent = self._objects[made["parent"]]
            stands = Matrix.LocRotScale(parent.location, Euler(parent.rotation_euler), parent.scale)
            camera.matrix_parent_inverse = stands.inverted()
        self._hidden.append((camera, collection, made["hidden"]))

    def _settings(self, description: dict[str, Any]) -> None:
        scene, render = self.scene, self.scene.render
        engine = description["renderer"].split()[0]
        if engine == "CYCLES":
            render.engine = "CYCLES"
        elif engine == "EEVEE":
            render.engine = "BLENDER_EEVEE_NEXT" if (4, 2, 0) <= bpy.app.version < (5, 0, 0) else "BLENDER_EEVEE"
        else:
            render.engine = "BLENDER_WORKBENCH"
        scene.cycles.samples, scene.cycles.use_denoising = 1, False
        scene.cycles.pixel_filter_type, scene.cycles.filter_width = "BLACKMAN_HARRIS", 0.01
        scene.eevee.taa_samples = scene.eevee.taa_render_samples = 1
        render.filter_size = 0.01
        scene.display.render_aa = "OFF"
        scene.display.shading.light, scene.display.shading.color_type = "FLAT", "MATERIAL"
        scene.display.shading.show_object_outline = scene.display.shading.show_specular_highlight = False
        scene.world = _black_world()
        factor = 100 // description["percentage"]
        render.resolution_x, render.resolution_y, render.resolution_percentage = (
            WIDTH * factor,
            HEIGHT * factor,
            description["percentage"],
        )
        render.pixel_aspect_x, render.pixel_aspect_y = description["aspect"]
        render.film_transparent = description["transparent"]
        render.dither_intensity = 0
        scene.view_settings.view_transform, scene.view_settings.exposure = (
            description["view_transform"],
            description["exposure"],
        )
        scene.unit_settings.scale_length = description["unit_scale"]
        render.use_motion_blur = description["motion_blur"]
        render.use_border = description["border"]
        render.border_min_x, render.border_max_x, render.border_min_y, render.border_max_y = 0.25, 0.7, 0.2, 0.6
        if description["simplify"]:
            render.use_simplify = True
            render.simplify_subdivision, render.simplify_subdivision_render = description["simplify"]

    def _viewport(self) -> None:
        for screen in bpy.data.screens:
            for area in screen.areas:
                if area.type == "VIEW_3D":
                    shading = area.spaces[0].shading
                    shading.light, shading.color_type = "FLAT", "MATERIAL"
                    shading.show_object_outline = shading.show_specular_highlight = False
                    shading.background_type, shading.background_color = "VIEWPORT", (0, 0, 0)


# ---------------------------------------------------------------------------------------------------------- pieces


def _mesh(kind: str, size: float) -> Any:
    shape = bmesh.new()
    if kind == "cube":
        bmesh.ops.create_cube(shape, size=1.5 * size)
    elif kind == "sphere":
        bmesh.ops.create_uvsphere(shape, u_segments=16, v_segments=8, radius=size)
    elif kind == "plane":
        bmesh.ops.create_grid(shape, x_segments=1, y_segments=1, size=size)
    else:
        bmesh.ops.create_cone(shape, cap_ends=True, segments=7, radius1=size, radius2=0, depth=1.5 * size)
    if kind == "sphere":
        for face in shape.faces:
            face.smooth = True
    mesh = bpy.data.meshes.new(kind)
    shape.to_mesh(mesh)
    shape.free()
    return mesh


def _curve(name: str) -> Any:
    curve = bpy.data.curves.new(name, "CURVE")
    curve.dimensions, curve.bevel_depth = "3D", 0.25
    spline = curve.splines.new("POLY")
    spline.points.add(3)
    for point, co in zip(spline.points, ((-1, -1, 0), (1, -0.6, 0.4), (0.9, 1, 0), (-0.7, 0.9, 0.3)), strict=True):
        point.co = (*co, 1)
    return curve


def _text(name: str) -> Any:
    text = bpy.data.curves.new(name, "FONT")
    text.body, text.size, text.extrude = "HE", 1.6, 0.2
    return text


def _metaball(name: str) -> Any:
    ball = bpy.data.metaballs.new(name)
    ball.resolution = ball.render_resolution = 0.4
    for x in (-0.5, 0.6):
        ball.elements.new().co = (x, 0, 0)
    return ball


def _surface(name: str) -> Any:
    surface = bpy.data.curves.new(name, "SURFACE")
    surface.dimensions = "3D"
    for row in range(4):
        spline = surface.splines.new("NURBS")
        spline.points.add(3)
        for column, point in enumerate(spline.points):
            point.co = (column * 0.7 - 1, row * 0.7 - 1, 0.5 * math.sin(row + column), 1)
            point.select = True
    holder = bpy.data.objects.new("holder", surface)
    bpy.context.scene.collection.objects.link(holder)
    bpy.context.view_layer.objects.active = holder
    holder.select_set(True)
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.curve.make_segment()
    bpy.ops.object.mode_set(mode="OBJECT")
    bpy.data.objects.remove(holder)
    return surface


def _points(name: str) -> Any:
    cloud = bpy.data.pointclouds.new(name)
    cloud.resize(5)
    for i, point in enumerate(cloud.points):
        point.co = (math.cos(i * 1.3), math.sin(i * 1.3), 0.1 * i)
        point.radius = 0.3
    return cloud


def _hair(name: str) -> Any:
    hair = bpy.data.hair_curves.new(name)
    hair.add_curves([3] * 4)
    for i, point in enumerate(hair.points):
        point.position = (0.5 * (i // 3) - 0.8, 0.7 * (i % 3) - 0.7, 0.2 * (i % 3))
        point.radius = 0.15
    return hair


def _grease_pencil(name: str) -> Any:
    pencil = bpy.data.grease_pencils.new(name)
    drawing = pencil.layers.new("Layer").frames.new(1).drawing
    drawing.add_strokes([4])
    for point, co in zip(drawing.strokes[0].points, ((-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)), strict=True):
        point.position, point.radius = co, 0.2
    return pencil


_DATA = {
    "curve": _curve, "text": _text, "metaball": _metaball, "surface": _surface, "points": _points, "hair": _hair,
    "grease pencil": _grease_pencil,
}  # fmt: skip
_INSTANCING = ("collection instance", "vertices", "faces", "nodes", "particles")


def _material(name: str, color: tuple[float, ...], *, is_grease_pencil: bool) -> Any:
    material = bpy.data.materials.new(name)
    if is_grease_pencil:
        bpy.data.materials.create_gpencil_data(material)
        material.grease_pencil.color = (*color, 1)
        return material
    material.diffuse_color = (*color, 1)
    if not material.node_tree:
        material.use_nodes = True
    nodes = material.node_tree.nodes
    emission = nodes.new("ShaderNodeEmission")
    emission.inputs["Color"].default_value = (*color, 1)
    output = next(node for node in nodes if node.type == "OUTPUT_MATERIAL")
    material.node_tree.links.new(emission.outputs[0], output.inputs["Surface"])
    return material


def _black_world() -> Any:
    world = bpy.data.worlds.new("World")
    world.color = (0, 0, 0)
    if not world.node_tree:
        world.use_nodes = True
    for node in world.node_tree.nodes:
        if node.type == "BACKGROUND":
            node.inputs["Color"].default_value = (0, 0, 0, 1)
    return world


def _add_modifier(obj: Any, made: dict[str, Any]) -> None:
    kind = {"subdivision": "SUBSURF", "array": "ARRAY", "solidify": "SOLIDIFY", "wave": "WAVE", "mirror": "MIRROR"}[
        made["type"]
    ]
    if kind == "SOLIDIFY" and obj.type == "FONT":  # up to five faces would lie in one another
        return
    try:
        modifier = obj.modifiers.new(made["type"], kind)
    except (RuntimeError, TypeError):
        return
    if modifier is None:  # not for this kind of object
        return
    if kind == "SUBSURF":
        modifier.levels, modifier.render_levels = made["levels"], made["render_levels"]
    elif kind == "ARRAY":
        modifier.relative_offset_displace = (0.7, 0.7, 0.07)
    elif kind == "SOLIDIFY":
        modifier.thickness = 0.4
    elif kind == "WAVE":
        modifier.height, modifier.width, modifier.speed = 0.6, 1.0, 0.3
    else:
        modifier.use_axis = (False, True, False)
    modifier.show_viewport, modifier.show_render = made["viewport"], made["render"]


def _animate(obj: Any, motion: str) -> None:
    if motion == "keyframes":
        start = obj.location.copy()
        for frame, way in ((1, (0, 0, 0)), (11, (1.5, -1, 0.5))):
            obj.location = start + Vector(way)
            obj.keyframe_insert("location", frame=frame)
        obj.location = start
    elif motion == "driver":
        driver = obj.driver_add("location", 0).driver
        driver.type, driver.expression = "SCRIPTED", f"{obj.location.x:.2f} + frame * 0.13"
    elif motion == "shape key" and obj.type == "MESH":
        obj.shape_key_add(name="Basis")
        key = obj.shape_key_add(name="Larger")
        for point in key.data:
            point.co = point.co * 1.5
        for frame in (1, 11):
            key.value = (frame - 1) / 10
            key.keyframe_insert("value", frame=frame)


def _instancing_nodes(part: Any) -> Any:
    tree = bpy.data.node_groups.new("Instancing", "GeometryNodeTree")
    tree.interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    tree.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
    given, result, info, instance, joined = (
        tree.nodes.new(name)
        for name in (
            "NodeGroupInput",
            "NodeGroupOutput",
            "GeometryNodeObjectInfo",
            "GeometryNodeInstanceOnPoints",
            "GeometryNodeJoinGeometry",
        )
    )
    info.inputs["Object"].default_value, info.inputs["As Instance"].default_value = part, True
    tree.links.new(given.outputs[0], instance.inputs["Points"])
    tree.links.new(info.outputs["Geometry"], instance.inputs["Instance"])
    tree.links.new(given.outputs[0], joined.inputs[0])
    tree.links.new(instance.outputs[0], joined.inputs[0])
    tree.links.new(joined.outputs[0], result.inputs[0])
    return tree
