"""Makes final renders of the cube with each engine, and saves them beside what Cycles itself says, as one .npz file."""

import resource
import signal
import sys

import bpy
import cycles
import numpy as np

import blendtorch.btb as btb
from blender_side import publisher
from blendtorch_shm.errors import ConfigurationError, OutOfSharedMemory

out = btb.parse_blendtorch_args()[1][0]
IS_GROUP = bpy.app.version >= (5, 0, 0)
HEIGHT, WIDTH = 48, 64
scene = bpy.context.scene
cube = bpy.data.objects["Cube"]
bpy.data.objects["Floor"].hide_render = True
scene.render.engine = "CYCLES"
scene.cycles.samples, scene.cycles.use_denoising = 2, False
scene.display.render_aa = "OFF"
scene.eevee.taa_render_samples = 4
scene.view_settings.exposure, scene.render.dither_intensity = 1.0, 2.0  # for display only
results = {}

passes = {}
original = cycles.CyclesRender.render


def render_and_note(self, depsgraph):
    original(self, depsgraph)
    for made in self.get_result().layers[0].passes:
        passes[made.name] = np.empty((HEIGHT, WIDTH, made.channels), np.float32)
        flat = passes[made.name].reshape(-1)
        made.rect.foreach_get(flat if bpy.app.version >= (4, 0, 0) else flat.reshape(-1, made.channels))


cycles.CyclesRender.render = render_and_note

# A cube that shines with a light of its own, beyond what 8 bits hold.
glow = bpy.data.materials.new("Glow")
glow.use_nodes = True
emission = glow.node_tree.nodes.new("ShaderNodeEmission")
emission.inputs["Color"].default_value, emission.inputs["Strength"].default_value = (0.5, 0.1, 0.02, 1), 4.0
glow.node_tree.links.new(emission.outputs[0], glow.node_tree.nodes["Material Output"].inputs["Surface"])
glow.diffuse_color = (0.8, 0.1, 0.1, 1)
cube.data.materials.clear()
cube.data.materials.append(glow)
cube.location, cube.rotation_euler = (-1.2, 0.4, 0.9), (0.3, 0.5, 0.9)
camera = btb.Camera(shape=(HEIGHT, WIDTH))
camera.look_at((0, 0, 0), look_from=(5, -7, 4))
# Where the script has put the camera is what counts, and not its animation or a marker.
scene.camera.location.x += 3
scene.camera.keyframe_insert("location")
scene.camera.location.x -= 3
other = bpy.data.objects.new("Other", bpy.data.cameras.new("Other"))
scene.collection.objects.link(other)
scene.timeline_markers.new("Cut", frame=scene.frame_current).camera = other
scene.camera = camera.bpy_camera
bpy.context.view_layer.update()
results["corners"] = camera.object_to_pixel(cube)
ndc = camera.world_to_ndc([cube.location])
results["middle"] = camera.ndc_to_pixel(ndc)[0]


def settings(owner):
    """All properties of something in Blender, as text."""
    return {
        prop.identifier: str(getattr(owner, prop.identifier))
        for prop in owner.bl_rna.properties
        if prop.type in ("BOOLEAN", "INT", "FLOAT", "STRING", "ENUM") and not prop.is_readonly
    }


def everything():
    render = scene.render
    owners = [render, render.image_settings, scene.view_settings, scene.eevee, scene.display.shading]
    pose = np.array(scene.camera.matrix_world).tolist()
    return (
        [settings(owner) for owner in owners],
        [marker.camera.name for marker in scene.timeline_markers],
        scene.camera.name,
        pose,
        bpy.data.objects.keys(),
        bpy.data.images.keys(),
    )


results["unchanged"] = []


def shoot(key, **options):
    before = everything()
    results[key] = btb.FinalRenderer(camera, **options).render()
    results["unchanged"].append(everything() == before)


