"""The import names that blendtorch's users know, and nothing else.

``blendtorch.btt`` *is* :mod:`torch_side` and ``blendtorch.btb`` *is* :mod:`blender_side`: the same module objects,
and so are their submodules (``blendtorch.btt.launcher is torch_side.launcher``). Nothing is imported before it is
asked for.

What is loaded from then on calls itself by the name that users know: ``blendtorch.btt.launcher.BlenderLauncher``.
"""

import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, ModuleType

ALIASES = {"blendtorch.btt": "torch_side", "blendtorch.btb": "blender_side"}
_KNOWN_AS = {real: alias for alias, real in ALIASES.items()}
_REMEDIES = {
    "torch": "PyTorch is not installed for this Python: pip install 'blendtorch-shm[torch]'. Where only instances are"
    " launched, it is not needed: import BlenderLauncher and LaunchInfo alone.",
    "gymnasium": "Environments of gymnasium's need it: pip install 'blendtorch-shm[env]'. RemoteEnv and launch_env do not.",
    "bpy": "This runs inside Blender: start the script through BlenderLauncher, or pip install 'blendtorch-shm[blender]'.",
}
"""What to do where a module is missing that only one of the two sides needs."""


class _AliasImporter(MetaPathFinder, Loader):
    """Answers an import of ``blendtorch.btt.x`` with the module ``torch_side.x``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if ".".join(fullname.split(".")[:2]) not in ALIASES:
            return None
        name = _real_name(fullname)
        if name in sys.modules:
            return ModuleSpec(fullname, self, origin=getattr(sys.modules[name], "__file__", None))
        real = util.find_spec(name)  # its origin becomes __file__ and sys.argv[0] under python -m
        return None if real is None else ModuleSpec(fullname, self, origin=real.origin)

    def exec_module(self, module: ModuleType) -> None:
        # The import system takes what stands in sys.modules now. So it never sees the real module while it fills in
        # a spec, and that module keeps its own __spec__ (reload goes by it).
        sys.modules[module.__name__] = import_module(_real_name(module.__name__))

    def get_code(self, fullname: str) -> CodeType | None:
        """What ``python -m`` runs, as ``__main__`` and without importing it. None: there is no such module."""
        real = util.find_spec(_real_name(fullname))
        if real is None or real.submodule_search_locations is not None or not isinstance(real.loader, InspectLoader):
            return None
        return real.loader.get_code(real.name)


class _RealImporter(MetaPathFinder):
    """Finds ``torch_side.x`` where it is, and has it loaded as what users call it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _KNOWN_AS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, InspectLoader):
            spec.loader = _RealLoader(spec.loader)
        return spec


class _RealLoader(InspectLoader):
    """Runs a module under its alias: classes, functions and errors then name themselves by it.

    The alias stands in sys.modules from the start, because pickle, inspect and dataclasses look up there what a class says
    about itself.
    """

    def __init__(self, loader: InspectLoader) -> None:
        self._loader = loader

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        name = module.__spec__.name
        package, dot, submodule = name.partition(".")
        alias = _KNOWN_AS[package] + dot + submodule
        code = self.get_code(name)
        assert code is not None
        module.__name__ = alias
        before = sys.modules.get(alias)
        sys.modules[alias] = module
        try:
            exec(code, module.__dict__)
        except BaseException as error:
            if before is None:
                sys.modules.pop(alias, None)
            else:
                sys.modules[alias] = before
            if isinstance(error, ModuleNotFoundError) and error.name in _REMEDIES:
                error.msg = f"No module named {error.name!r}. {_REMEDIES[error.name]}"
            raise

    def get_code(self, fullname: str) -> CodeType | None:
        return self._loader.get_code(fullname)

    def get_source(self, fullname: str) -> str | None:
        return self._loader.get_source(fullname)

    def is_package(self, fullname: str) -> bool:
        return self._loader.is_package(fullname)


def _real_name(fullname: str) -> str:
    package, *submodules = fullname.split(".")[1:]
    return ".".join([ALIASES[f"blendtorch.{package}"], *submodules])


# First: the path finder would find torch_side/x.py through the alias's __path__, and load a second copy of it.
sys.meta_path[:0] = [_AliasImporter(), _RealImporter()]
