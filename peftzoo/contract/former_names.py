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
    "roles": "contract:roles", "attached": "adapters:handle", "files": "adapters:saving",
    "given": "adapters:adapter_refs", "trainer": "adapters:trainer", "factors": "kernels:decompositions",
    "kernels_fourier": "kernels:fourier", "kernels_frozen": "kernels:frozen_cores",
    "kernels_kron": "kernels:kronecker", "kernels_rebuilt": "kernels:rebuilt_weights",
    "kernels_rotation": "kernels:rotation", "projections": "kernels:projections",
    "recent": "kernels:forward_cache", "tensor_train": "kernels:tensor_train", "probe": "models.probe",
    "prune": "models.pruning",
}  # fmt: skip
"""Former module -> where its names are now, both below `peftzoo`; after a colon the file of a room whose
names are imported from the room itself."""
RENAMED = {
    "Recent": "ForwardCache", "Given": "AdapterRef", "follow_mode": "sync_training_mode",
    "Kept": "SavedLayer", "Whole": "TrainableModule", "Hooks": "HookCallback", "HOW": "CRITERIA",
}  # fmt: skip
_noticed = False


class _Finder(MetaPathFinder, Loader):
    """Import hook: makes a module under a former name, whose attributes are looked up at their new place."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        former = fullname.removeprefix("peftzoo.")
        return ModuleSpec(fullname, self) if former != fullname and former in PLACES else None

    def exec_module(self, module: ModuleType) -> None:
        place = "peftzoo." + PLACES[module.__name__.removeprefix("peftzoo.")]
        notice(f"{module.__name__} is now {place.partition(':')[0]}: import from there")
        module.__getattr__ = lambda name: _look_up(place.replace(":", "."), name)


def _look_up(place: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(place), RENAMED.get(name, name))


def notice(text: str) -> None:
    """Warn of a former name, once in a process; the warning names the line that uses it."""
    global _noticed
    if not _noticed:
        _noticed = True
        warnings.warn(f"{text} (CHANGELOG.md has a table of what moved)", FutureWarning, stacklevel=3)


def install() -> None:
    """Append the finder to `sys.meta_path`, once: it is asked after all others."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