# Whatever the scene is set to write is what it is set to afterwards.
stills = scene.render.image_settings
stills.file_format, stills.color_mode, stills.color_depth = "PNG", "BW", "16"
shoot("light", mode="rgba", dtype=np.float32)
results["cycles"] = passes["Combined"][::-1]
shoot("light rgb lower", mode="rgb", origin="lower-left", dtype="float32")
if IS_GROUP:
    stills.media_type = "VIDEO"
stills.file_format = "FFMPEG"
shoot("linear", mode="rgb")
scene.view_settings.exposure = 0.0
shoot("srgb", mode="rgba", color_space="srgb")
if IS_GROUP:
    stills.media_type = "MULTI_LAYER_IMAGE"
stills.file_format = "OPEN_EXR_MULTILAYER"
stills.exr_codec, stills.color_depth = "DWAA", "16"
scene.render.film_transparent = True
shoot("transparent light", mode="rgba", dtype=np.float32)
shoot("transparent linear", mode="rgba")
scene.render.film_transparent = False
shoot("eevee", mode="rgb", dtype=np.float32, engine="EEVEE")
shoot("eevee srgb", mode="rgb", color_space="srgb", engine="EEVEE")
shoot("workbench", mode="rgb", dtype=np.float32, engine="WORKBENCH")
shoot("workbench linear", mode="rgb", engine="WORKBENCH")
results["engine"] = scene.render.engine

lent = np.full((HEIGHT, WIDTH, 3), -7, np.float32)
publisher.lend_array = lambda shape, dtype: lent if (shape, dtype) == (lent.shape, lent.dtype) else None
renderer = btb.FinalRenderer(camera, mode="rgb", dtype=np.float32)
results["lent is returned"] = renderer.render() is lent
results["lent"] = lent.copy()
publisher.lend_array = lambda shape, dtype: None
results["fresh memory"] = not np.shares_memory(renderer.render(), renderer.render())
results["of the scene's size"] = btb.FinalRenderer(mode="rgb").camera.shape == (480, 640)

# The compositor is part of F12.
if IS_GROUP:
    tree = scene.compositing_node_group = bpy.data.node_groups.new("Compositing", "CompositorNodeTree")
    tree.interface.new_socket("Image", in_out="OUTPUT", socket_type="NodeSocketColor")
    end = tree.nodes.new("NodeGroupOutput")
else:
    scene.use_nodes = True
    tree = scene.node_tree
    tree.nodes.clear()
    end = tree.nodes.new("CompositorNodeComposite")
layers, invert = tree.nodes.new("CompositorNodeRLayers"), tree.nodes.new("CompositorNodeInvert")
tree.links.new(layers.outputs["Image"], invert.inputs["Color"])
tree.links.new(invert.outputs["Color"], end.inputs["Image"])
shoot("composited", mode="rgb", dtype=np.float32)
if IS_GROUP:
    scene.compositing_node_group = None
else:
    scene.use_nodes = False


def refused(key, error=ConfigurationError, render=False, **options):
    results[key] = "nothing was refused"
    try:
        made = btb.FinalRenderer(camera, **options)
        if render:
            made.render()
    except error as refusal:
        results[key] = str(refusal)


refused("bad mode", mode="bgr")
refused("bad color space", color_space="sRGB")
refused("bad dtype", dtype=np.float64)
refused("float display", color_space="srgb", dtype=np.float32)
refused("bad engine", engine="BLENDER_EEVEE")
camera.shape = (3, WIDTH)
refused("too small", render=True)
camera.shape = (HEIGHT, WIDTH)

# A file may not become larger than this: as when memory is full, some of it is written.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limit[1]))
refused("no memory for light", OutOfSharedMemory, render=True, mode="rgb", dtype=np.float32)
refused("no memory for colors", OutOfSharedMemory, render=True, mode="rgb")
resource.setrlimit(resource.RLIMIT_FSIZE, limit)

np.savez(out, **results)
print("renders", sorted(results), file=sys.stderr)
