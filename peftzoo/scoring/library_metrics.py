"""Metrics of the library `evaluate`, for a task whose metric list has an entry with `hf_evaluate: true`.

Such a metric is code of the Hub. It is loaded only for a run that trusts it (`--trust-task-code`), only when
it is needed, and by its canonical name alone: a path or a folder of this machine is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftzoo.errors import UserError, nearest
from peftzoo.tasks.schema import Task


def names(task: Task) -> list[str]:
    """The task's metrics that come from the library."""
    return [entry["metric"] for entry in task.metric_list if entry.get("hf_evaluate") is True]


def check_trusted(task: Task, trusted: bool) -> None:
    """Raise `UserError` for a library metric by anything but a canonical name, or in a run without trust."""
    for name in names(task):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)):
            raise UserError(
                f'task "{task.name}": metric "{name}" is no canonical name; write one such as rouge '
                "(huggingface.co/evaluate-metric lists them), never a path"
            )
        if task.output_type == "multiple_choice" and task.extra.head is None:
            raise UserError(
                f'task "{task.name}": metric "{name}" of the library evaluate scores generated answers and '
                "heads; a task with choices has acc, acc_norm, f1, mcc and others of lm-eval"
            )
        if not trusted:
            raise UserError(
                f'task "{task.name}": metric "{name}" runs code of the Hub (evaluate-metric/{name}): allow '
                "it with --trust-task-code"
            )


@lru_cache
def load(name: str) -> Callable[..., dict[str, Any]]:
    """The function `compute(predictions=..., references=...)` of a metric, from the Hub or from its cache.

    Raises `UserError` where it cannot be loaded, and where a file or folder of this name in the current
    folder would be run in its place.
    """
    for place in (Path(name), Path(f"{name}.py")):
        if place.exists():
            raise UserError(
                f'metric "{name}": "{place}" in the current folder has its name and would be run in its '
                "place: run the command from another folder"
            )
    import evaluate

    try:
        return evaluate.load(name).compute
    except Exception as error:  # the Hub's code, and whatever it imports
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f'metric "{name}" of the library evaluate cannot be loaded ({reason}): check the name; without a '
            "network it has to be in the cache of a machine that loaded it before"
        ) from None


def for_harness(task: Task) -> list[dict[str, Any]]:
    """The task's metric list for lm-eval: library metrics as functions, averaged over rows by default.

    Raises `UserError` for a name that neither lm-eval nor the entry itself knows.
    """
    import lm_eval.api.metrics  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import metric_registry

    entries = []
    for entry in task.metric_list:
        name = entry["metric"]
        if entry.get("hf_evaluate") is True:
            check_trusted(task, trusted=True)
            entry = {"aggregation": "mean", "higher_is_better": True} | entry | {"metric": _named(name)}
            del entry["hf_evaluate"]
        elif name not in metric_registry:
            raise UserError(
                f'task "{task.name}": unknown metric "{name}": {nearest(str(name), metric_registry.keys())} '
                "a metric of the library evaluate needs hf_evaluate: true"
            )
        entries.append(entry)
    return entries


def _named(name: str) -> Callable[..., Any]:
    """The metric as a function with its own name, by which lm-eval reports it."""
    compute = load(name)

    def metric(**arguments: Any) -> Any:
        return compute(**arguments)

    metric.__name__ = name
    return metric


def compute_head(name: str, predictions: list[float], references: list[float]) -> float | None:
    """The metric of a head's predictions; None where it is not defined.

    Raises `UserError` where the library returns no number of this name.
    """
    labels = all(float(v).is_integer() for v in (*predictions, *references))
    convert = int if labels else float
    result = load(name)(predictions=[*map(convert, predictions)], references=[*map(convert, references)])
    if not isinstance(value := result.get(name), (int, float)):
        raise UserError(f'metric "{name}" gives {", ".join(result)}, and no number called "{name}"')
    return float(value) if math.isfinite(value) else None
