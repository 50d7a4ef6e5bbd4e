import pytest

from blender_side.signal import Signal


def test_what_was_bound_comes_before_what_the_invocation_passes():
    calls = []
    signal = Signal()
    signal.add(lambda *args, **kwargs: calls.append((args, kwargs)), "bound", end="!")
    signal.invoke("invoked", sep=",")
    assert calls == [(("bound", "invoked"), {"end": "!", "sep": ","})]


def test_handlers_are_called_in_the_order_they_were_added():
    calls = []
    signal = Signal()
    for i in range(3):
        signal.add(calls.append, i)
    signal.invoke()
    assert calls == [0, 1, 2]


def test_a_removed_handler_is_not_called_even_if_an_equal_one_stays():
    calls = []
    signal = Signal()
    first = signal.add(calls.append, "same")
    signal.add(calls.append, "same")
    signal.remove(first)
    signal.invoke()
    assert calls == ["same"]
    with pytest.raises(ValueError, match="not in list"):
        signal.remove(first)


def test_a_handler_may_remove_itself_while_it_is_called():
    calls = []
    signal = Signal()

    def once():
        calls.append("once")
        signal.remove(handle)

    handle = signal.add(once)
    signal.add(calls.append, "always")
    signal.invoke()
    signal.invoke()
    assert calls == ["once", "always", "always"]


def test_an_exception_reaches_whoever_invoked():
    signal = Signal()
    signal.add(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        signal.invoke()
