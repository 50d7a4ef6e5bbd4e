"""Leaving in good order: who must do something when this process exits, so that nobody takes it for one that died.

Children of multiprocessing do not always run ``atexit``, and their queues still send what they hold when it would run: there,
multiprocessing's own finalizers are used, with the lowest priority.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Protocol


class Member(Protocol):
    """Somebody who leaves."""

    def finish(self) -> None:
        """End everything at once: the process is about to exit."""


_members: dict[Member, None] = {}  # strong: a member must outlive what it answers for, whatever the user drops
_pid = 0


def join(member: Member) -> None:
    """Have `member` finish when this process exits, unless it leaves before. Who joins first finishes first."""
    global _pid
    if _pid != os.getpid():  # the first, or the first after a fork: those of the parent are not ours
        _pid = os.getpid()
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
    if os.getpid() == _pid:
        for member in list(_members):
            member.finish()
