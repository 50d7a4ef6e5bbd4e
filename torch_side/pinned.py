"""Shared memory that a CUDA device reads by DMA: it is registered with the driver, which pins its pages.

By the driver's own interface, not the runtime's ``cudaHostRegister`` that torch offers: a registration that fails there leaves
an error behind, which torch raises later, from some innocent kernel of the same thread. The driver keeps no such memory.

Source: CUDA Driver API, Memory Management, ``cuMemHostRegister``.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blendtorch_shm.memory.segment import Segment
from blendtorch_shm.wording import byte_size

log = logging.getLogger("blendtorch")

_FOR_ALL_CONTEXTS = 0x01  # CU_MEMHOSTREGISTER_PORTABLE


class Driver:
    """Registers memory with the CUDA driver. The calling thread has a context, as after any call of ``torch.cuda``.

    Args:
        library: the driver's library, if another than the one that torch uses.

    Raises:
        OSError: there is no driver.
    """

    def __init__(self, library: Any = None) -> None:
        cuda: Any = library or ctypes.CDLL("libcuda.so.1")
        self._register, self._unregister, self._name_of = (
            cuda.cuMemHostRegister_v2,
            cuda.cuMemHostUnregister,
            cuda.cuGetErrorName,
        )
        self._register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._unregister.argtypes = [ctypes.c_void_p]
        self._name_of.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]

    def register(self, address: int, nbytes: int) -> str:
        """Pin these bytes; the driver's name of the error if it cannot, else an empty text."""
        return self._error(self._register(address, nbytes, _FOR_ALL_CONTEXTS))

    def unregister(self, address: int) -> str:
        """Undo the registration that began at `address`; the error, if any."""
        return self._error(self._unregister(address))

    def _error(self, code: int) -> str:
        if not code:
            return ""
        name = ctypes.c_char_p()
        self._name_of(code, ctypes.byref(name))
        return (name.value or b"CUDA error %d" % code).decode()


class _Registered(NamedTuple):
    start: int
    end: int
    segment: Segment
    """Keeps the mapping: memory that is registered must not be unmapped."""
    is_pinned: bool


class Registrations:
    """Registers each piece of shared memory once, when the first array in it is to be copied.

    What cannot be registered (the limit of locked memory, a confidential virtual machine) is copied all the same: the driver
    then does it by way of pinned memory of its own, with the CPU, at a third of the rate.

    Args:
        segments: the shared memory that there is now.
        driver: see :class:`Driver`.
    """

    def __init__(self, segments: Callable[[], Sequence[Segment]], driver: Driver) -> None:
        self._segments = segments
        self._driver = driver
        self._known: list[_Registered] = []
        self._has_warned = False

    def cover(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See to it that the memory of `array` is registered, if it is shared and can be.

        Returns:
            the array, at its address that is registered. One in a reader's own pages (see own_pages.py) has another address, for
            to register those would make copies of them; if it was changed in place, it stays where it is.
        """
        address = _address(array)
        found = self._find(address)
        if found is None:
            self._bring_up_to_date()
            found = self._find(address)
        if found is None or found.start <= address < found.end:
            return array
        own = found.segment.own
        offset = None if own is None else own.offset_of(address)
        if own is None or offset is None or not array.flags.c_contiguous or not own.is_as_shared(offset, array.nbytes):
            return array
        shared: npt.NDArray[Any] = np.ndarray(array.shape, array.dtype, found.segment.view, offset)
        return shared

    def _find(self, address: int) -> _Registered | None:
        for known in self._known:
            own = known.segment.own
            if known.start <= address < known.end or (own is not None and own.offset_of(address) is not None):
                return known
        return None

    def close(self) -> None:
        """Undo all. No copy from here is under way."""
        while self._known:
            self._forget(self._known.pop())

    def _bring_up_to_date(self) -> None:
        present = {id(segment): segment for segment in self._segments()}
        for known in [known for known in self._known if id(known.segment) not in present]:
            self._known.remove(known)  # its messages have all been consumed
            self._forget(known)
        for segment in present.values():
            if not any(known.segment is segment for known in self._known):
                self._register(segment)

    def _register(self, segment: Segment) -> None:
        start = _address(np.frombuffer(segment.view, np.uint8))
        error = self._driver.register(start, segment.nbytes)
        if error and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s (%s) cannot be registered with CUDA: %s. Frames in it reach the device by way of the CPU. Is enough memory "
                "free, and does `ulimit -l` allow to lock so much?",
                segment.name,
                byte_size(segment.nbytes),
                error,
            )
        self._known.append(_Registered(start, start + segment.nbytes, segment, not error))

    def _forget(self, known: _Registered) -> None:
        if known.is_pinned and (error := self._driver.unregister(known.start)):
            log.warning("%s cannot be taken back from CUDA: %s.", known.segment.name, error)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
