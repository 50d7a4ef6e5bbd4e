"""Plays episodes of small simulations, and what else happens between frames; writes what came of them to a JSON file."""

import json
import os
import sys
import tempfile

import bpy

import blendtorch.btb as btb
from blendtorch_shm.errors import ConfigurationError

out = btb.parse_blendtorch_args()[1][0]
VALUES = (0, 2, -2)
results = {}


def clear():
    for obj in list(bpy.data.objects):
        bpy.data.objects.remove(obj)
    scene = bpy.context.scene
    scene.frame_step, scene.use_preview_range = 1, False
    if scene.rigidbody_world:
        bpy.ops.rigidbody.world_remove()


def add(name, **options):
    getattr(bpy.ops.mesh, f"primitive_{name}_add")(**options)
    return bpy.context.view_layer.objects.active


def force_field():
    body = add("plane", size=2, location=(0, 0, 3))
    bpy.ops.rigidbody.world_add()
    bpy.ops.rigidbody.object_add()
    bpy.ops.object.effector_add(type="FORCE")
    field = bpy.context.view_layer.objects.active.field
    return body, lambda value: setattr(field, "strength", 100 * value)


def collider():
    body = add("plane", size=2, location=(0, 0, 1))
    body.modifiers.new("Particles", "PARTICLE_SYSTEM")
    settings = body.particle_systems[0].settings
    settings.count, settings.frame_end, settings.lifetime, settings.normal_factor = 20, 1, 100, -4
    floor = add("plane", size=20)
    floor.modifiers.new("Collision", "COLLISION")
    return body, lambda value: setattr(floor, "location", (0, 0, value / 4))


def cloth():
    body = add("grid", x_subdivisions=3, y_subdivisions=3, size=1)
    body.modifiers.new("Cloth", "CLOTH")
    bpy.ops.object.effector_add(type="FORCE", location=(0, 0, 0.5))
    field = bpy.context.view_layer.objects.active.field
    return body, lambda value: setattr(field, "strength", 20 * value)


def height(body):
    evaluated = body.evaluated_get(bpy.context.evaluated_depsgraph_get())
    if evaluated.particle_systems:
        heights = [particle.location.z for particle in evaluated.particle_systems[0].particles]
    else:
        heights = [(evaluated.matrix_world @ vertex.co).z for vertex in evaluated.to_mesh().vertices]
    return round(sum(heights) / len(heights), 3)


def play(build, values, frames=12, where="pre_animation"):
    clear()
    body, change = build()
    made = []
    animation = btb.AnimationController()
    getattr(animation, where).add(lambda: animation.frameid == 1 and change(values[len(made)]))
    animation.post_animation.add(lambda: made.append(height(body)))
    animation.play(frame_range=(1, frames), num_episodes=len(values), use_animation=False)
    return made


# It was chance whether a change from elsewhere was noticed: in about half of the runs.
for build in (force_field, collider, cloth):
    fresh = [play(build, [value])[0] for value in VALUES]
    played = [play(build, VALUES, where=where) for where in ("pre_animation", "pre_frame") for _ in range(4)]
    results[build.__name__] = {"fresh": fresh, "episodes": played}

# A frame step leaves frames out, but the simulation does not.
clear()
body, change = force_field()
bpy.context.scene.frame_step = 3
frames = []
animation = btb.AnimationController()
animation.pre_animation.add(change, 2)
animation.post_frame.add(lambda: frames.append((animation.frameid, height(body))))
animation.play(frame_range=(1, 12), num_episodes=2, use_animation=False)
results["every third frame"] = frames[:]
bpy.context.scene.frame_step = 1
del frames[:]
animation.play(frame_range=(1, 12), num_episodes=1, use_animation=False)
results["every frame"] = frames[:]

# The preview range is what is played where no range is given.
scene = bpy.context.scene
scene.frame_start, scene.frame_end, scene.use_preview_range = 1, 250, True
scene.frame_preview_start, scene.frame_preview_end = 5, 7
del frames[:]
animation.play(num_episodes=1, use_animation=False)
results["preview"] = [frame for frame, _ in frames]

# What was baked is replayed.
clear()
body, change = force_field()
scene.rigidbody_world.point_cache.frame_end = 12
change(0)
bpy.ops.ptcache.bake_all(bake=True)
scene.frame_set(12)
baked = [height(body)]
animation = btb.AnimationController()
animation.pre_animation.add(lambda: change(2))
animation.post_animation.add(lambda: baked.append(height(body)))
animation.play(frame_range=(1, 12), num_episodes=2, use_animation=False)
results["baked"] = baked

# Instances of one file would share a cache on disk.
folder = tempfile.mkdtemp(dir=os.path.dirname(out))
file = os.path.join(folder, "scene.blend")
clear()
body, change = collider()
bpy.ops.wm.save_as_mainfile(filepath=file, copy=False)
body.particle_systems[0].point_cache.use_disk_cache = True
animation = btb.AnimationController()
animation.play(frame_range=(1, 4), num_episodes=1, use_animation=False)
results["files"] = sorted(name for _, _, names in os.walk(folder) for name in names)

# Handlers may open a file, and the animation goes on in it.
events = []


def note(name):
    events.append((name, animation.frameid))


def open_file(*when):
    if events[-1] == when and events.count(when) == 1:
        bpy.ops.wm.open_mainfile(filepath=file)


for when in (("pre_animation", 1), ("pre_frame", 2), ("post_frame", 2), ("post_animation", 3)):
    animation = btb.AnimationController()
    for name in ("pre_animation", "pre_frame", "post_frame", "post_animation"):
        getattr(animation, name).add(note, name)
        getattr(animation, name).add(open_file, *when)
    del events[:]
    animation.play(frame_range=(1, 3), num_episodes=2, use_animation=False)
    results[f"opened in {when[0]}"] = events[:]
    results[f"range after {when[0]}"] = [bpy.context.scene.frame_start, bpy.context.scene.frame_end]

# Handlers may show another scene in the window.
other = bpy.data.scenes.new("Other")
other.frame_start, other.frame_end = 4, 6
window = bpy.context.window or bpy.context.window_manager.windows[0]
first = bpy.context.scene
first.frame_start, first.frame_end = 1, 3
del events[:]
animation = btb.AnimationController()
animation.pre_animation.add(setattr, window, "scene", other)
animation.post_frame.add(lambda: events.append((bpy.context.scene.name, animation.frameid, other.frame_current)))
results["refused"] = ""
if bpy.context.window is None:  # 3.4, while it starts
    try:
        animation.play(num_episodes=2, use_animation=False)
    except ConfigurationError as error:
        results["refused"] = str(error)
    window.scene = first
    del events[:]
with bpy.context.temp_override(window=window):
    animation.play(num_episodes=2, use_animation=False)
    results["in another scene"] = events[:]
    window.scene = first
results["is told of its window"] = bpy.context.window is not None

# No scene has a range that starts before frame 0.
try:
    btb.AnimationController().play((-3, 1), num_episodes=1, use_animation=False)
except ConfigurationError as error:
    results["negative"] = [str(error), first.frame_start, first.frame_end]

with open(out, "w") as target:
    json.dump(results, target)
print("episodes", sorted(results), file=sys.stderr)
