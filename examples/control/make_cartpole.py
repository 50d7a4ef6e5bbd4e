"""Makes cartpole.blend: a cart on a rail, driven by a motor, with a pole on a hinge. Blender's rigid bodies move them.

    blender --background --factory-startup --python make_cartpole.py

Run it with Blender 3.4, the oldest version supported: what it saves opens in every later one.

Metres, kilograms, seconds. The cart moves along x; the pole turns about y, and leans to +x where its angle is positive.
"""

from math import pi
from pathlib import Path

import bpy
from mathutils import Vector

FPS = 30
CART_HEIGHT = 1.2
PIVOT = CART_HEIGHT + 0.2  # the upper side of the cart
POLE_LENGTH = 2.0
RAIL_HALF = 4.4


def linear(srgb: float) -> float:
    """IEC 61966-2-1."""
    return srgb / 12.92 if srgb <= 0.04045 else ((srgb + 0.055) / 1.055) ** 2.4


def material(name: str, srgb: tuple[float, float, float]) -> bpy.types.Material:
    """A matt surface, the same in solid shading."""
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    nodes, links = made.node_tree.nodes, made.node_tree.links
    color = (*map(linear, srgb), 1.0)
    surface = nodes.new("ShaderNodeBsdfDiffuse")
    surface.inputs["Color"].default_value = color
    links.new(surface.outputs["BSDF"], nodes["Material Output"].inputs["Surface"])
    nodes.remove(nodes["Principled BSDF"])
    made.diffuse_color = color
    return made


def named(name: str, surface: bpy.types.Material | None = None) -> bpy.types.Object:
    """The object that was just added."""
    obj = bpy.context.active_object
    obj.name = name
    if obj.data is not None:
        obj.data.name = name
    if surface is not None:
        obj.data.materials.append(surface)
    return obj


def box(
    name: str, location: tuple[float, ...], size: tuple[float, ...], surface: bpy.types.Material
) -> bpy.types.Object:
    bpy.ops.mesh.primitive_cube_add(size=1, location=location)
    obj = named(name, surface)
    obj.scale = size
    bpy.ops.object.transform_apply(location=False, rotation=False, scale=True)
    return obj


def rod(
    name: str,
    location: tuple[float, ...],
    radius: float,
    length: float,
    rotation: tuple[float, ...],
    surface: bpy.types.Material,
) -> bpy.types.Object:
    bpy.ops.mesh.primitive_cylinder_add(vertices=32, radius=radius, depth=length, location=location, rotation=rotation)
    obj = named(name, surface)
    bpy.ops.object.transform_apply(location=False, rotation=True, scale=False)
    bpy.ops.object.shade_smooth()
    obj.data.use_auto_smooth = True  # the ends stay flat
    return obj


def empty(name: str, location: tuple[float, ...], rotation: tuple[float, ...] = (0, 0, 0)) -> bpy.types.Object:
    bpy.ops.object.empty_add(type="ARROWS", radius=0.3, location=location, rotation=rotation)
    return named(name)


def add_rigid_body(obj: bpy.types.Object, kind: str, mass: float, layer: int) -> None:
    """What is in different layers does not collide: the constraints alone hold things together."""
    bpy.context.view_layer.objects.active = obj
    bpy.ops.rigidbody.object_add(type=kind)
    body = obj.rigid_body
    body.collision_shape, body.mass = "BOX", mass
    body.linear_damping = body.angular_damping = 0.0
    body.use_deactivation = False
    body.collision_collections = [i == layer for i in range(20)]


def add_constraint(obj: bpy.types.Object, kind: str, first: bpy.types.Object, second: bpy.types.Object) -> None:
    bpy.context.view_layer.objects.active = obj
    bpy.ops.rigidbody.constraint_add(type=kind)
    obj.rigid_body_constraint.object1, obj.rigid_body_constraint.object2 = first, second


