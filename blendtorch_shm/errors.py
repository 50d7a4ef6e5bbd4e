"""Every error this project raises on purpose.

::

    BlendtorchError
    ├── ConfigurationError (ValueError)     an argument, file or environment variable that cannot work
    │   ├── ObjectGone (ReferenceError)
    │   ├── RecordingNotFound (FileNotFoundError)
    │   └── SocketNotFound (KeyError)
    ├── LaunchError                         instances could not be started
    │   ├── BlenderNotFound
    │   ├── SceneNotFound (FileNotFoundError)
    │   ├── ScriptNotFound (FileNotFoundError)
    │   └── PortInUse
    ├── InstanceDied                        an instance ended while it was still needed
    ├── StreamTimeout (TimeoutError)        nothing arrived within the patience asked for
    ├── StreamClosed                        used after close, or closed while waiting
    ├── SegmentError                        shared memory could not be created, attached or understood
    │   ├── SegmentMissing                  ... because there is none (yet)
    │   └── OutOfSharedMemory               ... because it is full, or a limit leaves no room for it
    ├── OutOfDescriptors (OSError)          this process may not open more files and connections
    ├── PublishError (TypeError)            a value that cannot be published here
    ├── FieldMissing (KeyError)             a field that only some items of a batch have
    ├── RecordingError                      a recording that cannot be written on, or read
    └── WireError                           bytes from another process that are not a valid message
        └── UnreadableMessage               a message that an instance published, and that cannot be opened here

A message says what happened, with the numbers, and what to do about it. Each class is constructible from that one
string, because torch rebuilds a worker's exception that way in the training process.
"""

from __future__ import annotations

import errno

__all__ = [
    "BlenderNotFound",
    "BlendtorchError",
    "ConfigurationError",
    "FieldMissing",
    "InstanceDied",
    "LaunchError",
    "ObjectGone",
    "OutOfDescriptors",
    "OutOfSharedMemory",
    "PortInUse",
    "PublishError",
    "RecordingError",
    "RecordingNotFound",
    "SceneNotFound",
    "ScriptNotFound",
    "SegmentError",
    "SegmentMissing",
    "SocketNotFound",
    "StreamClosed",
    "StreamTimeout",
    "UnreadableMessage",
    "WireError",
]


class BlendtorchError(Exception):
    """Root of all errors raised on purpose by this project."""


class ConfigurationError(BlendtorchError, ValueError):
    """An argument, file or environment variable that cannot work."""


class ObjectGone(ConfigurationError, ReferenceError):
    """An object of Blender's that does not exist any more: it was deleted, or another file was opened."""


class RecordingNotFound(ConfigurationError, FileNotFoundError):
    """There is no recording where one was looked for."""


class SocketNotFound(ConfigurationError, KeyError):
    """The launch has no socket of this name."""

    __str__ = BaseException.__str__  # a KeyError would show its text as a key


class LaunchError(BlendtorchError):
    """Instances could not be started."""


class BlenderNotFound(LaunchError):
    """No Blender executable or bpy module where one was looked for."""


class SceneNotFound(LaunchError, FileNotFoundError):
    """The scene file does not exist."""


class ScriptNotFound(LaunchError, FileNotFoundError):
    """The script file does not exist."""


class PortInUse(LaunchError):
    """A TCP port that an instance should listen on is taken by somebody else."""


class InstanceDied(BlendtorchError):
    """An instance ended while it was still needed."""


class StreamTimeout(BlendtorchError, TimeoutError):
    """Nothing arrived within the patience asked for."""


class StreamClosed(BlendtorchError):
    """Used after close, or closed by another thread while waiting."""


class SegmentError(BlendtorchError):
    """Shared memory could not be created, attached or understood."""

    @classmethod
    def cannot_open(cls, what: str, path: str, error: OSError) -> SegmentError:
        """Something that lies beside a stream, which the kernel did not open."""
        why = " Its launch is over, or its directory was removed." if error.errno == errno.ENOENT else ""
        return cls(f"Cannot open the {what} {path}: {error.strerror}.{why}")


class SegmentMissing(SegmentError):
    """There is no such shared memory, or its creator has not finished it."""


class OutOfSharedMemory(SegmentError):
    """There is no room for a segment: the shared-memory file system is full, or a limit of this process, or of its control group,
    leaves too little.
    """


class OutOfDescriptors(BlendtorchError, OSError):
    """This process may not open more files and connections."""


class PublishError(BlendtorchError, TypeError):
    """A value that cannot be published on this connection."""


class FieldMissing(BlendtorchError, KeyError):
    """A field that only some items of a batch have."""

    __str__ = BaseException.__str__


class RecordingError(BlendtorchError):
    """A recording that cannot be written on (its disk is full, say), or a file that cannot be read as one."""


class WireError(BlendtorchError):
    """Bytes from another process that are not a valid message."""


class UnreadableMessage(WireError):
    """A message that an instance published, and that cannot be opened here: a module is missing, for example. It is lost; whoever
    goes on receives the next one.
    """
