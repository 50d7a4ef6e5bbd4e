"""Recorded files, under the name that users of blendtorch know."""

from .recording import FileReader, FileRecorder

__all__ = ["FileReader", "FileRecorder"]
