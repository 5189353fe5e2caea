"""Mistakes in what a user asks for that can be told in a moment: nothing here imports torch.

A plan does the same checks by the same functions, and those that need the method, the model or the rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from peftzoo.contract import registry
from peftzoo.errors import UserError, not_installed
from peftzoo.models import catalogue
from peftzoo.models.pruning_settings import Pruning
from peftzoo.tasks import sources, task_files
from peftzoo.training import config


def check_installed(package: str) -> None:
    """Raise the `UserError` of a package that only an extra brings and that is not there."""
    if importlib.util.find_spec(package) is None:
        raise not_installed(package)


def check_methods(names: Iterable[str]) -> None:
    """Raise the `UserError` of a method that does not exist; one of another library is not looked up."""
    known = registry.methods()
    for name in names:
        if name not in known and ":" not in name:
            registry.get(name)


def check_tasks(names: Iterable[str]) -> None:
    """Raise the `UserError` of a task that does not exist, or whose file is wrong."""
    known = {*task_files.tasks(), *task_files.groups()}
    for name in names:
        if name not in known:
            task_files.get(name)


def check_data(model: str, source: str | None, data: str | None) -> None:
    """Raise the `UserError` of a source of rows, or a folder of a mirror, that does not exist."""
    sources.select_source(source, model, sources.mirror_folder(data), named=data is not None)


def check_training(train: dict[str, Any], precision: str = "auto") -> None:
    """Raise the `UserError` of a precision, or a training setting, that is out of range; None is no value."""
    config.check_precision(precision)
    given = {k: v for k, v in train.items() if v is not None}
    if (epochs := given.pop("epochs", None)) is not None:
        config.check_epochs(epochs)
    config.checked(given)


def check_model(name: str | None, prune: str | None = None, weights: bool = True) -> None:
    """Raise the `UserError` of a model, or a way of pruning, that does not exist; None is none.

    `weights`: the command needs them, so that a shape is a mistake.
    """
    if name is not None:
        catalogue.check_name(name, weights)
    if prune is not None:
        Pruning.parse(prune)


def check_protocol(name: str | None, tasks: Iterable[str]) -> None:
    """Raise the `UserError` of a protocol that none of the tasks has; None is each task's default."""
    errors = []
    for task in tasks if name is not None else ():
        try:
            task_files.task_group(task).select_protocol(name)
            return
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]
