"""What is explored: in every run of the tests, and in `make soak`."""

from __future__ import annotations

from .protocol import Setting

SHORT = {
    # No fault: nobody needs the looks every 50 ms and 0.1 s, not even where users never come back.
    "no fault, numbers alone": Setting(idle_look=False),
    "no fault, three consumers, numbers alone": Setting(consumers=3, messages=2, idle_look=False),
    "no fault, leases end in threads": Setting(messages=2, slots=2, max_ready=1, threads=True, idle_look=False),
    "two streams, numbers alone": Setting(streams=2, messages=1, slots=1, max_ready=1, idle_look=False),
    "a fault at any step": Setting(faults=1),
    "one consumer, in order, two faults at any steps": Setting(consumers=1, faults=2),
}

LONG = {
    "no fault, three consumers, numbers alone, three messages": Setting(consumers=3, messages=3, idle_look=False),
    "no fault, with the looks": Setting(),
    "two streams, a fault at any step": Setting(streams=2, messages=1, slots=1, max_ready=1, faults=1),
    "leases end in threads, a fault at any step": Setting(messages=2, slots=2, max_ready=1, threads=True, faults=1),
    "three consumers, a fault at any step": Setting(consumers=3, messages=1, slots=2, faults=1),
    "two faults at any steps": Setting(messages=3, faults=2),
}
