"""For type checkers: `blendtorch.btb` is `blender_side`."""

from blender_side import *
