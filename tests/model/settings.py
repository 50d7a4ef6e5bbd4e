"""What is explored: in every run of the tests, and in `make soak`."""

from __future__ import annotations

from .protocol import Setting

SHORT = {
    # No fault: nobody needs the looks every 50 ms and 0.1 s, not even where users never come back.
    "no fault, numbers alone": Setting(messages=3, slots=2, max_ready=1, idle_look=False),
    "no fault, leases end in threads": Setting(messages=2, slots=2, max_ready=1, threads=True, idle_look=False),
    "a fault at any step": Setting(messages=2, faults=1),
    "one consumer, in order, a fault at any step": Setting(consumers=1, messages=4, faults=1),
}

LONG = {
    "no fault, numbers alone, four messages": Setting(messages=4, idle_look=False),
    "no fault, with the looks": Setting(messages=3),
    "two streams, numbers alone": Setting(streams=2, messages=1, slots=1, max_ready=1, idle_look=False),
    "leases end in threads, a fault at any step": Setting(messages=2, slots=1, max_ready=1, threads=True, faults=1),
    "a fault at any step, three messages": Setting(messages=3, faults=1),
    "two faults at any steps": Setting(messages=1, faults=2),
    "one consumer, in order, two faults at any steps": Setting(consumers=1, messages=4, faults=2),
    "a fault at any step, four messages": Setting(messages=4, faults=1),
}
