"""Verifying a recording: each item is compared with the checksum that was written behind it. No item is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blendtorch_shm.errors import RecordingError, RecordingNotFound
from blendtorch_shm.wording import counted

from .files import absolute, files_of
from .old import EXTENSION
from .reader import FileReader


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        path: of the file.
        item: its number in the file; None if it is no item.
        what: what is wrong, with the bytes concerned.
    """

    path: str
    item: int | None
    what: str

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_recording` found.

    Attributes:
        paths: the files that were looked at.
        num_items: items in them, damaged ones included.
        num_unverified: of these, those without a checksum, which an earlier version recorded, or another program packed anew.
        damage: all that is damaged, in the order of the files.
    """

    paths: list[str]
    num_items: int
    num_unverified: int
    damage: list[Damage]

    def total(self) -> str:
        """The numbers, as a sentence."""
        unverified = f", {self.num_unverified} of them without a checksum, not verified" if self.num_unverified else ""
        where = counted(len(self.paths), "file")
        return f"{counted(self.num_items, 'item')} in {where}{unverified}; damaged: {len(self.damage)}."

    def __str__(self) -> str:
        return "\n".join([*map(str, self.damage), self.total()])


def verify_recording(path: str | os.PathLike[str]) -> Verification:
    """Compare every item of a recording with its checksum. Nothing is unpickled.

    Args:
        path: of a file, or the prefix of a recording as in :class:`~torch_side.dataset.FileDataset`.

    Returns:
        how many items there are, and what is damaged. A file without its index counts as damaged, too: its end is missing, or
        its writer was killed, or still writes.

    Raises:
        RecordingNotFound: there is no such recording.
        RecordingError: it is one of blendtorch's (``.btr``), which have no checksums.

    Example::

        found = btt.verify_recording("tmp/cubes")
        assert not found.damage, found
    """
    path = absolute(path)
    paths = [path] if os.path.isfile(path) else files_of(path)
    old = [one for one in paths if one.endswith(EXTENSION)] or ([] if paths else files_of(path, EXTENSION))
    if old:
        raise RecordingError(
            f"{', '.join(old)}: recordings of blendtorch have no checksums. Those that blendtorch-convert writes have."
        )
    if not paths and os.path.lexists(path) and not os.path.isdir(path):
        paths = [path]  # whatever it is, it is not missing
    if not paths:
        raise RecordingNotFound(f"There is no recording {path}_00.tar, nor one with another number.")
    num_items = num_unverified = 0
    damage: list[Damage] = []
    for one in paths:
        try:
            reader = FileReader(one)
        except RecordingError as error:
            damage.append(Damage(one, None, str(error)))
            continue
        with reader:
            num_items += len(reader)
            damage += [Damage(one, None, what) for what in reader.damage_around_items()]
            if not reader.has_checksums:
                num_unverified += len(reader)
                continue
            for index in range(len(reader)):
                try:
                    reader.verify_item(index)
                except RecordingError as error:
                    damage.append(Damage(one, index, str(error)))
    return Verification(paths, num_items, num_unverified, damage)
