"""Task files: YAML that lm-evaluation-harness can load, with what training needs under `metadata.peftzoo`.

A file may include others, and a group file names tasks that are run together.
"""

from __future__ import annotations

import json
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
    LM_EVAL_KEYS,
    Cut,
    Embedded,
    GroupMetadata,
    HeadSpec,
    Protocol,
    Settings,
    Task,
    TaskGroup,
    TaskMetadata,
    TrainSource,
)


def folder() -> Path:
    """The folder of the built-in task files."""
    import peftzoo.benchmarks

    return Path(peftzoo.benchmarks.__path__[0])


@lru_cache
def _paths() -> dict[str, Path]:
    """Paths of task and group files by name; a file whose name begins with _ is only there to be included.

    Raises `UserError` where two files have one name.
    """
    paths: dict[str, Path] = {}
    for path in sorted(folder().rglob("*.yaml")):
        if path.stem.startswith("_"):
            continue
        if path.stem in paths:
            raise UserError(f'two task files are named "{path.stem}": {paths[path.stem].name} and {path}')
        paths[path.stem] = path
    return paths


@lru_cache
def _groups() -> dict[str, tuple[str, ...]]:
    """Groups of tasks: name -> names of the tasks. Raises `UserError` for a member that does not exist."""
    members_of = {}
    for name, path in _paths().items():
        if re.search(r"^group:", path.read_text(encoding="utf-8"), re.MULTILINE):
            members = tuple(_includes.read(path)["task"])
            if missing := [m for m in members if m not in _paths()]:
                raise unknown(f'task of group "{name}"', missing[0], _paths())
            members_of[name] = members
    return members_of


def tasks() -> list[str]:
    """Names of all built-in tasks, sorted."""
    return sorted(_paths().keys() - _groups().keys())


def groups() -> dict[str, tuple[str, ...]]:
    """Groups of tasks that are run together: name -> names of the tasks."""
    return dict(_groups())


@lru_cache
def _jointly_trained(name: str) -> TaskGroup | None:
    """The group `name` if its tasks are trained together (its file has `metadata.peftzoo`), else None."""
    raw = _includes.read(_paths()[name])
    meta = raw.get("metadata") or {}
    if "peftzoo" not in meta:
        return None
    try:
        about = GroupMetadata(**meta["peftzoo"])
    except ValidationError as error:
        raise UserError(
            f'task file "{_paths()[name].name}": {_first_mistake(error, GroupMetadata)}'
        ) from None
    return TaskGroup(name, float(meta.get("version", 1)), about, tuple(map(get, _groups()[name])))


def task_group(name: str) -> TaskGroup:
    """What a run of `name` trains on and is scored on. Raises `UserError` for a group of separate tasks."""
    if name in _groups() and (trained_together := _jointly_trained(name)):
        return trained_together
    task = get(name)
    return TaskGroup(task.name, task.version, task.extra, (task,))


def expand(names: Iterable[str]) -> list[str]:
    """The same names with each group of separate tasks replaced by these, each name once."""

    def members(name: str) -> Iterable[str]:
        separate = name in _groups() and not _jointly_trained(name)
        return (t for member in _groups()[name] for t in members(member)) if separate else (name,)

    return list(dict.fromkeys(t for name in names for t in members(name)))


def is_file(name: str) -> bool:
    """Whether `name` is the path of a task file and not the name of a built-in task."""
    return name.endswith((".yaml", ".yml"))


def get(name: str) -> Task:
    """The task called `name`, or the one in the file `name` when it ends in .yaml or .yml.

    Raises `UserError` for an unknown name, for a group, and for a file that `read` refuses.
    """
    if is_file(name):
        return read(Path(name))
    if name in _groups():
        raise UserError(
            f'"{name}" is a group of {len(_groups()[name])} tasks: name one, or run it with bench'
        )
    if name not in _paths():
        raise unknown("task", name, [*_groups(), *tasks()], see="peftzoo list tasks")
    return _builtin(name)


@lru_cache
def _builtin(name: str) -> Task:
    return read(_paths()[name])


