"""What messages to people have in common."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "message"), counted(0, "message")
    ('1 message', '0 messages')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def byte_size(nbytes: int) -> str:
    """`nbytes` for people."""
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 or nbytes == 0 else f"{nbytes / 2**10:.1f} KiB"
