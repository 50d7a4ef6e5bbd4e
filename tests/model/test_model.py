"""The protocol of a stream, explored to the end: see protocol.py for what the model is, and mistakes.py for what it can find."""

from dataclasses import replace

import pytest

from .explore import Violation, explore
from .mistakes import MISTAKES, Mistake
from .protocol import Protocol, Setting
from .settings import SHORT


@pytest.mark.parametrize("setting", SHORT.values(), ids=SHORT)
def test_every_order_of_steps_delivers_each_message_once_and_leaves_nobody_waiting(setting: Setting) -> None:
    found = explore(Protocol(setting))
    print(found)
    assert found.states > 1000  # it did go on


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_model_finds_a_planted_mistake(mistake: type[Mistake]) -> None:
    with pytest.raises(Violation, match=mistake.finds):
        explore(mistake())


def test_a_lost_number_is_healed_by_the_look_every_50_ms_and_by_nothing_else() -> None:
    setting = Setting(messages=1, faults=1, kinds=("numbers",))
    explore(Protocol(setting))
    with pytest.raises(Violation, match="sleeps while"):
        explore(Protocol(replace(setting, idle_look=False)))
