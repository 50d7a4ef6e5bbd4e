"""What becomes of objects that a script keeps when Blender replaces the file's data under them.

Opening a file, reverting, undo and redo free everything that `bpy.data` had. Python's references to data-blocks become invalid
then; those to parts of them, such as a viewport of a screen, become wild pointers; addresses name something else. What
keeps such things, keeps the number of the *generation* with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bpy
from bpy.app.handlers import persistent

from blendtorch_shm.errors import ConfigurationError, ObjectGone

_counts = {"load": 0, "undo": 0}


def generation() -> tuple[int, int]:
    """Which set of data Blender has now: another value after each file that was opened, and each undo and redo.

    So it is when nobody knows whether there was one, because a script cleared Blender's lists of handlers.
    """
    if not listen(_loaded, "load_post"):
        _loaded()
    if not listen(_undone, "undo_post", "redo_post"):
        _undone()
    return _counts["load"], _counts["undo"]


class Reference:
    """Refers to one of the user's data-blocks: follows it when it is renamed, and finds it by its name when it was replaced.

    Args:
        block: a `bpy.types.Object` or `bpy.types.Collection`.

    Raises:
        ObjectGone: it was deleted, or another file was opened.
    """

    def __init__(self, block: Any) -> None:
        self._kind = "objects" if is_a(bpy.types.Object, block) else "collections"
        self._block = block
        self._generation = generation()
        try:
            self._name, self._full_name = str(block.name), str(block.name_full)
        except ReferenceError as error:
            raise gone(error) from error
        self._library = block.library.filepath if block.library else None

    @property
    def name(self) -> str:
        """What it is called, or was last."""
        return self._name

    @property
    def key(self) -> tuple[bool, str]:
        """Whether it is an object, and its full name, which no other one has; those that it had last, if it is gone."""
        block = self.get()
        if block is not None:
            self._full_name = str(block.name_full)
        return self._kind == "objects", self._full_name

    def get(self) -> Any:
        """The data-block. None: it was deleted, or did not exist yet at the step that undo led to.

        Raises:
            ConfigurationError: another file was opened, and has none of this name.
        """
        now = generation()
        try:
            if now == self._generation and self._block is not None:
                self._name = str(self._block.name)
                return self._block
        except ReferenceError:  # deleted, or its library was reloaded
            pass
        self._block = getattr(bpy.data, self._kind).get((self._name, self._library))
        if self._block is None and now[0] != self._generation[0]:
            raise ConfigurationError(
                f"Another file was opened, and there is no {self._name!r} among its {self._kind}: after opening a file, make"
                " what refers to its contents (GroundTruth, Camera, renderers) anew."
            )
        self._generation = now
        return self._block


def gone(error: ReferenceError) -> ObjectGone:
    """What to say where Blender says that something does not exist any more that a script gave us."""
    return ObjectGone(
        f"This object is gone: it was deleted, or another file was opened, or undo made all objects anew ({error}). Get objects"
        " anew after that, as in cube = bpy.data.objects['Cube']."
    )


def is_a(kind: type | tuple[type, ...], block: Any) -> bool:
    """Whether something is of a type. 3.4 asks the object itself, which may be gone.

    Raises:
        ObjectGone: it is.
    """
    try:
        return isinstance(block, kind)
    except ReferenceError as error:
        raise gone(error) from error


def listen(handler: Callable[..., None], *names: str) -> bool:
    """See to it that Blender calls a function of ours. Ask before each use of what it notes: scripts clear lists of handlers.

    Args:
        handler: the function, `bpy.app.handlers.persistent`.
        names: of the lists of `bpy.app.handlers` that it belongs to.

    Returns:
        whether it was in all of them. If not, it has missed what happened since it was last asked for.
    """
    missing = [handlers for name in names if handler not in (handlers := getattr(bpy.app.handlers, name))]
    for handlers in missing:
        handlers.insert(0, handler)  # before those of the user's, which may render
    return not missing


@persistent  # type: ignore[untyped-decorator]
def _loaded(*_: Any) -> None:
    _counts["load"] += 1


@persistent  # type: ignore[untyped-decorator]
def _undone(*_: Any) -> None:
    _counts["undo"] += 1


generation()
