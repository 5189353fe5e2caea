"""Task files: YAML that lm-evaluation-harness can load, with what training needs under `metadata.peftzoo`.

A file may include others, and a group file names tasks that are run together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftzoo.errors import UserError, nearest, unknown
from peftzoo.tasks import _includes
from peftzoo.tasks.schema import (
    HARNESS,
    Cut,
    Embedded,
    Extra,
    HeadSpec,
    Protocol,
    Settings,
    Task,
    TaskGroup,
    Together,
    TrainSource,
)


def folder() -> Path:
    import peftzoo.benchmarks

    return Path(peftzoo.benchmarks.__path__[0])


@lru_cache
def _files() -> dict[str, Path]:
    """Task and group files by name; a file whose name begins with _ is only there to be included."""
    found: dict[str, Path] = {}
    for path in sorted(folder().rglob("*.yaml")):
        if path.stem.startswith("_"):
            continue
        if path.stem in found:
            raise UserError(f'two task files are named "{path.stem}": {found[path.stem].name} and {path}')
        found[path.stem] = path
    return found


@lru_cache
def _groups() -> dict[str, tuple[str, ...]]:
    found = {}
    for name, path in _files().items():
        if re.search(r"^group:", path.read_text(encoding="utf-8"), re.MULTILINE):
            members = tuple(_includes.read(path)["task"])
            if foreign := [m for m in members if m not in _files()]:
                raise unknown(f'task of group "{name}"', foreign[0], _files())
            found[name] = members
    return found


def tasks() -> list[str]:
    """Names of all built-in tasks, sorted."""
    return sorted(_files().keys() - _groups().keys())


def groups() -> dict[str, tuple[str, ...]]:
    """Groups of tasks that are run together: name -> names of the tasks."""
    return dict(_groups())


@lru_cache
def _together(name: str) -> TaskGroup | None:
    """The group as one course, if its file says that its tasks are trained together."""
    raw = _includes.read(_files()[name])
    meta = raw.get("metadata") or {}
    if "peftzoo" not in meta:
        return None
    try:
        about = Together(**meta["peftzoo"])
    except ValidationError as error:
        raise UserError(f'task file "{_files()[name].name}": {_first(error, Together)}') from None
    return TaskGroup(name, float(meta.get("version", 1)), about, tuple(map(get, _groups()[name])))


def task_group(name: str) -> TaskGroup:
    """What a run of `name` trains on and is scored on. Raises `UserError` for a group of separate tasks."""
    if name in _groups() and (found := _together(name)):
        return found
    task = get(name)
    return TaskGroup(task.name, task.version, task.extra, (task,))


def expand(names: Iterable[str]) -> list[str]:
    """The same names with each group of separate tasks replaced by these, each name once."""

    def members(name: str) -> Iterable[str]:
        split = name in _groups() and not _together(name)
        return (t for member in _groups()[name] for t in members(member)) if split else (name,)

    return list(dict.fromkeys(t for name in names for t in members(name)))


def is_file(name: str) -> bool:
    """Whether this names a task file and not a built-in task."""
    return name.endswith((".yaml", ".yml"))


def get(name: str) -> Task:
    """The task called `name`, or the one in the file `name` when it ends in .yaml."""
    if is_file(name):
        return read(Path(name))
    if name in _groups():
        raise UserError(
            f'"{name}" is a group of {len(_groups()[name])} tasks: name one, or run it with bench'
        )
    if name not in _files():
        raise unknown("task", name, [*_groups(), *tasks()], see="peftzoo list tasks")
    return _builtin(name)


@lru_cache
def _builtin(name: str) -> Task:
    return read(_files()[name])


def read(path: Path) -> Task:
    """Load and check one task file. Raises `UserError` with file, key and what is allowed."""
    raw = _includes.read(path)
    _known(path, "", raw, HARNESS.split())
    meta = raw.pop("metadata", None)
    if not isinstance(meta, dict):
        raise UserError(f'task file "{path.name}": needs a metadata block with version and peftzoo')
    _known(path, "metadata.", meta, {"version", "peftzoo"})
    if missing := [k for k in ("version", "peftzoo") if k not in meta]:
        what = "a number, raised when the task changes" if missing[0] == "version" else "what training needs"
        raise UserError(
            f'task file "{path.name}": metadata.{missing[0]} is missing: {what}; see CONTRIBUTING.md'
        )
    try:
        return Task(**raw, version=meta["version"], extra=meta["peftzoo"])
    except ValidationError as error:
        raise UserError(f'task file "{path.name}": {_first(error)}') from None


def _known(path: Path, place: str, given: dict[Any, Any], allowed: Iterable[str]) -> None:
    """Refuse a key that is not allowed, with the nearest one that is."""
    for key in given:
        if key not in allowed:
            hint = nearest(str(key), allowed) or "allowed: " + ", ".join(sorted(allowed))
            raise UserError(f'task file "{path.name}": unknown key "{place}{key}": {hint}')


def _first(error: ValidationError, owner: type = Task) -> str:
    """The first mistake, as key, value and what is allowed."""
    e = error.errors()[0]
    ours = {"extra": "metadata.peftzoo", "version": "metadata.version"}
    place = e["loc"] if owner is Task else ("extra", *e["loc"])
    key = ".".join([ours.get(str(place[0]), str(place[0])), *map(str, place[1:])] if place else ["file"])
    if e["type"] == "extra_forbidden":
        known = _fields(e["loc"], owner)
        return f'unknown key "{key}": {nearest(str(e["loc"][-1]), known) or "allowed: " + ", ".join(known)}'
    given = f" (given: {e['input']!r})" if e["type"] != "missing" and not isinstance(e["input"], dict) else ""
    return f"key {key}: {e['msg'].removeprefix('Value error, ')}{given}"


def _fields(loc: tuple[Any, ...], owner: type) -> list[str]:
    owners = {"extra": Extra, "head": HeadSpec, "embedded": Embedded, "settings": Settings, "cut": Cut,
              "protocols": Protocol, "train": TrainSource}  # fmt: skip
    above = next((str(name) for name in reversed(loc[:-1]) if str(name) in owners), "")
    return list(owners.get(above, owner).model_fields)


def generator(task: Task):
    """The function `rows(split, n, seed)` of the task's embedded generator."""
    module, function = task.extra.embedded.rows.split(":")
    try:
        return getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError):
        raise UserError(f'task "{task.name}": its generator {module}:{function} does not exist') from None
