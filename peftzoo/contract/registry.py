"""Finding methods: the folder `methods/`, the entry points `peftzoo.methods`, single files, other libraries.

Only the plugin that is asked for is imported. Another library's methods are named `PREFIX:NAME`: the module
that is registered for PREFIX under the entry points `peftzoo.libraries` is asked by its function `get(name)`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from peftzoo.contract import former_names
from peftzoo.errors import UserError, unknown

_extra: dict[str, type] = {}
"""Methods from files named on the command line (`--plugin`)."""
LIBRARIES, FORMER_LIBRARIES = "peftzoo.libraries", "peftzoo.neighbours"
"""Groups of entry points."""


def _builtin() -> dict[str, str]:
    import peftzoo.methods

    found = pkgutil.iter_modules(peftzoo.methods.__path__)
    return {
        m.name.replace("_", "-"): f"peftzoo.methods.{m.name}" for m in found if not m.name.startswith("_")
    }


def _outside() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="peftzoo.methods"):
        if point.name in found:
            raise UserError(f'method "{point.name}" comes from two packages: uninstall one of them')
        found[point.name] = point
    clash = sorted(found.keys() & _builtin().keys())
    if clash:
        package = found[clash[0]].dist
        raise UserError(
            f'method "{clash[0]}" of package "{package.name if package else "?"}" is built in: rename it'
        )
    return found


def methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted({*_builtin(), *_outside(), *_extra})


def get(name: str) -> type:
    """The `Adapter` class called `name`. Raises `UserError` with the nearest name when there is none."""
    if name in _extra:
        return _extra[name]
    if name in (builtin := _builtin()):
        return adapter_in(importlib.import_module(builtin[name]), name)
    if name in (outside := _outside()):
        return _loaded(outside[name])
    if ":" in name:
        return _from_library(name)
    raise unknown("method", name, methods(), see="peftzoo list methods")


def _from_library(name: str) -> type:
    prefix = name.partition(":")[0].lower()
    former = {p.name: p.value for p in entry_points(group=FORMER_LIBRARIES)}
    modules = former | {p.name: p.value for p in entry_points(group=LIBRARIES)}
    if prefix not in modules:
        raise unknown("library", prefix, modules)
    if former.get(prefix) == modules[prefix]:
        former_names.notice(f'the entry points "{FORMER_LIBRARIES}" are now "{LIBRARIES}": rename the group')
    module = importlib.import_module(modules[prefix])
    return module.get(prefix + name[len(prefix) :])


def add_file(path: str | Path) -> type:
    """Load a plugin from a file (this runs its code); the method is known by its class's `name`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'plugin "{path}": no such file')
    builtin = importlib.util.find_spec("peftzoo.methods").submodule_search_locations
    if path.resolve().parent in {Path(p).resolve() for p in builtin}:
        return get(path.stem.replace("_", "-"))
    spec = importlib.util.spec_from_file_location(f"peftzoo_plugin_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f'plugin "{path}": {type(error).__name__}: {error}') from error
    cls = adapter_in(module)
    if cls.name in {*_builtin(), *_outside()}:
        raise UserError(f'plugin "{path}": the name "{cls.name}" is taken; choose another')
    _extra[cls.name] = cls
    return cls


def adapter_in(module: ModuleType, name: str = "") -> type:
    """The one `Adapter` class that a plugin defines."""
    from peftzoo.contract.adapter import Adapter

    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Adapter)]
    own = [c for c in own if c.__module__ == module.__name__ and c.name]
    if len(own) != 1:
        raise UserError(f"{module.__name__}: a plugin defines one Adapter with a name, this has {len(own)}")
    return _checked(own[0], name)


def _loaded(point: EntryPoint) -> type:
    from peftzoo.contract.adapter import Adapter

    try:
        cls = point.load()
    except Exception as error:
        raise UserError(
            f'method "{point.name}" ({point.value}) cannot be loaded: {type(error).__name__}: {error}'
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise UserError(f'method "{point.name}" ({point.value}) is not an Adapter class')
    return _checked(cls, point.name)


def _checked(cls: type, name: str) -> type:
    if name and cls.name != name:
        raise UserError(f'method "{name}": its class is named "{cls.name}"; file and name must agree')
    return cls
