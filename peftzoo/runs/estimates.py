"""What a run will take, from records of like runs; where there are none, nothing is said."""

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
    """Seconds and bytes of one run, None where unknown, and where they come from."""

    seconds: float | None = None
    memory: int | None = None
    basis: str = "unknown: no like run on record"


LIKE = ("task", "model", "view", "prune")
SET = ("batch_size", "max_length", "precision", "micro_batch")


class Estimates:
    """Like runs have the same task, model, batch and device, and the same method, else the same family."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.runs: dict[tuple, list[Record]] = {}
        for record in records:
            if record.status == "ok" and record.train_seconds is not None:
                self.runs.setdefault(_like(record), []).append(record)

    def of(self, record: Record) -> Estimate:
        """For a run that has not begun. Time follows the steps and the scored rows, memory does not."""
        like = self.runs.get(_like(record), [])
        same = [r for r in like if r.method == record.method]
        what = f"of {record.method}"
        if not same and (family := _family(record.method)):
            same, what = [r for r in like if _family(r.method) == family], f"of {family} methods"
        if not same:
            return Estimate()
        memory = [m for r in same if (m := _memory(r)) is not None]
        return Estimate(
            round(statistics.median(_seconds(r, record) for r in same), 1),
            max(memory, default=None),
            f"from {len(same)} record{'s' if len(same) > 1 else ''} {what}",
        )


def _like(r: Record) -> tuple:
    facts = [getattr(r, k) for k in LIKE] + [r.train_config.get(k) for k in SET]
    return tuple(map(str, [*facts, r.environment.get("device"), r.data.get("source")]))


def _family(method: str) -> str | None:
    try:
        return registry.get(method).family
    except (UserError, ImportError):  # a record of a method that is not here
        return None


def _seconds(past: Record, planned: Record) -> float:
    steps, rows = number(past.train_config.get("steps")), number(past.data.get("scored_rows"))
    training = past.train_seconds / steps * (planned.train_config.get("steps") or 0) if steps else 0.0
    scoring = sum(s.seconds for s in (past.score, past.merged_score) if s)
    return training + (scoring / rows * planned.data["scored_rows"] if rows else 0.0)


def _memory(r: Record) -> Any:
    """Peak on a GPU; else the sum of what training holds."""
    return r.memory.get("cuda_allocated_peak") or r.memory.get("computed_total")
