"""Which method to use, from the records: measured rows within a budget, and what was not measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from peftzoo.boards import ranks
from peftzoo.boards import tables as board
from peftzoo.errors import unknown
from peftzoo.records.schema import Record


@dataclass(frozen=True)
class Missing:
    """What was not measured, in words, and the names that it is about."""

    text: str
    names: tuple[str, ...] = ()

    def sentence(self, most: int | None = None) -> str:
        """The words with the names, at most so many of them."""
        if most is None or len(self.names) <= most + 1:  # "and 1 more" is no shorter than its name
            return f"{self.text}: {', '.join(self.names)}" if self.names else self.text
        more = len(self.names) - most
        return f"{self.text}: {', '.join(self.names[:most])} and {more} more (--json names all)"


@dataclass
class Advice:
    """The tables of matching tasks with their rows within the budget, best first.

    `over_budget` counts rows above the budget, `unknown` rows whose cost is not on record; `missing` says
    what was not measured.
    """

    tables: list[tuple[dict[str, Any], pd.DataFrame]] = field(default_factory=list)
    over_budget: int = 0
    unknown: int = 0
    missing: list[Missing] = field(default_factory=list)


def matches_task(record: Record, task: str) -> bool:
    """Whether `task` is the record's suite, or a part of its task's name or title; case does not matter."""
    from peftzoo.tasks import task_files

    word = task.lower()
    if word in record.task.lower() or word == record.suite.lower():
        return True
    known = record.task in task_files.tasks() or record.task in task_files.groups()
    return known and word in getattr(task_files.task_group(record.task).about, "title", "").lower()


def recommend(records: list[Record], model: str, task: str, max_trainable: int | None = None,
              max_memory: int | None = None) -> Advice:  # fmt: skip
    """Rows of the board for this model and for tasks that match `task`, within the budget.

    `max_trainable` is a number of parameters, `max_memory` the computed total of training in bytes. Raises
    `UserError` where there is no record of the model or of such a task.
    """
    completed = [r for r in records if r.status == "ok"]
    of_model = [r for r in completed if r.model == model]
    if not of_model:
        raise unknown("model with records", model, {r.model for r in completed}, see="peftzoo board")
    matches = {name: matches_task(r, task) for name, r in {r.task: r for r in of_model}.items()}
    if not any(matches.values()):
        raise unknown(f'task like this on record for "{model}"', task, matches, see="peftzoo board")
    advice = Advice()
    for shared, table in board.tables([r for r in of_model if matches[r.task]]):
        over_budget = pd.Series(False, index=table.index)
        unknown_cost = pd.Series(False, index=table.index)
        for column, limit in (("trained", max_trainable), ("memory_mib", max_memory and max_memory / 2**20)):
            if limit is not None:
                untrained = (column == "memory_mib") & (table["trained"] == 0)  # nothing to measure
                unknown_cost |= table[column].isna() & ~untrained
                over_budget |= table[column] > limit
        advice.over_budget += int(over_budget.sum())
        advice.unknown += int((unknown_cost & ~over_budget).sum())
        if len(within := table[~over_budget & ~unknown_cost & table["score"].notna()]):
            advice.tables.append((shared, within))
    advice.missing = _not_measured(of_model, matches, advice)
    return advice


def _not_measured(of_model: list[Record], matches: dict[str, bool], advice: Advice) -> list[Missing]:
    """Methods without runs, too few seeds, generated data and tasks that do not match."""
    from peftzoo.contract import registry

    missing = []
    measured = {r.method for r in of_model if matches[r.task]}
    if unmeasured := sorted(set(registry.methods()) - measured):
        missing.append(Missing(f"{len(unmeasured)} methods have no run here", tuple(unmeasured)))
    few_seeds = {m for _, t in advice.tables for m in t[t["seeds"] < ranks.MIN_SEEDS]["method"]}
    if few_seeds:
        text = f"fewer than {ranks.MIN_SEEDS} seeds, so not ranked"
        missing.append(Missing(text, tuple(sorted(few_seeds))))
    if any(shared["source"] == "embedded" for shared, _ in advice.tables):
        missing.append(Missing("embedded data is generated: it tells little of real data"))
    others = sorted(name for name, match in matches.items() if not match)
    if others:
        missing.append(Missing("other tasks on record, not looked at", tuple(others)))
    return missing
