"""The number of a row: its place in the split as the source has it, whatever is drawn or cut off later.

It is a column of the `datasets.Dataset`, so that every selection of rows carries it along. Prompts do not see
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMN = "peftzoo_row"
"""Name of the column."""


def numbered(rows: list[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The rows with their numbers; the rows themselves are left as they are."""
    return [row | {COLUMN: number} for row, number in zip(rows, numbers, strict=True)]


def of(dataset: Any) -> list[int]:
    """The number of each row of a `datasets.Dataset`; of one without the column, its place."""
    return list(dataset[COLUMN]) if COLUMN in dataset.column_names else list(range(len(dataset)))


def without(dataset: Any) -> Any:
    """The `datasets.Dataset` with the source's own columns alone."""
    return dataset.remove_columns(COLUMN) if COLUMN in dataset.column_names else dataset
