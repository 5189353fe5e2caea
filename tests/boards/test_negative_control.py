"""Negative control on real runs: one method under two names, with other seeds, is not told apart."""

from __future__ import annotations

import itertools
from pathlib import Path

from peftzoo.boards import ranks
from peftzoo.records import outcomes, store
from peftzoo.records.metric_terms import Sample
from peftzoo.records.schema import Record

RESULTS = Path(__file__).parents[2] / "results"
SEEDS = 10
"""Of a method on record that is divided into two halves."""


def on_record() -> dict[str, list[Sample]]:
    """The outcomes of each configuration with enough seeds, in the order of the seeds, by its id."""
    by_id: dict[str, dict[int, Record]] = {}
    for record in store.read_all(RESULTS):
        if isinstance(record, Record) and record.status == "ok":
            by_id.setdefault(record.id, {})[record.seed] = record
    ten = {i: sorted(by_seed.items())[:SEEDS] for i, by_seed in by_id.items() if len(by_seed) >= SEEDS}
    return {i: [outcomes.sample(record) for _, record in pairs] for i, pairs in ten.items()}


def separated(samples: list[Sample], half: tuple[int, ...]) -> bool:
    """Whether the runs at these places are told from the others."""
    names = [{i: s for i, s in enumerate(samples) if (i in half) == mine} for mine in (True, False)]
    result = ranks.compare([ranks.Entry(n) for n in names], splits=0)
    assert None not in result.ranks, "nothing was compared"
    return result.ranks[0] != result.ranks[1]


def test_two_halves_of_one_methods_seeds_are_not_separated() -> None:
    """The first five seeds are not told from the last five, and few of all ways to halve them are.

    All halves come from the same ten draws, so that a rule with a level of 5 % may show some more than 5 %.
    """
    found = on_record()
    assert found, f"no method has {SEEDS} seeds on record"
    for name, samples in found.items():
        assert not separated(samples, tuple(range(SEEDS // 2))), name
        halves = [(0, *rest) for rest in itertools.combinations(range(1, SEEDS), SEEDS // 2 - 1)]
        count = sum(separated(samples, half) for half in halves)
        assert len(halves) == 126 and count <= 0.1 * len(halves), f"{name}: {count} of {len(halves)}"


def test_a_method_that_is_worse_is_separated() -> None:
    """The control can fail: half of the rows of one half are answered wrongly."""
    for samples in on_record().values():
        for sample in samples[SEEDS // 2 :]:
            sample.terms[::2] = 0
        assert separated(samples, tuple(range(SEEDS // 2)))
