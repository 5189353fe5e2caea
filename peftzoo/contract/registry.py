"""Finding methods: the folder `methods/`, the entry points `peftzoo.methods`, single files, other libraries.

Only the requested plugin is imported. Another library's methods are named `PREFIX:NAME`: they come from
`get(name)` of the module that is registered for PREFIX under the entry points `peftzoo.libraries`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from peftzoo.contract import former_names
from peftzoo.errors import UserError, unknown

_plugin_files: dict[str, type] = {}
"""Methods from files named on the command line (`--plugin`)."""
LIBRARIES, FORMER_LIBRARIES = "peftzoo.libraries", "peftzoo.neighbours"
"""Groups of entry points."""


def _builtin_methods() -> dict[str, str]:
    """Method name -> module, from the folder `methods/`."""
    import peftzoo.methods

    modules = pkgutil.iter_modules(peftzoo.methods.__path__)
    return {
        m.name.replace("_", "-"): f"peftzoo.methods.{m.name}" for m in modules if not m.name.startswith("_")
    }


def _installed_methods() -> dict[str, EntryPoint]:
    """Method name -> entry point, from installed packages. Raises `UserError` when a name is taken."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group="peftzoo.methods"):
        if point.name in points:
            raise UserError(f'method "{point.name}" comes from two packages: uninstall one of them')
        points[point.name] = point
    clash = sorted(points.keys() & _builtin_methods().keys())
    if clash:
        package = points[clash[0]].dist
        raise UserError(
            f'method "{clash[0]}" of package "{package.name if package else "?"}" is built in: rename it'
        )
    return points


def methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted({*_builtin_methods(), *_installed_methods(), *_plugin_files})


def origin(name: str) -> str:
    """Where a method comes from: `peftzoo`, `package NAME`, or the path of its file.

    A file in a checkout's `methods/` that git does not track is nobody's method but yours: its path is given.
    """
    if name in _plugin_files:
        return str(sys.modules[_plugin_files[name].__module__].__file__)
    if name in (installed := _installed_methods()):
        return f"package {installed[name].dist.name}" if installed[name].dist else "a package"
    return str(_untracked_files().get(name, "peftzoo"))


@cache
def _untracked_files() -> dict[str, Path]:
    """Method name -> its file in `methods/` that git does not track; {} where this is no checkout."""
    import peftzoo.methods

    found: dict[str, Path] = {}
    for folder in map(Path, peftzoo.methods.__path__):
        if not (folder.resolve().parent / ".git").exists():
            continue
        command = ["git", "-c", "core.quotePath=false", "ls-files", "--others", "--", "*.py"]
        with suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10).stdout
            found |= {Path(f).stem.replace("_", "-"): folder / f for f in listed.splitlines() if "/" not in f}
    return found


def get(name: str) -> type:
    """The `Adapter` class of a method. Raises `UserError` with the closest name for an unknown one."""
    if name in _plugin_files:
        return _plugin_files[name]
    if name in (builtin := _builtin_methods()):
        return adapter_in(importlib.import_module(builtin[name]), name)
    if name in (installed := _installed_methods()):
        return _load_entry_point(installed[name])
    if ":" in name:
        return _from_library(name)
    raise unknown("method", name, methods(), see="peftzoo list methods")


def _from_library(name: str) -> type:
    """The class of a method of another library, `PREFIX:NAME`."""
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
    """Load a plugin from a file (this runs its code) and register it under its class's `name`.

    Returns the class. Raises `UserError` for a missing or broken file and for a name that is taken.
    """
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
    if cls.name in {*_builtin_methods(), *_installed_methods()}:
        raise UserError(f'plugin "{path}": the name "{cls.name}" is taken; choose another')
    _plugin_files[cls.name] = cls
    return cls


def adapter_in(module: ModuleType, name: str = "") -> type:
    """The one `Adapter` class that a plugin defines, which must be called `name` if that is given."""
    from peftzoo.contract.adapter import Adapter

    adapters = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Adapter)]
    adapters = [c for c in adapters if c.__module__ == module.__name__ and c.name]
    if len(adapters) != 1:
        raise UserError(
            f"{module.__name__}: a plugin defines one Adapter with a name, this has {len(adapters)}"
        )
    return _checked_name(adapters[0], name)


def _load_entry_point(point: EntryPoint) -> type:
    from peftzoo.contract.adapter import Adapter

    try:
        cls = point.load()
    except Exception as error:
        raise UserError(
            f'method "{point.name}" ({point.value}) cannot be loaded: {type(error).__name__}: {error}'
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise UserError(f'method "{point.name}" ({point.value}) is not an Adapter class')
    return _checked_name(cls, point.name)


def _checked_name(cls: type, name: str) -> type:
    """The class itself. Raises `UserError` when its name differs from the one it was looked up by."""
    if name and cls.name != name:
        raise UserError(f'method "{name}": its class is named "{cls.name}"; file and name must agree')
    return cls
