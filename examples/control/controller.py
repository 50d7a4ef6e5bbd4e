"""A controller that keeps the pole up: what a policy has to learn, written down by hand. Needs neither Blender nor PyTorch."""

from collections.abc import Sequence


def balance(state: Sequence[float]) -> float:
    """The cart's acceleration, as the environment's action has it, in -1 .. 1.

    It drives the cart to where the pole leans. That also brings it back to the middle: for a cart that is off to the right, or on
    its way there, it goes further right first, until the pole leans to the left.

    Args:
        state: position and speed of the cart, angle and angular speed of the pole.
    """
    position, speed, angle, angular_speed = state
    return max(-1.0, min(1.0, 2.0 * angle + 0.53 * angular_speed + 0.067 * position + 0.13 * speed))
