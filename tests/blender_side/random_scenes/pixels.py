"""What pictures of random scenes have in common, inside Blender and outside."""

WIDTH, HEIGHT = 64, 48
FINER = 4
"""How many pixels of a picture of an object alone are one of the others, each way."""
PALETTE = [
    (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 0.25, 0), (0, 1, 0.25), (0.25, 0, 1),
    (0.25, 0.25, 0.25), (1, 0.25, 0.25), (0.25, 1, 0.25),
]  # fmt: skip
"""Light by number of an object, from 1 on: what a picture shows can be told from its colours."""
