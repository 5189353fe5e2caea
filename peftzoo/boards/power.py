"""How many seeds and rows it takes to find a difference: from records, or from given deviations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftzoo.boards import ranks
from peftzoo.boards import tables as board
from peftzoo.errors import UserError, unknown
from peftzoo.records.schema import Record

SEEDS = (3, 4, 5, 7, 10, 15, 20, 30, 50, 100)
"""Numbers of seeds that are tried."""


@dataclass(frozen=True)
class Design:
    """What is known of the runs: variances of a row's outcome, rows, and methods compared at once."""

    parts: ranks.Components
    methods: int
    rows: int
    basis: str

    def smallest(self, seeds: int, rows: int) -> float:
        """The smallest difference that is found on 80 of 100 tables of so many seeds and rows."""
        variance, from_seeds = self.parts.difference(seeds, rows)
        if not variance:
            return 0.0
        from_rows, m = variance - from_seeds, max(self.methods, 2)
        freedom = variance**2 / (from_seeds**2 / (m * (seeds - 1)) + from_rows**2 / max(rows - 1, 1))
        return ranks.smallest_difference(variance, m, freedom)

    def seeds_for(self, difference: float) -> int | None:
        """The fewest of `SEEDS` with which the difference is found; None where even the most do not do."""
        return next((k for k in SEEDS if self.smallest(k, self.rows) <= difference), None)


def of_records(records: list[Record], task: str, model: str) -> list[tuple[dict[str, Any], Design]]:
    """A design for each table of this task and model whose methods have seeds, most runs first.

    Raises `UserError` where there is none.
    """
    completed = [r for r in records if r.status == "ok"]
    of_model = [r for r in completed if r.model == model]
    if not of_model:
        raise unknown("model with records", model, {r.model for r in completed}, see="peftzoo board")
    of_task = [r for r in of_model if r.task == task]
    if not of_task:
        raise unknown(f'task on record for "{model}"', task, {r.task for r in of_model}, see="peftzoo board")
    designs = []
    for shared, table in board.tables(of_task):
        parts = table.attrs["comparison"].components
        if parts is not None:
            m = int(table["rank"].notna().sum())
            designs.append((shared, Design(parts, m, parts.n, f"{m} methods on record, {parts.n} rows")))
    if not designs:
        raise UserError(
            f'no two methods of "{task}" on "{model}" have {ranks.MIN_SEEDS} seeds on record: give '
            "--seed-deviation, --flips and --rows, or run `peftzoo bench --seeds 0,1,2`"
        )
    return sorted(designs, key=lambda d: -d[1].methods)


def of_deviations(
    deviation: float, flips: float, rows: int, methods: int, method_rows: float = 0.0
) -> Design:
    """A design from a seed deviation of the score and the share of answers that flip from seed to seed.

    `method_rows`: share of the answers that differ between two methods beyond that. Raises `UserError` for
    values out of range.
    """
    for name, value, low, high in (
        ("--seed-deviation", deviation, 0, 0.5), ("--flips", flips, 0, 1), ("--rows", rows, 2, 10**7),
        ("--methods", methods, 2, 1000), ("--method-flips", method_rows, 0, 1),
    ):  # fmt: skip
        if not low <= value <= high:
            raise UserError(f"{name} {value:g}: from {low:g} to {high:g}")
    rest = flips / 2  # two answers that differ with probability f have a variance of f / 2 each
    parts = ranks.Components(deviation**2, method_rows / 2, rest, rest + rows * deviation**2, 1, rows)
    return Design(parts, methods, rows, "the given deviations")
