"""For type checkers: `blendtorch.btt` is `torch_side`."""

from torch_side import *
