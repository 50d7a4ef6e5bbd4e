"""Constants of the Blender side."""

DEFAULT_TIMEOUTMS = 5_000
"""Patience of a script for its partner in the training process."""
