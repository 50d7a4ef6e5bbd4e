"""Forked children: what they inherit belongs to their parent.

A child of ``os.fork``, such as a DataLoader worker, has a copy of every object. Objects that hold something the kernel counts (a
lock, a lease) register here; their :meth:`Inherited.in_child` runs in each forked child before anything else. What must be done
in the parent, just before, is registered by :func:`before`.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from . import interrupts


class Inherited(Protocol):
    """An object whose copy in a forked child must not act for the parent."""

    def in_child(self) -> None:
        """Let go of what is the parent's. Runs in the child, right after the fork."""


_registered: weakref.WeakSet[Inherited] = weakref.WeakSet()


def register(inherited: Inherited) -> None:
    """Call ``inherited.in_child()`` in each child that this process forks from now on."""
    _registered.add(inherited)


class Forked(Protocol):
    """An object that has something to do before its process forks."""

    def before_fork(self) -> None:
        """Runs in the parent, right before the fork."""


_before: weakref.WeakSet[Forked] = weakref.WeakSet()


def before(forked: Forked) -> None:
    """Call ``forked.before_fork()`` before each fork of this process."""
    _before.add(forked)


generation = 0
"""How many forks of Python lie between this process and the one that imported this. Compared, it says whether an object is a copy
of a parent's. A process number could not: in another PID name space two processes may have the same one.
"""


def _after_fork_in_child() -> None:
    global generation
    generation += 1
    interrupts.kept.clear()  # it is the parent's
    failed: Exception | None = None
    for inherited in list(_registered):
        try:
            inherited.in_child()
        except Exception as error:  # the others must let go all the same, or the parent would look alive
            failed = error
    if failed is not None:
        raise failed  # Python prints it, and goes on


def _those_before() -> list[Forked]:
    while True:
        try:
            return list(_before)
        except RuntimeError:  # another thread has just registered something
            continue


def _before_fork() -> None:
    try:
        for forked in _those_before():
            forked.before_fork()
    except BaseException as error:  # Python would print it, and go on
        interrupts.keep(error)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
