"""Verification of a record: its checksums, its outcomes per row, and the same run once more."""

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
"""Default for the largest difference of equal scores: other devices and versions round differently."""
COUNT_FIELDS = ("trainable_params", "head_params", "stored_params", "total_params", "adapter_bytes")


@dataclass(frozen=True)
class Check:
    """One comparison of a recorded with a found value; `good` is None if they could not be compared."""

    what: str
    recorded: Any
    found: Any
    good: bool | None


def check_files(record: Record) -> list[Check]:
    """Check the checksums, and the score against the outcomes per row.

    `store.read` has refused a record that does not match its own checksum.
    """
    sealed = record.sha256 is not None
    checks = [Check("sha256 of the record", record.sha256, "the same" if sealed else "older", sealed or None)]
    recorded_hash = (record.examples or {}).get("sha256")
    try:
        sample = outcomes.sample(record, check_score=False)
    except UserError as error:
        return [*checks, Check("outcomes per row", recorded_hash, str(error).rpartition(": ")[2], False)]
    if recorded_hash is None:
        return [*checks, Check("outcomes per row", None, "none on record", None)]
    checks.append(Check("outcomes per row", recorded_hash, "the same", True))
    value = record.result.value if record.result else None
    if sample is None or value is None:
        return [*checks, Check("score of the outcomes", value, "they do not tell", None)]
    equal = abs(sample.value() - value) < 1e-4
    return [*checks, Check("score of the outcomes", value, sample.value(), equal)]


def request_of(record: Record, **overrides: Any) -> Any:
    """The `plan.Request` that repeats the run of this record.

    `overrides` replaces its fields unless None: what a record leaves out, such as the folder `data`, and
    names that differ on this machine.
    """
    from peftzoo.runs.plan import Request

    train = {k: v for k, v in record.train_config.items() if k != "precision"}
    fields: dict[str, Any] = {
        "method": record.method, "task": record.task, "model": record.model, "seed": record.seed,
        "options": record.method_config, "train": train, "protocol": record.protocol,
        "precision": record.train_config.get("precision", "auto"), "source": record.data.get("source"),
        "limit": _limit_of(record.command), "max_new_tokens": record.max_new_tokens, "prune": record.prune,
        "retention": (record.retention or {}).get("task"), "tuning": record.tuning,
        "hold_out": _hold_out(record.data.get("held_out")),
        "validation": (_hold_out(record.data.get("validation")) or (None,))[0],
        "early_stop": (record.validation or {}).get("early_stop"),
    }  # fmt: skip
    return Request(**fields | {k: v for k, v in overrides.items() if v is not None})


def _limit_of(command: str) -> int | None:
    """`--limit` of the recorded command, None without it; no field of a record holds it."""
    try:
        arguments = shlex.split(command)
        return int(arguments[arguments.index("--limit") + 1])
    except (ValueError, IndexError):
        return None


def _hold_out(facts: Any) -> tuple[int, int] | None:
    """(rows of each task, seed), from `data.held_out` or `data.validation` of a record; None without any."""
    try:
        return max(map(int, facts["rows"])), int(facts["seed"])
    except (TypeError, KeyError, ValueError):
        return None


def rerun(record: Record, request: Any, tolerance: float, progress: Callable | None = None) -> list[Check]:
    """Do the run once more, in a temporary folder, and compare scores and counts with the record.

    `request` is that of the record (`request_of`); scores may differ by `tolerance`.
    """
    from peftzoo.runs.run import run

    with TemporaryDirectory(prefix="peftzoo-verify-") as folder:
        new, _, _ = run(request, Path(folder), force=True, progress=progress)
    if new.status != "ok":
        return [Check("status", record.status, f"{new.status}: {new.reason}", False)]
    other_device = _on_gpu(record) != _on_gpu(new)  # the id depends on the kind of device
    same_id = None if other_device else record.id == new.id
    checks = [Check("configuration (id)", record.id, new.id, same_id)]
    checks += [_compare_scores("score", record.result, new.result, tolerance)]
    rows = (record.result and record.result.rows, new.result and new.result.rows)
    if record.merged_score and record.score and new.score:
        unmerged = _compare_scores("unmerged score", record.score, new.score, tolerance)
        checks += [unmerged if record.score.rows == new.score.rows else replace(unmerged, good=None)]
    checks += [Check("rows", *rows, rows[0] == rows[1])]
    for name in COUNT_FIELDS:
        recorded, found = getattr(record, name), getattr(new, name)
        equal = None if recorded is None else recorded == found
        checks.append(Check(name.replace("_", " "), recorded, found, equal))
    return checks


def _on_gpu(record: Record) -> bool:
    return not str(record.environment.get("device")).startswith("CPU")


def _compare_scores(what: str, recorded: Any, found: Any, tolerance: float) -> Check:
    """Compare two `Score`s, either of which may be None."""
    a, b = recorded and recorded.value, found and found.value
    good = a == b if a is None or b is None else abs(a - b) <= tolerance and recorded.metric == found.metric
    return Check(f"{what} (within {tolerance:g})", a, b, good)