def read(path: Path) -> Task:
    """Load and check one task file. Raises `UserError`, which names the file, the key and what is allowed."""
    raw = _includes.read(path)
    _check_keys(path, "", raw, LM_EVAL_KEYS.split())
    meta = raw.pop("metadata", None)
    if not isinstance(meta, dict):
        raise UserError(f'task file "{path.name}": needs a metadata block with version and peftzoo')
    _check_keys(path, "metadata.", meta, {"version", "peftzoo"})
    if missing := [k for k in ("version", "peftzoo") if k not in meta]:
        what = "a number, raised when the task changes" if missing[0] == "version" else "what training needs"
        raise UserError(
            f'task file "{path.name}": metadata.{missing[0]} is missing: {what}; see CONTRIBUTING.md'
        )
    try:
        return Task(**raw, version=meta["version"], extra=meta["peftzoo"])
    except ValidationError as error:
        raise UserError(f'task file "{path.name}": {_first_mistake(error)}') from None


def _check_keys(path: Path, prefix: str, mapping: dict[Any, Any], allowed: Iterable[str]) -> None:
    """Raise `UserError` for a key that is not allowed, with the nearest one that is; `prefix` stands before
    the key in the message."""
    for key in mapping:
        if key not in allowed:
            hint = nearest(str(key), allowed) or "allowed: " + ", ".join(sorted(allowed))
            raise UserError(f'task file "{path.name}": unknown key "{prefix}{key}": {hint}')


def _first_mistake(error: ValidationError, model: type = Task) -> str:
    """The first of pydantic's errors as one line: key, value and what is allowed."""
    e = error.errors()[0]
    key_in_file = {"extra": "metadata.peftzoo", "version": "metadata.version"}
    loc = e["loc"] if model is Task else ("extra", *e["loc"])
    key = ".".join([key_in_file.get(str(loc[0]), str(loc[0])), *map(str, loc[1:])] if loc else ["file"])
    if e["type"] == "extra_forbidden":
        known = _field_names(e["loc"], model)
        return f'unknown key "{key}": {nearest(str(e["loc"][-1]), known) or "allowed: " + ", ".join(known)}'
    given = f" (given: {e['input']!r})" if e["type"] != "missing" and not isinstance(e["input"], dict) else ""
    return f"key {key}: {e['msg'].removeprefix('Value error, ')}{given}"


def _field_names(loc: tuple[Any, ...], model: type) -> list[str]:
    """Keys that are allowed where pydantic's location `loc` in `model` points to an unknown one."""
    models = {"extra": TaskMetadata, "head": HeadSpec, "embedded": Embedded, "settings": Settings, "cut": Cut,
              "protocols": Protocol, "train": TrainSource}  # fmt: skip
    parent = next((str(name) for name in reversed(loc[:-1]) if str(name) in models), "")
    return list(models.get(parent, model).model_fields)


DIGESTS = Path(__file__).resolve().parent.parent / "assets" / "task_digests.json"
"""Version and digest of every built-in task and group, made by tools/make_task_digests.py."""


@lru_cache
def _digests() -> dict[str, Any]:
    return json.loads(DIGESTS.read_text(encoding="utf-8"))


def is_built_in(name: str, digest: str) -> bool:
    """Whether the task of this name and digest is one that ships with us, as it ships."""
    return _digests().get(name, {}).get("digest") == digest


def digest_for_id(reference: str, task: Task | TaskGroup) -> str | None:
    """The task's digest where a run's id has to tell it; None for a built-in task as it ships.

    `reference` is what the user named. A built-in file that is changed on purpose gets another version, which
    the id has already: so runs from before there were digests keep their ids. The digest of a user's file
    always counts, even if it equals a built-in one's: else its ids would change when the built-in file does.
    """
    if not is_file(reference) and is_built_in(task.name, task.digest):
        return None
    return task.digest


def generator(task: Task):
    """The function `rows(split, n, seed)` of the task's embedded generator.

    Raises `UserError` where it does not exist.
    """
    module, function = task.extra.embedded.rows.split(":")
    try:
        return getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError):
        raise UserError(f'task "{task.name}": its generator {module}:{function} does not exist') from None
