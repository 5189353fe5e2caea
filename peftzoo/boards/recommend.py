"""What the records say about which method to take: measured rows only, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from peftzoo.boards import ranks
from peftzoo.boards import tables as board
from peftzoo.errors import unknown
from peftzoo.records.schema import Record


@dataclass
class Advice:
    """Per table that fits: what it shares, rows within the budget best first, and rows left out."""

    tables: list[tuple[dict[str, Any], pd.DataFrame]] = field(default_factory=list)
    beyond: int = 0
    unknown: int = 0
    missing: list[str] = field(default_factory=list)


def alike(record: Record, task: str) -> bool:
    """Whether a record's task is, or is like, the named one: task, suite, a part of a name, or of a title."""
    from peftzoo.tasks import task_files

    word = task.lower()
    if word in record.task.lower() or word == record.suite.lower():
        return True
    known = record.task in task_files.tasks() or record.task in task_files.groups()
    return known and word in getattr(task_files.task_group(record.task).about, "title", "").lower()


def recommend(records: list[Record], model: str, task: str, max_trainable: int | None = None,
              max_memory: int | None = None) -> Advice:  # fmt: skip
    """Rows of the board for this model and tasks like this one, within the budget. Memory is the computed
    total of training, in bytes. Raises `UserError` where there is no record to go by."""
    good = [r for r in records if r.status == "ok"]
    mine = [r for r in good if r.model == model]
    if not mine:
        raise unknown("model with records", model, {r.model for r in good}, see="peftzoo board")
    fit = {name: alike(r, task) for name, r in {r.task: r for r in mine}.items()}
    if not any(fit.values()):
        raise unknown(f'task like this on record for "{model}"', task, fit, see="peftzoo board")
    advice = Advice()
    for facts, table in board.tables([r for r in mine if fit[r.task]]):
        over, blank = pd.Series(False, index=table.index), pd.Series(False, index=table.index)
        for column, most in (("trained", max_trainable), ("memory_mib", max_memory and max_memory / 2**20)):
            if most is not None:
                untrained = (column == "memory_mib") & (table["trained"] == 0)  # nothing to measure
                blank |= table[column].isna() & ~untrained
                over |= table[column] > most
        advice.beyond += int(over.sum())
        advice.unknown += int((blank & ~over).sum())
        if len(left := table[~over & ~blank & table["score"].notna()]):
            advice.tables.append((facts, left))
    advice.missing = _missing(mine, fit, advice)
    return advice


def _missing(mine: list[Record], fit: dict[str, bool], advice: Advice) -> list[str]:
    from peftzoo.contract import registry

    found = []
    tried = {r.method for r in mine if fit[r.task]}
    if untried := sorted(set(registry.methods()) - tried):
        found.append(f"{len(untried)} methods have no run here: {', '.join(untried)}")
    few = {m for _, t in advice.tables for m in t[t["seeds"] < ranks.SEEDS]["method"]}
    if few:
        found.append(f"fewer than {ranks.SEEDS} seeds, so not ranked: {', '.join(sorted(few))}")
    if any(facts["source"] == "embedded" for facts, _ in advice.tables):
        found.append("embedded data is generated: it tells little of real data")
    others = sorted(name for name, good in fit.items() if not good)
    if others:
        found.append(f"other tasks on record, not looked at: {', '.join(others)}")
    return found
