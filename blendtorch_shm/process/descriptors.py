"""File descriptors: whether this process may open enough of them for a stream, and that none is lost to an interrupt.

The former is asked before the stream is opened: without free descriptors ZeroMQ aborts the process, and a source would look for
ever for a stream that it cannot open.
"""

from __future__ import annotations

import contextlib
import errno
import io
import operator
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import OutOfDescriptors


def require(count: int, purpose: str) -> None:
    """See whether this process may have `count` more descriptors.

    Raises:
        OutOfDescriptors: it may not.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):  # raised by a signal's handler, such as a TimeoutError
            raise
        used = limit  # not even one for this
    if used + count > limit:
        raise OutOfDescriptors(
            f"Too many open files: {purpose} needs up to {count} file descriptors, and this process has {used} of the "
            f"{limit} that it may have. Raise the limit (ulimit -n {max(1024, 4 * limit)}; docker run --ulimit "
            f"nofile=65536), or close files and connections."
        )


def opened(opens: Callable[..., Any], *args: Any) -> io.FileIO:
    """The descriptor that `opens(*args)` gives, or has as `fd`, as a file that closes itself when nobody has it.

    A number would be lost for good if an interrupt came before it stood somewhere: Python looks for one after each call. Here is
    one call.

    Args:
        opens: of C, such as ``os.open``.
        args: its arguments.

    Example::

        file = opened(os.open, path, os.O_RDWR | os.O_CLOEXEC)
    """
    results = map(opens, *([argument] for argument in args))
    if isinstance(opens, type):
        results = map(operator.attrgetter("fd"), results)
    return next(map(io.FileIO, results, ["r+"]))


def open_into(fds: list[int], path: str, flags: int) -> None:
    """Open `path`, of whatever kind it is, and append the descriptor to `fds`, in one call of C: see :func:`opened`."""
    fds.extend(map(os.open, [path], [flags]))


def close_all(fds: list[int]) -> None:
    """Close these descriptors, and forget them: each in one call of C, so that none is closed twice or not at all."""
    while fds:
        any(map(os.close, map(list.pop, [fds])))


@contextlib.contextmanager
def held(path: str, flags: int) -> Iterator[int]:
    """A descriptor of `path`, of whatever kind it is, for a while.

    Raises:
        OSError: it cannot be opened.
    """
    fds: list[int] = []
    try:
        open_into(fds, path, flags)
        yield fds[0]
    finally:
        close_all(fds)
