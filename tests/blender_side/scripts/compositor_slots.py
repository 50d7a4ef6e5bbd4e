"""Renders the cube through compositor nodes, and saves what came out beside what Cycles itself says, as one .npz file."""

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import bpy
import cycles
import numpy as np

import blendtorch.btb as btb
from blender_side import compositor, publisher
from blendtorch_shm.errors import ConfigurationError, OutOfSharedMemory

out = Path(btb.parse_blendtorch_args()[1][0])
kept = out.parent / "kept"
IS_GROUP = bpy.app.version >= (5, 0, 0)
HEIGHT, WIDTH = 48, 64
scene = bpy.context.scene
layer = scene.view_layers[0]
cube = bpy.data.objects["Cube"]
bpy.data.objects["Floor"].hide_render = True
scene.render.engine = "CYCLES"
scene.cycles.samples, scene.cycles.use_denoising = 2, False
scene.render.film_transparent = True
scene.render.resolution_x, scene.render.resolution_y = 300, 200
# What is for display only must not show in values.
scene.view_settings.exposure, scene.view_settings.gamma, scene.render.dither_intensity = 2.0, 1.5, 2.0
layer.use_pass_z = layer.use_pass_normal = True
results = {}


def compositor_tree():
    if not IS_GROUP:
        scene.use_nodes = True
        scene.node_tree.nodes.clear()
        return scene.node_tree
    scene.compositing_node_group = bpy.data.node_groups.new("Compositing", "CompositorNodeTree")
    return scene.compositing_node_group


def output_node(name, file_format, depth, slots):
    """A File Output node; slots: name -> (its type, what is linked to it)."""
    node = tree.nodes.new("CompositorNodeOutputFile")
    node.name = name
    node.label = f"label of {name}"
    if IS_GROUP:
        node.format.media_type = "MULTI_LAYER_IMAGE" if "MULTI" in file_format else "IMAGE"
        node.directory, node.file_name = str(kept), "####"
        node.file_output_items.clear()
    node.format.file_format = file_format
    node.format.color_depth = depth
    if not IS_GROUP:
        node.base_path = str(kept / "####" if "MULTI" in file_format else kept)
        inputs = node.layer_slots if "MULTI" in file_format else node.file_slots
        inputs.clear()
    for index, (slot, (kind, source)) in enumerate(slots.items()):
        node.file_output_items.new(kind, slot) if IS_GROUP else inputs.new(slot)
        tree.links.new(source, node.inputs[index])
    return node


tree = compositor_tree()
layers = tree.nodes.new("CompositorNodeRLayers")
invert = tree.nodes.new("CompositorNodeInvert")
tree.links.new(layers.outputs["Image"], invert.inputs["Color"])
image = ("RGBA", layers.outputs["Image"])
depth = ("FLOAT", layers.outputs["Depth"])
normal = ("VECTOR", layers.outputs["Normal"])
full = output_node("Full", "OPEN_EXR_MULTILAYER", "32", {"Image": image, "Depth": depth, "Normals": normal})
full.format.exr_codec = "DWAA"
single = output_node("Single", "OPEN_EXR", "32", {"Inverted": ("RGBA", invert.outputs["Color"]), "a b #": depth})
half = output_node("Half", "OPEN_EXR", "16", {"Image": image, "Depth": depth, "Normals": normal})
wrong = output_node("Wrong", "PNG", "8", {"Image": image})
wrong.mute = True
muted = output_node("Muted", "OPEN_EXR", "32", {"Image": image})
muted.mute = True

# What Cycles made, by name of the pass, before anything else touches it.
passes = {}
original = cycles.CyclesRender.render


def render_and_note(self, depsgraph):
    original(self, depsgraph)
    for made in self.get_result().layers[0].passes:
        passes[made.name] = np.empty((HEIGHT, WIDTH, made.channels), np.float32)
        flat = passes[made.name].reshape(-1)
        made.rect.foreach_get(flat if bpy.app.version >= (4, 0, 0) else flat.reshape(-1, made.channels))


cycles.CyclesRender.render = render_and_note


def settings(owner):
    """All properties of something in Blender, as text."""
    return {
        prop.identifier: str(getattr(owner, prop.identifier))
        for prop in owner.bl_rna.properties
        if prop.type in ("BOOLEAN", "INT", "FLOAT", "STRING", "ENUM") and not prop.is_readonly
    }


def everything():
    slots = lambda node: node.file_output_items if IS_GROUP else [*node.file_slots, *node.layer_slots]  # noqa: E731
    nodes = [full, single, half]
    owners = [scene.render, scene.render.image_settings, *nodes, *(node.format for node in nodes)]
    owners += [slot for node in nodes for slot in slots(node)]
    links = sorted((link.from_socket.name, link.to_node.name, link.to_socket.name) for link in tree.links)
    pose = np.array(scene.camera.matrix_world).tolist()
    return [settings(owner) for owner in owners], links, scene.camera.name, pose, bpy.data.objects.keys()


