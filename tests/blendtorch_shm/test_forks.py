"""What a forked child does with what it inherits."""

from __future__ import annotations

import os

from blendtorch_shm.process import forks


class _Inherited:
    """Says through a pipe that it has let go, and may fail at that."""

    def __init__(self, pipe: int, *, fails: bool) -> None:
        self._pipe, self._fails = pipe, fails

    def in_child(self) -> None:
        os.write(self._pipe, b".")
        if self._fails:
            raise OSError("no memory")


def test_all_let_go_in_a_forked_child_even_if_some_fail() -> None:
    reading, writing = os.pipe()
    inherited = [_Inherited(writing, fails=number % 2 == 0) for number in range(6)]
    for one in inherited:
        forks.register(one)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b"." * len(inherited)
