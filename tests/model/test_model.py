"""The protocol of a stream, explored to the end: see protocol.py for what the model is, and mistakes.py for what it can find."""

import os
from dataclasses import replace

import pytest

from . import compiled, explore
from .compiled import Untranslatable
from .explore import Violation
from .mistakes import MISTAKES, Mistake, NoLookAfterSayingAsleep
from .protocol import Broken, Protocol, Setting
from .settings import SHORT

pytestmark = pytest.mark.timeout(600)  # for busy machines: alone on a core, the longest takes a quarter of a minute
SMALL = Setting(consumers=1, messages=2, slots=2, max_ready=1, faults=1)


@pytest.fixture(autouse=True)
def needs_a_c_compiler() -> None:
    if compiled.compiler() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("There is no C compiler (cc or gcc).")


@pytest.mark.parametrize("setting", SHORT.values(), ids=SHORT)
def test_every_order_of_steps_delivers_each_message_once_and_leaves_nobody_waiting(setting: Setting) -> None:
    found = compiled.explore(Protocol(setting))
    print(found)
    assert found.states > 10_000  # it did go on


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_model_finds_a_planted_mistake(mistake: type[Mistake]) -> None:
    with pytest.raises(Violation, match=mistake.finds):
        compiled.explore(mistake(), optimises=False)


def test_a_lost_number_is_healed_by_the_look_every_50_ms_and_by_nothing_else() -> None:
    setting = Setting(messages=1, faults=1, kinds=("numbers",))
    compiled.explore(Protocol(setting), optimises=False)
    with pytest.raises(Violation, match="sleeps while"):
        compiled.explore(Protocol(replace(setting, idle_look=False)), optimises=False)


@pytest.mark.parametrize(
    "setting",
    [
        SMALL,
        Setting(messages=1, slots=2, faults=1, kinds=("consumer dies",)),
        Setting(streams=2, consumers=1, messages=1, slots=2, idle_look=False),
        Setting(messages=1, slots=1, max_ready=1, threads=True, faults=1, kinds=("consumer leaves",)),
    ],
    ids=["one consumer", "death", "two streams", "a consumer leaves"],
)
def test_the_model_in_c_takes_the_same_steps_as_in_python(setting: Setting) -> None:
    assert compiled.explore(Protocol(setting), optimises=False)[:2] == explore.explore(Protocol(setting))[:2]


class RaisesAtTheOnlyStep(Protocol):
    """With one consumer, nobody else can take a step there that would show it a moment later."""

    def commit(self, s: bytearray, p: int) -> bool:
        raise Broken("the only step")


@pytest.mark.parametrize("model", [NoLookAfterSayingAsleep(), RaisesAtTheOnlyStep(SMALL)], ids=["at rest", "in a step"])
def test_a_violation_is_the_same_in_c_as_in_python(model: Protocol) -> None:
    with pytest.raises(Violation) as of_python:
        explore.explore(model)
    with pytest.raises(Violation) as of_c:
        compiled.explore(model, optimises=False)
    assert str(of_c.value) == str(of_python.value)


def test_a_value_that_is_too_large_for_its_field_is_an_error() -> None:
    class HasRoomForOneAge(Protocol):
        def largest(self) -> bytes:
            largest = bytearray(super().largest())
            largest[self.age : self.age + self.count] = bytes([1]) * self.count
            return bytes(largest)

    two_ready = replace(SMALL, max_ready=2)
    with pytest.raises(OverflowError, match="Protocol.largest says, one step after\nslots: .*READY age=1"):
        compiled.explore(HasRoomForOneAge(two_ready), optimises=False)


def test_a_method_that_cannot_be_said_in_c_is_an_error_that_names_it() -> None:
    class Sorts(Protocol):
        def published(self, s: bytearray, p: int) -> bool:
            return bool(sorted(s))

    with pytest.raises(Untranslatable, match="Sorts.published: cannot translate 'bool"):
        compiled.explore(Sorts(SMALL), optimises=False)
