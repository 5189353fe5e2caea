"""What a sweep would do: its runs with their state on record and an estimate, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.runs.estimates import Estimates
from peftzoo.runs.plan import Plan, as_plan
from peftzoo.runs.run import new_record
from peftzoo.sweeps.searches import SearchRun


def plan_rows(
    plans: Sequence[Plan], studies: Sequence[SearchRun], out: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per run; of a search, one for like trials and one for the runs after it. Also notes on files in
    `out` that are no records.

    `seconds` and `memory` (bytes) are those of one run, None where no like run is on record.
    """
    entries = [*store.read_all(out)] if out.is_dir() else []
    notes = [f"skipped: {e}" for e in entries if isinstance(e, UserError)]
    estimates, rows = Estimates(e for e in entries if not isinstance(e, UserError)), []

    def row(request: Any, kind: str, times: int, on_record: bool = False) -> dict[str, Any]:
        """The row of `times` runs like this request, with their state and the estimate for one of them."""
        plan = as_plan(request)
        record = new_record(plan)
        estimate, config = estimates.for_run(record), record.train_config
        checkpoint = out / "checkpoints" / f"{record.id}-s{record.seed}.safetensors"
        on_record = on_record or (kind == "run" and store.path(out, record).is_file())
        state = "done" if on_record else "half done" if kind == "run" and checkpoint.is_file() else "to do"
        options = ", ".join(f"{k}={v}" for k, v in plan.request.options.items())
        return {
            "kind": kind, "times": times, "state": state, "method": record.method, "task": record.task,
            "model": record.model, "seed": record.seed, "steps": config["steps"],
            "batch_size": config["batch_size"], "lr": config["lr"], "options": options,
            "id": record.id if kind == "run" else None,
            "seconds": estimate.seconds, "memory": estimate.memory, "basis": estimate.basis,
        }  # fmt: skip

    rows += [row(plan, "run", 1) for plan in plans]
    for study in studies:
        for kind, request, times, on_record in study.outline(out):
            rows.append(row(request, kind, times, on_record))
    return rows, notes
