"""Messages of a channel that take the place of those before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from blendtorch_shm.errors import StreamClosed
from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.memory.states import State
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.transport.channel import Channel, bind_channel, connect_channels

from ..interruption import everywhere
from .conftest import SOURCES, free_port
from .members import PATIENCE_S, wait_until


@pytest.fixture(params=[False, True], ids=["shared", "tcp"])
def ends(request: pytest.FixtureRequest, twin: Twin) -> Iterator[tuple[Channel, Channel]]:
    """The instance's end, and the trainer's."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    address = Address(endpoint) if request.param else Address(endpoint, twin)
    with contextlib.ExitStack() as opened:
        instance = bind_channel(address, btid=0, timeout_s=PATIENCE_S)
        opened.callback(instance.close, patient=False)
        trainer = connect_channels([address], timeout_s=PATIENCE_S)
        opened.callback(trainer.close, patient=False)
        trainer.send({"first": True})
        assert instance.receive(PATIENCE_S) is not None  # they are connected
        yield instance, trainer


def is_near(channel: Channel) -> bool:
    return not channel.source.explain().startswith("tcp://")


def numbers(channel: Channel) -> list[int]:
    found = []
    while (message := channel.receive(0 if is_near(channel) else 0.05)) is not None:
        found.append(message["i"])
    return found


def test_of_many_messages_the_last_one_is_there(ends: tuple[Channel, Channel], twin: Twin) -> None:
    instance, trainer = ends
    sent = [i for i in range(100) if trainer.supersede({"i": i, "table": np.full(3000, i)})]
    if is_near(trainer):
        assert inspect(SharedPlace(twin.back())).count(State.READY) == 1
        assert numbers(instance) == [99]
    else:  # nothing is sent behind what is on its way
        wait_until(lambda: bool(sent) or trainer.supersede({"i": 99}))
        assert numbers(instance) == (sent or [99])
        wait_until(lambda: trainer.supersede({"i": 100}))
        assert numbers(instance) == [100]


def test_an_instance_may_do_so_too_and_messages_that_are_sent_are_superseded_like_others(
    ends: tuple[Channel, Channel],
) -> None:
    instance, trainer = ends
    instance.send({"i": 0})
    for i in range(1, 100):
        assert instance.supersede({"i": i})
    assert numbers(trainer)[-1] == 99


def test_an_instance_elsewhere_that_is_not_there_yet_gets_the_last_one() -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}")
    with connect_channels([address], timeout_s=0) as trainer:
        for i in range(100):
            assert trainer.supersede({"i": i})
        with bind_channel(address, btid=0, timeout_s=PATIENCE_S) as instance:
            message = instance.receive(PATIENCE_S)
            assert message is not None
            assert message["i"] == 99


@pytest.mark.long
def test_an_interrupt_anywhere_costs_at_most_its_message_and_no_slot(ends: tuple[Channel, Channel], twin: Twin) -> None:
    instance, trainer = ends
    number = 0
    received: list[int] = []

    def supersede() -> None:
        nonlocal number
        number += 1
        trainer.supersede({"i": number, "table": np.full(3000, number)})

    supersede()
    for place in everywhere(supersede, SOURCES):
        if is_near(trainer):
            supersede()
            assert numbers(instance) == [number], place
            for ring in inspect(SharedPlace(twin.back())).rings:
                assert ring.count(State.FREE) == len(ring.slots), place
                assert not ring.locked, place
        else:
            received += numbers(instance)
            assert received == sorted(set(received)), place

    def is_sent() -> bool:
        received.extend(numbers(instance))
        return trainer.supersede({"i": number + 1})

    wait_until(is_sent)
    received += numbers(instance)
    assert received[-1] == number + 1
    assert received == sorted(set(received))


def test_after_the_end_nothing_is_sent(ends: tuple[Channel, Channel]) -> None:
    _, trainer = ends
    trainer.supersede({"i": 0})
    trainer.close(patient=False)
    with pytest.raises(StreamClosed):
        trainer.supersede({"i": 1})
