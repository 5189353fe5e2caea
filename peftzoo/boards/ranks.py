"""What may be said of scores: intervals over seeds, paired tests over the same rows, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import signal, stats

from peftzoo.records.statistics import Array, Sample

LEVEL = 0.05
SEEDS = 3
"""Methods with fewer seeds are not ranked."""
ROUNDS = 9999
"""Resamples of a bootstrap; fewer where there are more than 5,000 rows."""


def interval(scores: Sequence[float]) -> float | None:
    """Half-width of the 95 % t interval of the mean over seeds; None for fewer than two."""
    if len(scores) < 2:
        return None
    return float(np.std(scores, ddof=1) / len(scores) ** 0.5 * _t(len(scores) - 1))


@lru_cache(maxsize=256)
def _t(freedom: int) -> float:
    return float(stats.t.ppf(1 - LEVEL / 2, freedom))


# -- paired tests ---------------------------------------------------------------------------------------

Runs = dict[int, Sample]
"""The outcomes of one method and configuration, by seed."""


def compare(a: Runs, b: Runs) -> float | None:
    """Two-sided p value that two methods are alike, from the seeds and rows that both have; None for none.

    Right and wrong answers: the exact sign-flip test of the rows' differences, summed over seeds, which with
    one seed is McNemar's exact test. Else: a paired bootstrap over rows of the mean over seeds.
    """
    seeds = [s for s in a if s in b and a[s].rows == b[s].rows and a[s].of is b[s].of]
    if not seeds:
        return None
    if all(run[s].binary for run in (a, b) for s in seeds):
        total: dict = {}
        for s in seeds:
            for row, d in zip(a[s].rows, a[s].parts[:, 0] - b[s].parts[:, 0], strict=True):
                total[row] = total.get(row, 0) + int(d)
        sizes, counts = np.unique([abs(d) for d in total.values() if d], return_counts=True)
        return sign_flip(tuple(zip(sizes.tolist(), counts.tolist(), strict=True)), abs(sum(total.values())))
    with np.errstate(invalid="ignore"):
        differences = np.mean([resampled(a[s]) - resampled(b[s]) for s in seeds], 0)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    few = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (few + 1) / (len(differences) + 1)))


@lru_cache(maxsize=4096)
def sign_flip(counts: tuple[tuple[int, int], ...], sum_of_all: int) -> float:
    """Exact two-sided p value of a sum of differences whose signs are tossed: `counts` says how many rows
    have a difference of which size; with all sizes 1 this is McNemar's exact test."""
    chances = np.ones(1)  # of how much is positive
    for size, n in counts:
        spread = np.zeros(size * n + 1)
        spread[::size] = stats.binom.pmf(np.arange(n + 1), n, 0.5)
        chances = signal.convolve(chances, spread)
    most = len(chances) - 1  # a sum s has (most + s) / 2 positive
    tail = chances[: (most - sum_of_all) // 2 + 1].sum()
    return float(min(1.0, max(2 * tail, 0.0))) if sum_of_all else 1.0


@lru_cache(maxsize=512)
def resampled(sample: Sample) -> Array:
    """The metric on resamples of the rows; on the same resamples for the same rows."""
    n = len(sample.rows)
    return sample.of((_counts(n, sample.rows) @ sample.parts.astype(np.float32)).astype(float) / n)


@lru_cache(maxsize=1)
def _counts(n: int, rows: tuple) -> Array:
    """(rounds, n): how often each row is drawn."""
    rounds = max(ROUNDS // 10, min(ROUNDS, 50_000_000 // n))
    draws = np.random.default_rng(0).integers(0, n, (rounds, n))
    draws += n * np.arange(rounds)[:, None]
    return np.bincount(draws.ravel(), minlength=rounds * n).reshape(rounds, n).astype(np.float32)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number by Holm's step-down method; None stays None and does not count."""
    known = sorted((v, i) for i, v in enumerate(p) if v is not None)
    found: list[float | None] = [None] * len(p)
    worst = 0.0
    for place, (value, i) in enumerate(known):
        worst = max(worst, min(1.0, (len(known) - place) * value))
        found[i] = worst
    return found


def against(runs: Sequence[Runs], one: int) -> list[float | None]:
    """Corrected p values of all others against one; None for itself."""
    return holm([None if i == one else compare(r, runs[one]) for i, r in enumerate(runs)])


def ranks(runs: Sequence[Runs], fit: Sequence[bool]) -> list[int | None]:
    """Ranks of methods that come best first; None for those that are not `fit` to be ranked.

    The best and all that a test does not tell apart from it share rank 1; of the rest, again the best and
    all that are not told apart from it share the next, and so on, with Holm's correction in each round. What
    cannot be tested against the best that is left (no row or seed in common) has no rank.
    """
    found: list[int | None] = [None] * len(runs)
    left = [i for i in range(len(runs)) if fit[i]]
    rank = 1
    while left:
        p = [1.0, *against([runs[i] for i in left], 0)[1:]]
        tested = {i: v for i, v in zip(left, p, strict=True) if v is not None}
        alike = [i for i, v in tested.items() if v >= LEVEL]
        for i in alike:
            found[i] = rank
        rank += len(alike)
        left = [i for i in tested if i not in alike]
    return found
