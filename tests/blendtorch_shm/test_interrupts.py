"""Nothing that a signal's handler raises gets lost, wherever it hits."""

import subprocess
import sys

FREE_FRAMES_UNDER_FIRE = """
import signal, time, zmq
from blendtorch_shm.process import interrupts

raised = caught = kept = 0

def interrupt(*_):
    global raised
    raised += 1
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
while kept < 20:
    signal.setitimer(signal.ITIMER_REAL, 0.0002)
    before = raised
    try:
        while raised == before:
            for _ in range(1000):
                zmq.Frame(b"payload")
    except KeyboardInterrupt:
        caught += 1
    try:
        interrupts.raise_kept()
    except KeyboardInterrupt:
        kept += 1
assert raised == caught + kept, (raised, caught, kept)
interrupts.raise_kept()
print("each once")
"""


def test_an_interrupt_while_a_frame_is_freed_is_raised_later_and_nothing_is_printed() -> None:
    program = subprocess.run(
        [sys.executable, "-c", FREE_FRAMES_UNDER_FIRE], capture_output=True, text=True, timeout=100, check=False
    )
    assert (program.returncode, program.stdout, program.stderr) == (0, "each once\n", "")


def test_what_ends_a_program_is_still_printed() -> None:
    code = "from blendtorch_shm.process import interrupts\nraise ValueError('the news')"
    program = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert program.returncode == 1
    assert program.stderr.endswith("ValueError: the news\n")
