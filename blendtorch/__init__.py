"""The import names that blendtorch's users know, and nothing else.

``blendtorch.btt`` *is* :mod:`torch_side` and ``blendtorch.btb`` *is* :mod:`blender_side`: the same module objects,
and so are their submodules (``blendtorch.btt.launcher is torch_side.launcher``). Nothing is imported before it is
asked for.
"""

import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

ALIASES = {"blendtorch.btt": "torch_side", "blendtorch.btb": "blender_side"}


class _AliasImporter(MetaPathFinder, Loader):
    """Answers an import of ``blendtorch.btt.x`` with the module ``torch_side.x``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if ".".join(fullname.split(".")[:2]) not in ALIASES:
            return None
        real = util.find_spec(_real_name(fullname))  # its origin becomes __file__ and sys.argv[0] under python -m
        return ModuleSpec(fullname, self, origin=None if real is None else real.origin)

    def exec_module(self, module: ModuleType) -> None:
        # The import system takes what stands in sys.modules now. So it never sees the real module while it fills in
        # a spec, and that module keeps its own __spec__ and __name__ (pickle and reload go by these).
        sys.modules[module.__name__] = import_module(_real_name(module.__name__))

    def get_code(self, fullname: str) -> CodeType | None:
        """What ``python -m`` runs, as ``__main__`` and without importing it. None: there is no such module."""
        real = util.find_spec(_real_name(fullname))
        if real is None or real.submodule_search_locations is not None or not isinstance(real.loader, InspectLoader):
            return None
        return real.loader.get_code(real.name)


def _real_name(fullname: str) -> str:
    package, *submodules = fullname.split(".")[1:]
    return ".".join([ALIASES[f"blendtorch.{package}"], *submodules])


# First: the path finder would find torch_side/x.py through the alias's __path__, and load a second copy of it.
sys.meta_path.insert(0, _AliasImporter())
