"""Estimates of a run's time and memory from the records of similar runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.records.schema import Record, number


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one run, None where unknown; `basis` says from which records they come."""

    seconds: float | None = None
    memory: int | None = None
    basis: str = "unknown: no like run on record"


FORWARD_SHARE = 1 / 3
"""Of a training step's time, about what its forward pass takes."""
SAME_FIELDS = ("task", "model", "view", "prune")
SAME_SETTINGS = ("batch_size", "max_length", "precision", "micro_batch")


class Estimates:
    """Estimates from the records of finished runs.

    Records with the same task, model, batch, device and data source as the new run are compared with
    it: those of the same method, or, if there are none, those of the same family of methods.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.by_key: dict[tuple, list[Record]] = {}
        for record in records:
            if record.status == "ok" and record.train_seconds is not None:
                self.by_key.setdefault(_comparison_key(record), []).append(record)

    def for_run(self, record: Record) -> Estimate:
        """The estimate for a run that has not begun; `record` is the one it begins with (`run.new_record`).

        Time is the median over the records, scaled to the run's steps and scored rows; memory is the largest.
        """
        comparable = self.by_key.get(_comparison_key(record), [])
        of_method = [r for r in comparable if r.method == record.method]
        source = f"of {record.method}"
        if not of_method and (family := _method_family(record.method)):
            of_method, source = (
                [r for r in comparable if _method_family(r.method) == family],
                f"of {family} methods",
            )
        if not of_method:
            return Estimate()
        memory = [m for r in of_method if (m := _peak_bytes(r)) is not None]
        return Estimate(
            round(statistics.median(_seconds(r, record) for r in of_method), 1),
            max(memory, default=None),
            f"from {len(of_method)} record{'s' if len(of_method) > 1 else ''} {source}",
        )


def _comparison_key(r: Record) -> tuple[str, ...]:
    """What two runs must have in common to be compared."""
    facts = [getattr(r, k) for k in SAME_FIELDS] + [r.train_config.get(k) for k in SAME_SETTINGS]
    return tuple(map(str, [*facts, r.environment.get("device"), r.data.get("source")]))


def _method_family(method: str) -> str | None:
    try:
        return registry.get(method).family
    except (UserError, ImportError):  # a method that is not installed here
        return None


def _seconds(past: Record, planned: Record) -> float:
    """Seconds of the planned run at the pace per step and per scored row of the past one."""
    steps, rows = number(past.trained_steps), number(past.data.get("scored_rows"))
    training = past.train_seconds / steps * (planned.train_config.get("steps") or 0) if steps else 0.0
    if planned.held_out is not None:  # a trial scores nothing: two forward passes over the held-out rows
        batch = number(planned.train_config.get("batch_size")) or 1
        per_step = past.train_seconds / steps if steps else 0.0
        return training + per_step * FORWARD_SHARE * 2 * planned.data["scored_rows"] / batch
    scoring = sum(s.seconds for s in (past.score, past.merged_score) if s)
    return training + (scoring / rows * planned.data["scored_rows"] if rows else 0.0)


def _peak_bytes(r: Record) -> Any:
    """Peak bytes on a GPU; on a CPU the computed sum of what training holds."""
    return r.memory.get("cuda_allocated_peak") or r.memory.get("computed_total")
