"""Confidence intervals over seeds, paired significance tests over the same rows, and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import signal, stats

from peftzoo.records.metric_terms import Array, Sample

SIGNIFICANCE = 0.05
MIN_SEEDS = 3
"""Methods with fewer seeds are not ranked."""
MAX_RESAMPLES = 9999
"""Resamples of a bootstrap; fewer (50,000,000 / rows, at least 999) where there are more than 5,000 rows."""


def confidence_half_width(scores: Sequence[float]) -> float | None:
    """Half-width of the 95 % t interval of the mean over seeds; None for fewer than two."""
    if len(scores) < 2:
        return None
    return float(np.std(scores, ddof=1) / len(scores) ** 0.5 * _t_quantile(len(scores) - 1))


@lru_cache(maxsize=256)
def _t_quantile(degrees_of_freedom: int) -> float:
    return float(stats.t.ppf(1 - SIGNIFICANCE / 2, degrees_of_freedom))


# -- paired tests ---------------------------------------------------------------------------------------

SamplesBySeed = dict[int, Sample]
"""The outcomes of one method and configuration: seed -> sample."""


def paired_p_value(a: SamplesBySeed, b: SamplesBySeed) -> float | None:
    """Two-sided p value of the hypothesis that two methods score alike, from the seeds and rows of both.

    Right and wrong answers: the exact sign-flip test of the rows' differences, summed over seeds, which with
    one seed is McNemar's exact test. Other metrics: a paired bootstrap over rows of the mean over seeds. None
    where no seed has the same rows and metric in both, or the metric is undefined on every resample.
    """
    seeds = [s for s in a if s in b and a[s].rows == b[s].rows and a[s].metric is b[s].metric]
    if not seeds:
        return None
    if all(samples[s].binary for samples in (a, b) for s in seeds):
        row_sums: dict = {}
        for s in seeds:
            for row, d in zip(a[s].rows, a[s].terms[:, 0] - b[s].terms[:, 0], strict=True):
                row_sums[row] = row_sums.get(row, 0) + int(d)
        sizes, counts = np.unique([abs(d) for d in row_sums.values() if d], return_counts=True)
        size_counts = tuple(zip(sizes.tolist(), counts.tolist(), strict=True))
        return sign_flip_p_value(size_counts, abs(sum(row_sums.values())))
    with np.errstate(invalid="ignore"):
        differences = np.mean([bootstrap_metric(a[s]) - bootstrap_metric(b[s]) for s in seeds], 0)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(differences) + 1)))


@lru_cache(maxsize=4096)
def sign_flip_p_value(size_counts: tuple[tuple[int, int], ...], abs_sum: int) -> float:
    """Exact two-sided p value of a sum of differences under random signs.

    `size_counts` holds pairs (absolute difference, number of rows with it), `abs_sum` is the absolute value
    of the observed sum. With all sizes 1 this is McNemar's exact test.
    """
    pmf = np.ones(1)  # of the sum of the differences that got a plus sign
    for size, n in size_counts:
        size_pmf = np.zeros(size * n + 1)
        size_pmf[::size] = stats.binom.pmf(np.arange(n + 1), n, 0.5)
        pmf = signal.convolve(pmf, size_pmf)
    largest = len(pmf) - 1  # for a total sum s, (largest + s) / 2 of it got a plus sign
    tail = pmf[: (largest - abs_sum) // 2 + 1].sum()
    return float(min(1.0, max(2 * tail, 0.0))) if abs_sum else 1.0


@lru_cache(maxsize=512)
def bootstrap_metric(sample: Sample) -> Array:
    """(B,): the metric on B bootstrap resamples of the rows; samples of the same rows share the resamples."""
    n = len(sample.rows)
    term_sums = _resample_counts(n, sample.rows) @ sample.terms.astype(np.float32)
    return sample.metric(term_sums.astype(float) / n)


@lru_cache(maxsize=1)
def _resample_counts(n: int, rows: tuple) -> Array:
    """(B, n): how often each of the n rows is drawn in each resample; `rows` is a key of the cache only."""
    B = max(MAX_RESAMPLES // 10, min(MAX_RESAMPLES, 50_000_000 // n))
    draws = np.random.default_rng(0).integers(0, n, (B, n))
    draws += n * np.arange(B)[:, None]
    return np.bincount(draws.ravel(), minlength=B * n).reshape(B, n).astype(np.float32)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p values corrected for multiple tests by Holm's step-down method; a None stays and does not count."""
    ascending = sorted((v, i) for i, v in enumerate(p) if v is not None)
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for position, (value, i) in enumerate(ascending):
        largest = max(largest, min(1.0, (len(ascending) - position) * value))
        corrected[i] = largest
    return corrected


def p_values_against(methods: Sequence[SamplesBySeed], reference: int) -> list[float | None]:
    """Holm-corrected p values of all methods against the one at index `reference`; None for itself."""
    return holm(
        [None if i == reference else paired_p_value(m, methods[reference]) for i, m in enumerate(methods)]
    )


def ranks(methods: Sequence[SamplesBySeed], rankable: Sequence[bool]) -> list[int | None]:
    """Ranks of methods that come best first; None for those that are not `rankable`.

    The best method and all that do not differ significantly from it share rank 1; of the rest, again the best
    and all that do not differ from it share the next rank, and so on, with Holm's correction in each round. A
    method that cannot be tested against the best one left (no row or seed in common) has no rank.
    """
    result: list[int | None] = [None] * len(methods)
    unranked = [i for i in range(len(methods)) if rankable[i]]
    rank = 1
    while unranked:
        p = [1.0, *p_values_against([methods[i] for i in unranked], 0)[1:]]
        tested = {i: v for i, v in zip(unranked, p, strict=True) if v is not None}
        tied = [i for i, v in tested.items() if v >= SIGNIFICANCE]
        for i in tied:
            result[i] = rank
        rank += len(tied)
        unranked = [i for i in tested if i not in tied]
    return result