cube.location, cube.rotation_euler = (-1.2, 0.4, 0.9), (0.3, 0.5, 0.9)
camera = btb.Camera(shape=(HEIGHT, WIDTH))
camera.look_at((0, 0, 0), look_from=(5, -7, 4))
scene.camera.location.x += 3  # the camera's matrices are what counts
bpy.context.view_layer.update()
wanted = [
    btb.CompositeSelection("rgba", "Full", "Image", "RGBA"),
    btb.CompositeSelection("bgr", "Full", "Image", "BGR"),
    btb.CompositeSelection("depth", "Full", "Depth", "V"),
    btb.CompositeSelection("normals", "Full", "Normals", "XYZ"),
    btb.CompositeSelection("inverted", "Single", "Inverted", "RGB"),
    btb.CompositeSelection("odd name", "Single", "a b #", "V"),
    btb.CompositeSelection("half rgba", "Half", "Image", "RGBA"),
    btb.CompositeSelection("half depth", "Half", "Depth", "V"),
    btb.CompositeSelection("half normals", "Half", "Normals", "XYZ"),
]
renderer = btb.CompositeRenderer(wanted, camera, btid=3)
before = everything()
arrays = renderer.render()
results["unchanged"] = everything() == before
results["keys"] = list(arrays)
results["contiguous"] = all(a.flags.c_contiguous and a.flags.writeable for a in arrays.values())
results |= arrays
results |= {f"cycles {name}": made[::-1] for name, made in passes.items()}
results["corners"] = camera.object_to_pixel(cube)
results["images left"] = len(bpy.data.images)
results["folders left"] = [name for name in os.listdir(compositor._folder()) if name.startswith("compositor-")]
results["folder is the launch's"] = os.path.basename(compositor._folder()).startswith("blendtorch-")
results["written to disk"] = kept.exists()

# Arrays go where the publisher says.
lent = np.full((HEIGHT, WIDTH, 1), -7, np.float32)
publisher.lend_array = lambda shape, dtype: lent if shape == lent.shape and dtype == np.float32 else None
again = btb.CompositeRenderer(wanted[2:4], camera).render()
results["lent is returned"] = again["depth"] is lent
results["lent"] = lent
publisher.lend_array = lambda shape, dtype: None

scene.frame_set(7)
btb.CompositeRenderer(wanted[2:6], camera, delete_render_files=False, btid=3).render()
results["kept"] = sorted(file.name for file in kept.glob("*_03_*"))
results["written by others"] = sorted(file.name for file in kept.glob("*") if "_03_" not in file.name)
image = bpy.data.images.load(str(kept / "Full_Depth_03_0007.exr"))
results["kept depth"] = np.array(image.pixels[:], np.float32).reshape(HEIGHT, WIDTH, 4)[::-1, :, :1]
bpy.data.images.remove(image)


def refused(key, make, error=ConfigurationError):
    results[key] = "nothing was refused"
    try:
        make().render()
    except error as refusal:
        results[key] = str(refusal)


def select(node, slot, channels):
    return lambda: btb.CompositeRenderer([btb.CompositeSelection("key", node, slot, channels)], camera)


refused("no node", select("label of Full", "Image", "RGB"))
refused("no slot", select("Full", "Image.001", "RGB"))
refused("no channel", select("Full", "Depth", "RGB"))
refused("no channels", select("Full", "Depth", ""))
refused("wrong format", select("Wrong", "Image", "RGB"))
refused("muted", select("Muted", "Image", "RGB"))
refused("no selection", lambda: btb.CompositeRenderer([], camera))
refused("same key", lambda: btb.CompositeRenderer(wanted[:1] * 2, camera))
# A file may not become larger than this: as when memory is full, some of it is written.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limit[1]))
refused("no memory", select("Full", "Image", "RGB"), OutOfSharedMemory)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
disk_usage = shutil.disk_usage
shutil.disk_usage = lambda path: disk_usage(path)._replace(free=3 * HEIGHT * WIDTH * 16 - 1)
refused("no room", select("Full", "Image", "RGB"), OutOfSharedMemory)
shutil.disk_usage = disk_usage
layers.mute = True
refused("nothing written", select("Full", "Image", "RGB"))
layers.mute = False
# A slot may be of another size than the render.
small = bpy.data.images.new("Small", 20, 10, alpha=True, float_buffer=True)
small.pixels.foreach_set(np.repeat(np.arange(20 * 10, dtype=np.float32), 4))
other_size = tree.nodes.new("CompositorNodeImage")
other_size.image = small
output_node("Small", "OPEN_EXR", "32", {"Image": ("RGBA", other_size.outputs["Image"])})
results["of another size"] = select("Small", "Image", "R")().render()["key"]
gone = select("Full", "Image", "RGB")()
tree.nodes.remove(full)
refused("gone", lambda: gone)
if IS_GROUP:
    scene.compositing_node_group = None
else:
    scene.use_nodes = False
refused("off", select("Half", "Image", "RGB"))

np.savez(out, **results)
print("renders", sorted(results), file=sys.stderr)
