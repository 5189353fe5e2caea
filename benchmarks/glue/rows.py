"""From a maker of problems to the rows of a split: distinct, balanced, apart from the other splits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from peftzoo.benchmarks.glue.embedded import SHARES, normalise, split_of

PATIENCE = 20_000
"""Draws without a new row after which a split counts as used up."""

Make = Callable[[random.Random, int], tuple[str, ...]]
"""Texts that have the label that is given."""


def drawn(
    make: Make, columns: tuple[str, ...], labels: int, split: str, n: int, seed: int, own: int = 1
) -> list[dict[str, Any]]:
    """The first n distinct rows of a split: the texts under their columns, label (0 to labels - 1), idx.

    The first `own` texts of a row belong to its split by their checksum, so that no other split has them.
    """
    if split not in SHARES:
        raise ValueError(f"no split {split!r}; there are {', '.join(SHARES)}")
    rng = random.Random(f"{make.__name__} {split} {seed}")
    seen: set[tuple[str, ...]] = set()
    found: list[dict[str, Any]] = []
    idle, label = 0, rng.randrange(labels)
    while len(found) < n and idle < PATIENCE:
        texts = make(rng, label)
        idle += 1
        if any(split_of(text) != split for text in texts[:own]):
            continue
        key = tuple(normalise(text) for text in texts)
        if key not in seen:
            seen.add(key)
            found.append(dict(zip(columns, texts, strict=True)) | {"label": label, "idx": len(found)})
            idle, label = 0, rng.randrange(labels)
    return found


def other(rng: random.Random, options: tuple[Any, ...], *not_these: Any) -> Any:
    """One of the options, but none of those given."""
    return rng.choice([x for x in options if x not in not_these])


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())
