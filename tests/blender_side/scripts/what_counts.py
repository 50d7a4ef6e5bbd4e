"""Shows one thing in many ways, and saves for each what pictures and labels have of it.

A green slab, the thing, is before a larger red one, on blue. Each glows, so a picture says by its colours what it shows.
"""

from collections.abc import Callable

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import compat
from blender_side.utils import find_first_view3d

out = btb.parse_blendtorch_args()[1][0]
scene = bpy.context.scene
for obj in list(bpy.data.objects):
    bpy.data.objects.remove(obj)
results: dict = {"off_screen": compat.draws_off_screen()}


def glowing(name: str, color: tuple) -> object:
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    nodes = material.node_tree.nodes
    nodes.clear()
    emission, output = nodes.new("ShaderNodeEmission"), nodes.new("ShaderNodeOutputMaterial")
    emission.inputs[0].default_value = material.diffuse_color = color
    material.node_tree.links.new(emission.outputs[0], output.inputs[0])
    return material


def slab(name: str, color: tuple, size: float, collection: object) -> object:
    mesh = bpy.data.meshes.new(name)
    corners = [(x - 0.5, y - 0.5, z - 0.5) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    mesh.from_pydata(corners, [], faces)
    mesh.materials.append(glowing(name, color))
    made = bpy.data.objects.new(name, mesh)
    made.scale = size, size, 0.2
    collection.objects.link(made)
    return made


def collection(name: str, parent: object = None) -> object:
    made = bpy.data.collections.new(name)
    if parent is not None:
        parent.children.link(made)
    return made


back = slab("back", (1, 0, 0, 1), 3, scene.collection)
back.location.z = -1
home, source = collection("home", scene.collection), collection("source")
thing, leaf = slab("thing", (0, 1, 0, 1), 1, home), slab("thing", (0, 1, 0, 1), 1, source)
leaf.name = "leaf"
host = bpy.data.objects.new("host", None)
host.instance_type, host.instance_collection = "COLLECTION", source
nodes = slab("nodes", (0, 1, 0, 1), 1, scene.collection)
scene.collection.objects.unlink(nodes)
nodes.data.clear_geometry()


def tree_of(host: object) -> tuple:
    """New geometry nodes of an object: the tree, what it is given, and what joins all that it gives."""
    tree = bpy.data.node_groups.new(host.name, "GeometryNodeTree")
    for in_out in ("INPUT", "OUTPUT"):
        if hasattr(tree, "interface"):
            tree.interface.new_socket("Geometry", in_out=in_out, socket_type="NodeSocketGeometry")
        else:  # 3.4
            getattr(tree, f"{in_out.lower()}s").new("NodeSocketGeometry", "Geometry")
    given, joined = tree.nodes.new("NodeGroupInput"), tree.nodes.new("GeometryNodeJoinGeometry")
    tree.links.new(joined.outputs[0], tree.nodes.new("NodeGroupOutput").inputs[0])
    host.modifiers.new("Nodes", "NODES").node_group = tree
    return tree, given, joined


tree, _, joined = tree_of(nodes)
info = tree.nodes.new("GeometryNodeObjectInfo")
info.inputs["Object"].default_value, info.inputs["As Instance"].default_value = leaf, True
info.transform_space = "RELATIVE"
tree.links.new(info.outputs["Geometry"], joined.inputs[0])
lens = bpy.data.cameras.new("Camera")
lens.lens = 60
scene.camera = bpy.data.objects.new("Camera", lens)
scene.camera.location.z = 10
scene.collection.objects.link(scene.camera)
scene.world = bpy.data.worlds.new("World")
scene.world.use_nodes = True
scene.world.color = scene.world.node_tree.nodes["Background"].inputs[0].default_value[:3] = (0, 0, 1)
scene.cycles.samples, scene.cycles.use_denoising, scene.cycles.pixel_filter_type = 1, False, "BOX"
scene.display.render_aa = "OFF"
first = bpy.context.view_layer
second = scene.view_layers.new("Second")
for shading in (scene.display.shading, find_first_view3d()[1].shading):
    shading.light, shading.color_type = "FLAT", "MATERIAL"


def in_layer(name: str = "home", layer: object = first) -> object:
    return layer.layer_collection.children[name]


def in_place() -> None:
    """The thing by itself, as at first."""
    thing.location.z = leaf.location.z = 1
    host.location.z = 0
    for one in (thing, leaf, host, nodes):
        one.visible_camera, one.is_holdout, one.is_shadow_catcher, one.show_in_front = True, False, False, False
        one.display_type, one.hide_viewport, one.hide_render = "TEXTURED", False, False
    thing.modifiers.clear()
    scene.render.use_simplify = scene.render.use_single_layer = False
    second.use = True
    for layer in (first, second):
        child = in_layer(layer=layer)
        child.exclude = child.holdout = child.indirect_only = child.hide_viewport = False
    home.hide_viewport = home.hide_render = False
    for one in list(home.objects):
        home.objects.unlink(one)
    home.objects.link(thing)
    thing.hide_set(False)


def instanced(by: object = host) -> None:
    home.objects.unlink(thing)
    home.objects.link(by)


def rounded() -> None:
    modifier = thing.modifiers.new("Round", "SUBSURF")
    modifier.levels, modifier.render_levels = 0, 3


def simplified() -> None:
    rounded()
    scene.render.use_simplify, scene.render.simplify_subdivision_render = True, 0


def far(one: object) -> None:
    one.location.z = -4
    one.show_in_front = True


WAYS: dict[str, Callable[[], object]] = {
    "as it is": lambda: None,
    "not visible to the camera": lambda: setattr(thing, "visible_camera", False),
    "a holdout": lambda: setattr(thing, "is_holdout", True),
    "a shadow catcher": lambda: setattr(thing, "is_shadow_catcher", True),
    "in a holdout collection": lambda: setattr(in_layer(), "holdout", True),
    "in an indirect collection": lambda: setattr(in_layer(), "indirect_only", True),
    "in an excluded collection": lambda: setattr(in_layer(), "exclude", True),
    "in a collection with its eye shut": lambda: setattr(in_layer(), "hide_viewport", True),
    "in a collection hidden in viewports": lambda: setattr(home, "hide_viewport", True),
    "in a collection hidden in renders": lambda: setattr(home, "hide_render", True),
    "with its eye shut": lambda: thing.hide_set(True),
    "hidden in viewports": lambda: setattr(thing, "hide_viewport", True),
    "hidden in renders": lambda: setattr(thing, "hide_render", True),
    "displayed as wire": lambda: setattr(thing, "display_type", "WIRE"),
    "displayed as bounds": lambda: setattr(thing, "display_type", "BOUNDS"),
    "in front, and far": lambda: far(thing),
    "only in the second layer": lambda: setattr(in_layer(), "exclude", True),
    "only in the first layer": lambda: setattr(in_layer(layer=second), "exclude", True),
    "only the window's layer is rendered": lambda: (
        setattr(in_layer(layer=second), "exclude", True),
        setattr(scene.render, "use_single_layer", True),
    ),
    "rounder in renders": rounded,
    "simplified in renders": simplified,
    "instanced": instanced,
    "instanced, leaf not visible to the camera": lambda: (instanced(), setattr(leaf, "visible_camera", False)),
    "instanced, host not visible to the camera": lambda: (instanced(), setattr(host, "visible_camera", False)),
    "instanced, leaf a holdout": lambda: (instanced(), setattr(leaf, "is_holdout", True)),
    "instanced, host a holdout": lambda: (instanced(), setattr(host, "is_holdout", True)),
    "instanced, host a holdout, in a holdout collection": lambda: (
        instanced(),
        setattr(host, "is_holdout", True),
        setattr(in_layer(), "holdout", True),
    ),
    "instanced, leaf a shadow catcher": lambda: (instanced(), setattr(leaf, "is_shadow_catcher", True)),
    "instanced, host a shadow catcher": lambda: (instanced(), setattr(host, "is_shadow_catcher", True)),
    "instanced, host in an indirect collection": lambda: (instanced(), setattr(in_layer(), "indirect_only", True)),
    "instanced, leaf displayed as wire": lambda: (instanced(), setattr(leaf, "display_type", "WIRE")),
    "instanced, host displayed as wire": lambda: (instanced(), setattr(host, "display_type", "WIRE")),
    "instanced, leaf hidden in renders": lambda: (instanced(), setattr(leaf, "hide_render", True)),
    "instanced, leaf in front, and far": lambda: (instanced(), far(leaf)),
    "instanced by nodes": lambda: instanced(nodes),
    "instanced by nodes, leaf hidden in viewports": lambda: (instanced(nodes), setattr(leaf, "hide_viewport", True)),
    "instanced by nodes, leaf hidden in renders": lambda: (instanced(nodes), setattr(leaf, "hide_render", True)),
    "instanced by nodes, leaf displayed as wire": lambda: (instanced(nodes), setattr(leaf, "display_type", "WIRE")),
}

camera = btb.Camera(shape=(40, 40))
renderers = {
    "CYCLES": btb.FinalRenderer(camera, "rgb", engine="CYCLES"),
    "WORKBENCH": btb.FinalRenderer(camera, "rgb", engine="WORKBENCH"),
}
if compat.draws_off_screen():
    scene.render.engine = compat.EEVEE
    renderers["SOLID"] = btb.OffScreenRenderer(camera, "rgb")
    renderers["SOLID"].set_render_style("SOLID")
    if bpy.app.version >= (4, 2):
        scene.eevee.taa_samples = 1
        renderers["EEVEE"] = btb.OffScreenRenderer(camera, "rgb")
        renderers["EEVEE"].set_render_style("RENDERED")
passes = (("instance", "depth") if compat.draws_off_screen() else ("boxes_3d",)) + ("keypoints",)
points = {"behind": (back, (0, 0, 0.5)), "on it": (thing, (0, 0, 0.5))}
for engine, renderer in renderers.items():
    truth = btb.GroundTruth(camera, passes, renderer=renderer, keypoints=points)
    for way, show in WAYS.items():
        in_place()
        show()
        if "layer" in way and bpy.context.window is not None:
            bpy.context.window.view_layer = second
        picture, made = renderer.render(), truth.render()
        if bpy.context.window is not None:
            bpy.context.window.view_layer = first
        results[f"{engine} {way}: names"] = made["instance_names"]
        results[f"{engine} {way}: keypoints"] = made["keypoints"][:, 2]
        red, green = picture[..., 0] > 100, picture[..., 1] > 100
        results[f"{engine} {way}: picture"] = np.where(green, 2, np.where(red, 1, 0))
        if compat.draws_off_screen():
            mask = np.zeros(camera.shape, int)
            for name, number in zip(made["instance_names"], made["instance_ids"], strict=True):
                mask[made["instance"] == number] = 1 if name == "back" else 2
            results[f"{engine} {way}: mask"], results[f"{engine} {way}: depth"] = mask, made["depth"]
    in_place()
    first.use_solid = False
    results[f"{engine} without surfaces: picture"] = renderer.render()
    results[f"{engine} without surfaces: names"] = truth.render()["instance_names"]
    first.use_solid = True

# Types that the viewport does not show: each picture is of a slab, a text, and a slab that an Empty instances.

if compat.draws_off_screen():
    in_place()
    text = bpy.data.curves.new("text", "FONT")
    text.body, text.size = "H", 1
    text.materials.append(thing.data.materials[0])
    scene.collection.objects.link(bpy.data.objects.new("text", text))
    home.objects.link(host)
    bpy.data.objects["text"].location = -1.2, 0, 1
    thing.location.x, host.location.x, back.hide_viewport = 1.2, 0, True
    space = find_first_view3d()[1]
    plain, styled = btb.OffScreenRenderer(camera, "rgb"), renderers["SOLID"]
    for kind in ("mesh", "font", "empty"):
        setattr(space, f"show_object_viewport_{kind}", False)
        made = btb.GroundTruth(camera, passes, renderer=plain, keypoints=points).render()
        results[f"without {kind}: names"], results[f"without {kind}: mask"] = made["instance_names"], made["instance"]
        results[f"without {kind}: picture"] = plain.render()
        made = btb.GroundTruth(camera, passes, renderer=styled, keypoints=points).render()
        results[f"without {kind}: names in its style"] = made["instance_names"]

# A vertex of what keeps its own mesh, and instances another.

in_place()
tree, given, joined = tree_of(thing)
to_instance = tree.nodes.new("GeometryNodeGeometryToInstance")
tree.links.new(tree.nodes.new("GeometryNodeMeshCube").outputs[0], to_instance.inputs[0])
for socket in (given.outputs[0], to_instance.outputs[0]):
    tree.links.new(socket, joined.inputs[0])
points = {"vertex": (thing, 7), "place": (thing, tuple(thing.data.vertices[7].co))}
made = btb.GroundTruth(camera, ("boxes_3d", "keypoints"), renderer=renderers["CYCLES"], keypoints=points).render()
results["vertex: names"], results["vertex: keypoints"] = made["instance_names"], made["keypoints"]

# Flow of instances, before and after one is gone.

if compat.draws_off_screen():
    line, on_points = (tree.nodes.new(f"GeometryNode{kind}") for kind in ("MeshLine", "InstanceOnPoints"))
    line.inputs["Count"].default_value, line.inputs["Offset"].default_value = 3, (0.4, 0, 0)
    for start, end in ((line, "Points"), (tree.nodes["Cube"], "Instance")):
        tree.links.new(start.outputs[0], on_points.inputs[end])
    tree.links.new(on_points.outputs[0], joined.inputs[0])
    back.hide_viewport = False
    tree.nodes["Cube"].inputs["Size"].default_value = 0.2, 0.2, 4
    truth = btb.GroundTruth(camera, ("flow_backward", "instance"), renderer=renderers["SOLID"])
    for count in (3, 3, 2):
        line.inputs["Count"].default_value = count
        made = truth.render()
        names = dict(zip(made["instance_names"], made["instance_ids"], strict=True))
        shown = np.isin(made["instance"], [number for name, number in names.items() if name.startswith("thing#")])
        flow = np.abs(made["flow_backward"]).max(axis=-1)
        results[f"flow of {count}: instances"], results[f"flow of {count}: back"] = (
            flow[shown],
            flow[made["instance"] == names["back"]],
        )

np.savez(out, **results)
