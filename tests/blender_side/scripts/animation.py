"""Plays an animation as the arguments say and writes down, as JSON, which signals came when."""

import json
import sys

import bpy

import blendtorch.btb as btb

_, rest = btb.parse_blendtorch_args()
out, scenario = rest[:2]
events = []
anim = btb.AnimationController()
cube = bpy.data.objects["Cube"]


def evaluated_x() -> float:
    return round(cube.evaluated_get(bpy.context.evaluated_depsgraph_get()).matrix_world.translation.x, 3)


def note(name: str) -> None:
    events.append((name, anim.frameid))


def pre_frame() -> None:
    note("pre_frame")
    cube.location.x = anim.frameid + 0.5
    if scenario == "raise in pre_frame" and anim.frameid == 2:
        raise RuntimeError("boom")
    if scenario == "set a frame" and anim.frameid == 2:
        bpy.context.scene.frame_set(2)


def post_frame() -> None:
    note("post_frame")
    assert evaluated_x() == anim.frameid + 0.5, "what pre_frame changed is not evaluated"
    if scenario == "raise in post_frame" and anim.frameid == 2:
        raise RuntimeError("boom")
    if scenario == "exit" and anim.frameid == 2:
        sys.exit(5)
    if scenario == "rewind" and anim.frameid == 2 and len(events) < 12:
        anim.rewind()


def post_play() -> None:
    note("post_play")
    events.append(("point caches", [cache.frame_end for cache in caches]))
    with open(out, "w") as file:
        json.dump({"returned": returned, "window": not bpy.app.background, "events": events}, file)


bpy.ops.object.select_all(action="DESELECT")
cube.modifiers.new("Cloth", "CLOTH").point_cache.name = "cache"
bpy.context.view_layer.objects.active = bpy.data.objects["Floor"]
bpy.ops.rigidbody.object_add(type="PASSIVE")
caches = [bpy.context.scene.rigidbody_world.point_cache, cube.modifiers["Cloth"].point_cache]
cube.modifiers["Cloth"].show_viewport = False

anim.pre_play.add(note, "pre_play")
anim.pre_animation.add(note, "pre_animation")
anim.pre_frame.add(pre_frame)
anim.post_frame.add(post_frame)
anim.post_animation.add(note, "post_animation")
anim.post_play.add(post_play)

returned = False
anim.play(frame_range=(1, 3), num_episodes=2, use_animation=scenario != "blocking")
returned = True
