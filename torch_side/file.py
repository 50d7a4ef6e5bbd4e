"""Recorded files, under the name that users of blendtorch know."""

from .recordings.reader import FileReader
from .recordings.recorder import FileRecorder

__all__ = ["FileReader", "FileRecorder"]
