"""Is a record what it says? Its checksums, its outcomes, and the same run once more."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftzoo.errors import UserError
from peftzoo.records import outcomes
from peftzoo.records.schema import Record

TOLERANCE = 0.02
"""Of scores, by default: another device, or other versions, round otherwise."""
COUNTS = ("trainable_params", "head_params", "stored_params", "total_params", "adapter_bytes")


@dataclass(frozen=True)
class Check:
    """One thing that was compared; `good` is None where there was nothing to compare."""

    what: str
    recorded: Any
    found: Any
    good: bool | None


def files(record: Record) -> list[Check]:
    """Checksums, and the score as the outcomes per row give it. `store.read` has refused an edited record."""
    sealed = record.sha256 is not None
    checks = [Check("sha256 of the record", record.sha256, "the same" if sealed else "older", sealed or None)]
    told = (record.examples or {}).get("sha256")
    try:
        sample = outcomes.sample(record)
    except UserError as error:
        return [*checks, Check("outcomes per row", told, str(error).rpartition(": ")[2], False)]
    if told is None:
        return [*checks, Check("outcomes per row", None, "none on record", None)]
    checks.append(Check("outcomes per row", told, "the same", True))
    value = record.result.value if record.result else None
    if sample is None or value is None:
        return [*checks, Check("score of the outcomes", value, "they do not tell", None)]
    near = abs(sample.value() - value) < 1e-4
    return [*checks, Check("score of the outcomes", value, sample.value(), near)]


def request(record: Record, **given: Any) -> Any:
    """What to run for this record again; `given` says what it leaves out (`data`) or is elsewhere now."""
    from peftzoo.runs.plan import Request

    train = {k: v for k, v in record.train_config.items() if k != "precision"}
    asked: dict[str, Any] = {
        "method": record.method, "task": record.task, "model": record.model, "seed": record.seed,
        "options": record.method_config, "train": train, "protocol": record.protocol,
        "precision": record.train_config.get("precision", "auto"), "source": record.data.get("source"),
        "limit": _limit(record.command), "max_new_tokens": record.max_new_tokens, "prune": record.prune,
        "retention": (record.retention or {}).get("task"), "tuning": record.tuning,
        "hold_out": _held(record.data.get("held_out")),
    }  # fmt: skip
    return Request(**asked | {k: v for k, v in given.items() if v is not None})


def _limit(command: str) -> int | None:
    """The one setting that only the command tells: a limit holds for each of several tasks."""
    try:
        words = shlex.split(command)
        return int(words[words.index("--limit") + 1])
    except (ValueError, IndexError):
        return None


def _held(facts: Any) -> tuple[int, int] | None:
    """Of a search's trial: how many training rows of each task it was scored on, and the seed of the draw."""
    try:
        return max(map(int, facts["rows"])), int(facts["seed"])
    except (TypeError, KeyError, ValueError):
        return None


def again(record: Record, wanted: Any, tolerance: float, progress: Callable | None = None) -> list[Check]:
    """Do the run once more, in a folder that is removed, and compare scores and counts."""
    from peftzoo.runs.run import run

    with TemporaryDirectory(prefix="peftzoo-verify-") as folder:
        new, _, _ = run(wanted, Path(folder), force=True, progress=progress)
    if new.status != "ok":
        return [Check("status", record.status, f"{new.status}: {new.reason}", False)]
    moved = _gpu(record) != _gpu(new)  # the id of a run names the kind of device
    checks = [Check("configuration (id)", record.id, new.id, None if moved else record.id == new.id)]
    checks += [_close("score", record.result, new.result, tolerance)]
    rows = (record.result and record.result.rows, new.result and new.result.rows)
    if record.merged_score and record.score and new.score:
        one = _close("unmerged score", record.score, new.score, tolerance)
        checks += [one if record.score.rows == new.score.rows else replace(one, good=None)]
    checks += [Check("rows", *rows, rows[0] == rows[1])]
    for name in COUNTS:
        old, now = getattr(record, name), getattr(new, name)
        checks.append(Check(name.replace("_", " "), old, now, None if old is None else old == now))
    return checks


def _gpu(record: Record) -> bool:
    return not str(record.environment.get("device")).startswith("CPU")


def _close(what: str, old: Any, new: Any, tolerance: float) -> Check:
    a, b = old and old.value, new and new.value
    good = a == b if a is None or b is None else abs(a - b) <= tolerance and old.metric == new.metric
    return Check(f"{what} (within {tolerance:g})", a, b, good)
