"""Plays two episodes of falling_cubes.blend.py without rendering, and writes down, as JSON, all corners in each frame."""

import json
import runpy
from pathlib import Path

import bpy
import numpy as np

import blendtorch.btb as btb

_, (script, out) = btb.parse_blendtorch_args()
example = runpy.run_path(script)
cubes = [obj for obj in bpy.data.objects if obj.name.startswith("Cube")]
animation = btb.AnimationController()
corners = []


def note() -> None:
    corners.append(btb.utils.world_coordinates(*cubes).reshape(len(cubes), 8, 3).tolist())


animation.pre_animation.add(example["throw"], cubes, np.random.default_rng(0))
animation.post_frame.add(note)
animation.play(frame_range=(0, 100), num_episodes=2, use_animation=False)
Path(out).write_text(json.dumps(corners))
