"""Module names that plugins written before version 0.2 import: they go on working, with one notice."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PLACES = {
    "adapter": "contract", "attention": "contract.attention", "registry": "contract.registry",
    "roles": "contract", "attached": "adapters", "files": "adapters", "given": "adapters",
    "trainer": "adapters", "factors": "kernels", "kernels_fourier": "kernels", "kernels_frozen": "kernels",
    "kernels_kron": "kernels", "kernels_rebuilt": "kernels", "kernels_rotation": "kernels",
    "projections": "kernels", "recent": "kernels", "tensor_train": "kernels", "probe": "models.probe",
    "prune": "models.pruning",
}  # fmt: skip
"""Former module -> where its names are now, both below `peftzoo`."""
RENAMED = {"Recent": "ForwardCache", "Given": "AdapterRef"}
_noticed = False


class _Finder(MetaPathFinder, Loader):
    """Makes a module of a former name, whose attributes are looked up where they are now."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        former = fullname.removeprefix("peftzoo.")
        return ModuleSpec(fullname, self) if former != fullname and former in PLACES else None

    def exec_module(self, module: ModuleType) -> None:
        place = "peftzoo." + PLACES[module.__name__.removeprefix("peftzoo.")]
        _notice(module.__name__, place)
        module.__getattr__ = lambda name: _look_up(place, name)


def _look_up(place: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(place), RENAMED.get(name, name))


def _notice(former: str, place: str) -> None:
    global _noticed
    if not _noticed:
        _noticed = True
        warnings.warn(
            f"{former} is now {place}: import from there (CHANGELOG.md has a table of what moved)",
            FutureWarning,
            stacklevel=3,
        )


def install() -> None:
    """Let Python's import system ask here after all else."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
