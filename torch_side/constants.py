"""Constants of the training side."""

DEFAULT_TIMEOUTMS = 120_000
"""Patience for the next message: Blender starts, and its first EEVEE frame may compile shaders for tens of seconds."""