def join(obj: bpy.types.Object, others: list[bpy.types.Object]) -> None:
    bpy.ops.object.select_all(action="DESELECT")
    for other in (obj, *others):
        other.select_set(True)
    bpy.context.view_layer.objects.active = obj
    bpy.ops.object.join()


def build() -> None:
    steel, dark = material("Steel", (0.55, 0.57, 0.60)), material("Dark", (0.18, 0.20, 0.24))
    blue, orange = material("Blue", (0.13, 0.42, 0.75)), material("Orange", (0.95, 0.52, 0.10))

    rail = rod("Rail", (0, 0, 0.88), 0.06, 2 * RAIL_HALF, (0, pi / 2, 0), steel)
    ends = [box("End", (side * RAIL_HALF, 0, 0.5), (0.12, 0.5, 1.0), dark) for side in (-1, 1)]
    join(rail, ends)
    cart = box("Cart", (0, 0, CART_HEIGHT), (1.0, 0.6, 0.4), blue)
    wheels = [
        rod("Wheel", (x, y, CART_HEIGHT - 0.2), 0.16, 0.1, (pi / 2, 0, 0), dark)
        for x in (-0.3, 0.3)
        for y in (-0.3, 0.3)
    ]
    join(cart, wheels)
    helper = empty("PoleRotHelp", (0, 0, PIVOT))
    pole = rod("Pole", (0, 0, POLE_LENGTH / 2), 0.09, POLE_LENGTH, (0, 0, 0), orange)
    pole.parent = helper  # which turns it about the pivot, before an episode

    bpy.ops.rigidbody.world_add()
    world = bpy.context.scene.rigidbody_world
    world.substeps_per_frame, world.solver_iterations = 10, 20
    add_rigid_body(rail, "PASSIVE", 1.0, 0)
    add_rigid_body(cart, "ACTIVE", 1.0, 1)
    add_rigid_body(pole, "ACTIVE", 0.1, 2)
    add_constraint(empty("Slider", (0, 0, CART_HEIGHT)), "SLIDER", rail, cart)
    motor = empty("Motor", (0, 0, CART_HEIGHT))
    add_constraint(motor, "MOTOR", cart, rail)
    motor.rigid_body_constraint.use_motor_lin = True
    motor.rigid_body_constraint.motor_lin_target_velocity = 0.0
    motor.rigid_body_constraint.motor_lin_max_impulse = 100.0
    add_constraint(empty("Hinge", (0, 0, PIVOT), (pi / 2, 0, 0)), "HINGE", cart, pole)


def set_stage() -> None:
    floor = bpy.data.objects["Floor"]
    floor.location, floor.scale = (0, 0, 0), (2.2, 2.2, 1)
    camera = bpy.data.objects["Camera"]
    camera.location = (1.4, -12.6, 3.4)
    camera.data.lens = 47
    camera.rotation_euler = (Vector((0, 0, 1.75)) - camera.location).to_track_quat("-Z", "Y").to_euler()
    for area in (area for screen in bpy.data.screens for area in screen.areas if area.type == "VIEW_3D"):
        shading = area.spaces[0].shading  # of solid pictures: in flat light they are exactly the same when drawn again
        shading.light, shading.background_type = "FLAT", "VIEWPORT"
        shading.background_color = tuple(map(linear, (0.52, 0.60, 0.70)))


def main() -> None:
    bpy.ops.wm.open_mainfile(filepath=str(Path(__file__).parents[1] / "datagen" / "cube.blend"))
    bpy.data.objects.remove(bpy.data.objects["Cube"])
    bpy.ops.outliner.orphans_purge(do_recursive=True)
    scene = bpy.context.scene
    scene.render.fps = FPS
    scene.render.resolution_x, scene.render.resolution_y = 320, 160
    set_stage()
    build()
    bpy.ops.object.select_all(action="DESELECT")
    scene.frame_start, scene.frame_end = 1, 500
    scene.frame_set(1)
    bpy.ops.wm.save_as_mainfile(filepath=str(Path(__file__).with_name("cartpole.blend")), compress=True)


main()
