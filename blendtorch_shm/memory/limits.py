"""How much more memory this process may have: what its control groups (cgroups), the machine and its resource limits leave.

Asked before a segment is made. Otherwise the kernel answers, and it does so by killing the largest process of the control group,
which mostly is the one that trains. Pages of shared memory are charged to the control group of whoever touches them first: the
producer allocates its rings, so its control groups count, and no reader's. RLIMIT_MEMLOCK and RLIMIT_DATA do not concern shared
memory (nothing is locked, and shared mappings are no data); RLIMIT_FSIZE does, for a segment is a file.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from typing import NamedTuple

from ..wording import byte_size

_RESERVE_NBYTES = 2**27
"""So much of a control group, or an eighth of it, no ring takes: each producer there takes a part of what others left."""
_UNLIMITED = 2**60
"""cgroup v1 says so by the largest multiple of a page."""


def short_of_memory(nbytes: int) -> str:
    """Which control group has no room for `nbytes`, or whether the machine has none, for people; "" if all have.

    Swap space that a control group may use does not count as room: a ring in there would be slower than one with fewer slots.
    """
    for folder, files in _control_groups():
        limits = [limit for name in files.limits if (limit := _number(folder, name)) is not None and limit < _UNLIMITED]
        used = _number(folder, files.used)
        if not limits or used is None:
            continue
        limit = min(limits)
        reserve = min(limit // 8, _RESERVE_NBYTES)
        if _has_room(limit - used, nbytes, reserve):
            continue
        left = max(0, limit - used + _page_cache(folder, files))
        if not _has_room(left, nbytes, reserve):
            how = "docker run --memory=8g; systemd: MemoryMax=; Slurm: --mem="
            return _said(f"the control group {folder}", left, limit, how, reserve)
    machine = _read_sizes("/proc/meminfo", ("MemTotal:", "MemAvailable:", "SwapFree:"))
    left = (machine.get("MemAvailable:", _UNLIMITED) + machine.get("SwapFree:", 0)) * 1024
    if not _has_room(left, nbytes):
        return _said("this machine", left, machine.get("MemTotal:", 0) * 1024)
    return ""


def short_of_address_space(nbytes: int) -> str:
    """Whether this process may not map `nbytes` more (RLIMIT_AS), for people; "" if it may."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    used = _read_sizes("/proc/self/status", ("VmSize:",)).get("VmSize:", 0) * 1024
    left = max(0, limit - used)
    return "" if _has_room(left, nbytes) else _said("the address space of this process", left, limit, "ulimit -v")


def short_of_file_size(nbytes: int) -> str:
    """Whether this process may not make files of `nbytes` (RLIMIT_FSIZE), for people; "" if it may."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY or nbytes <= limit:
        return ""
    return f"this process may make files of {byte_size(limit)} at most. Raise that limit (ulimit -f)"


def _kept(left: int, reserve: int) -> int:
    """What counts as taken: whoever shares the limit will need more memory, too."""
    return min(left, max(left // 4, reserve))


def _has_room(left: int, nbytes: int, reserve: int = 0) -> bool:
    return nbytes <= left - _kept(left, reserve)


def _said(whose: str, left: int, limit: int, how: str = "", reserve: int = 0) -> str:
    remedy = f"Raise that limit ({how})" if how else "End other programs"
    return (
        f"{whose} has {byte_size(left)} left of {byte_size(limit)}, of which {byte_size(_kept(left, reserve))} stay for other "
        f"things. {remedy}"
    )


# -- control groups ---------------------------------------------------------------------------------------------
# https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html


class _Files(NamedTuple):
    """What a version of control groups calls things."""

    limits: tuple[str, ...]
    used: str
    page_cache: tuple[str, ...]  # in memory.stat: counts as used, and makes room; shared memory is no part of it


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def _control_groups(process: str = "/proc/self") -> Iterator[tuple[str, _Files]]:
    """The folders of the control groups that count the memory of a process, each before those that it lies in, as far as they
    can be seen from here. Of both versions, since a machine may have both.
    """
    paths = {}
    for line in _lines(f"{process}/cgroup"):  # 4:memory:/a/b, or for version 2 0::/a/b
        _, controllers, inner = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), inner))
    for line in _lines(f"{process}/mountinfo"):  # 35 31 0:32 /a /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
        mount, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2":
            files, controller = _V2, ""
        elif kind == "cgroup" and "memory" in options.split(","):
            files, controller = _V1, "memory"
        else:
            continue
        root, top = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), name) for name in mount.split()[3:5])
        path = paths.get(controller, root)
        inner = os.path.relpath(path, root)
        if inner.startswith("..") or path.startswith("/.."):  # not to be seen from this container: its topmost must do
            inner = "."
        folder = os.path.normpath(os.path.join(top, inner))
        while True:
            yield folder, files
            if folder == top or len(folder) <= 1:
                break
            folder = os.path.dirname(folder)


def _page_cache(folder: str, files: _Files) -> int:
    return sum(_read_sizes(f"{folder}/memory.stat", files.page_cache).values())


def _number(folder: str, name: str) -> int | None:
    """What such a file says; None without one, or where it says "max"."""
    found = _lines(f"{folder}/{name}")
    return int(found[0]) if found and found[0].isdigit() else None


def _read_sizes(path: str, names: tuple[str, ...]) -> dict[str, int]:
    """Of lines such as "inactive_file 4096" or "MemTotal: 4 kB", the numbers after these names."""
    fields = (line.split() for line in _lines(path))
    return {field[0]: int(field[1]) for field in fields if field and field[0] in names}


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []
