"""The import names that blendtorch's users know, and nothing else.

``blendtorch.btt`` *is* :mod:`torch_side` and ``blendtorch.btb`` *is* :mod:`blender_side`: the same module objects,
and so are their submodules (``blendtorch.btt.launcher is torch_side.launcher``). Nothing is imported before it is
asked for.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ALIASES = {"blendtorch.btt": "torch_side", "blendtorch.btb": "blender_side"}


class _AliasImporter(MetaPathFinder, Loader):
    """Answers an import of ``blendtorch.btt.x`` with the module ``torch_side.x``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if ".".join(fullname.split(".")[:2]) in ALIASES:
            return ModuleSpec(fullname, self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system takes what stands in sys.modules now. So it never sees the real module while it fills in
        # a spec, and that module keeps its own __spec__ and __name__ (pickle and reload go by these).
        package, *submodules = module.__name__.split(".")[1:]
        sys.modules[module.__name__] = import_module(".".join([ALIASES[f"blendtorch.{package}"], *submodules]))


# First: the path finder would find torch_side/x.py through the alias's __path__, and load a second copy of it.
sys.meta_path.insert(0, _AliasImporter())
