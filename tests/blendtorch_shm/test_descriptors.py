"""Whether enough descriptors are free, asked while signals come."""

import errno
import os
from typing import Any

import pytest

from blendtorch_shm.errors import OutOfDescriptors
from blendtorch_shm.process import descriptors


def raises(error: Exception) -> Any:
    def listdir(_: str) -> list[str]:
        raise error

    return listdir


def test_what_a_signal_handler_raises_is_not_taken_for_a_lack_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", raises(TimeoutError("ten seconds are over")))
    with pytest.raises(TimeoutError, match="ten seconds are over"):
        descriptors.require(1, "this")


def test_not_even_one_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", raises(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OutOfDescriptors, match="this needs up to 1 file descriptors"):
        descriptors.require(1, "this")
