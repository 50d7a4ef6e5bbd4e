"""Keeps triton from crashing an instance that draws with software OpenGL.

Mesa's software OpenGL and triton contain an LLVM each, and where both are of kinds that share symbols, the process crashes when
triton is loaded second. A script that trains does that without knowing: torch.optim imports triton. torch goes on without it
where it cannot be imported, so that is what it is told here, if a forked child that tries is killed.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from importlib import import_module, util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import trial

log = logging.getLogger("blendtorch")

_NAME = "triton"
_ADVICE = (
    "triton crashes this process if it is imported now, after software OpenGL was used: both contain LLVM. torch goes on without"
    " triton. If it is needed (torch.compile on a graphics card), put `import triton` at the top of the script, before the first"
    " renderer is made."
)


class _Guard(MetaPathFinder):
    """Has a child try the import of triton; if that is killed, the import is refused from then on."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        sys.meta_path.remove(self)
        if util.find_spec(_NAME) is None:
            return None
        status, _ = trial.run(lambda: import_module(_NAME))
        if status >= 0:
            return None
        log.warning("%s", _ADVICE)
        refusal = _Refusal()
        sys.meta_path.insert(0, refusal)
        return refusal.find_spec(_NAME)


class _Refusal(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(_NAME, self) if fullname == _NAME else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(_ADVICE, name=_NAME)


@cache
def install() -> None:
    """Watch over the import of triton from now on, unless it is there already."""
    if _NAME not in sys.modules:
        sys.meta_path.insert(0, _Guard())
