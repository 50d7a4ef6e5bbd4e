"""For editors and type checkers. What is imported under this name is `blender_side` itself."""

from blender_side import *
