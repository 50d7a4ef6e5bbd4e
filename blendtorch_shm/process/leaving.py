"""Leaving in good order: what members of streams do when this process exits, so that no other process takes them for dead.

A child of multiprocessing does not always run ``atexit``; and when it does, its queues may still be sending what they hold. There
we use multiprocessing's own finalizers, with the lowest priority.
"""

from __future__ import annotations

import atexit
import sys
from typing import Protocol

from . import forks


class Member(Protocol):
    """Somebody who leaves."""

    def finish(self) -> None:
        """End everything at once: the process is about to exit."""


_members: dict[
    Member, None
] = {}  # strong references: a member must outlive its leases, even if the user drops its source
_generation = -1


def join(member: Member) -> None:
    """Have `member` finish when this process exits, unless it leaves before. Who joins first finishes first."""
    global _generation
    if _generation != forks.generation:  # the first, or the first after a fork: those of the parent are not ours
        _generation = forks.generation
        _members.clear()
        util = sys.modules.get("multiprocessing.util")
        if util is None:
            atexit.register(_finish_all)
        else:
            util.Finalize(None, _finish_all, exitpriority=-100)
    _members[member] = None


def leave(member: Member) -> None:
    """Forget `member`, which has finished, or never joined."""
    _members.pop(member, None)


def _finish_all() -> None:
    if _generation == forks.generation:
        for member in list(_members):
            member.finish()
