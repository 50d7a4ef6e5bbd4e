"""Whether this process may open enough file descriptors for a stream. Asked before the stream is opened: without free descriptors
ZeroMQ aborts the process, and a source would look for ever for a stream that it cannot open.
"""

from __future__ import annotations

import os
import resource

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
    except OSError:  # not even one for this
        used = limit
    if used + count > limit:
        raise OutOfDescriptors(
            f"Too many open files: {purpose} needs up to {count} file descriptors, and this process has {used} of the "
            f"{limit} that it may have. Raise the limit (ulimit -n {4 * limit}; docker run --ulimit "
            f"nofile=65536), or close files and connections."
        )
