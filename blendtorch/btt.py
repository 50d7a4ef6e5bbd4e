"""For editors and type checkers. What is imported under this name is `torch_side` itself."""

from torch_side import *
