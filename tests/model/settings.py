"""What is explored: in every run of the tests, and in `make soak`.

A million states take about 1.3 s of a core and 60 MB: the largest setting of every run 14 s and 0.65 GB, the largest of all 51 s
and 2.1 GB.
"""

from __future__ import annotations

from .protocol import Setting

SHORT = {
    # No fault: nobody needs the looks every 50 ms and 0.1 s, not even where users never come back.
    # 884 234 states, 2 553 289 steps
    "no fault, numbers alone": Setting(idle_look=False),
    # 1 764 191 states, 6 438 541 steps
    "no fault, three consumers, numbers alone": Setting(consumers=3, messages=2, idle_look=False),
    # 224 857 states, 802 346 steps
    "no fault, leases end in threads": Setting(messages=2, slots=2, max_ready=1, threads=True, idle_look=False),
    # 546 867 states, 1 798 119 steps
    "two streams, numbers alone": Setting(streams=2, messages=1, slots=1, max_ready=1, idle_look=False),
    # 10 855 764 states, 41 223 914 steps
    "a fault at any step": Setting(faults=1),
    # 681 108 states, 2 631 287 steps
    "consumers close and leave, leases end in threads": Setting(
        messages=2, slots=2, max_ready=1, threads=True, faults=1, kinds=("consumer leaves",)
    ),
    # 2 100 669 states, 9 065 876 steps
    "a consumer leaves, and a fault at any step": Setting(
        messages=2, slots=2, max_ready=1, faults=2, kinds=("consumer leaves", "consumer dies", "consumer interrupted")
    ),
    # 87 456 states, 261 262 steps
    "one consumer, in order, two faults at any steps": Setting(consumers=1, faults=2),
}

LONG = {
    # 35 641 107 states, 134 012 180 steps
    "no fault, three consumers, numbers alone, three messages": Setting(consumers=3, messages=3, idle_look=False),
    # 1 014 759 states, 3 022 679 steps
    "no fault, with the looks": Setting(),
    # 12 922 370 states, 55 562 655 steps
    "two streams, a fault at any step": Setting(streams=2, messages=1, slots=1, max_ready=1, faults=1),
    # 3 307 699 states, 16 198 072 steps
    "leases end in threads, a fault at any step": Setting(messages=2, slots=2, max_ready=1, threads=True, faults=1),
    # 1 125 677 states, 5 531 316 steps
    "three consumers, a fault at any step": Setting(consumers=3, messages=1, slots=2, faults=1),
    # 8 072 828 states, 45 140 494 steps
    "a consumer leaves, leases end in threads, a fault at any step": Setting(
        messages=2,
        slots=2,
        max_ready=1,
        threads=True,
        faults=2,
        kinds=("consumer leaves", "consumer dies", "consumer interrupted"),
    ),
    # 14 754 911 states, 68 250 314 steps
    "two faults at any steps": Setting(messages=3, faults=2),
}
