"""Which methods can be told apart: seeds and rows both drawn at random, all pairs at once.

The model of a table. Run s of method m makes y[m,s,i] of row i (1 or 0 for right and wrong answers, else a
jackknife pseudo-value). Seeds are nested in methods, rows are crossed with them, as in multi-reader
multi-case studies (Obuchowski & Rockette 1995; Hillis 2014), without an effect that readers share:

    y[m,s,i] = mean_m + row_i + (method x row)_mi + seed_ms + rest_msi

    seed_m   N sum_s (ybar[m,s] - ybar[m])^2 / (K_m - 1)        expects  rest_m + N var(seed_m)
    rest_m   the mean square of what rows and seeds of m leave  expects  rest_m
    rows_mn  the variance over rows of ybar[m,.,i] - ybar[n,.,i], less rest_m / K_m + rest_n / K_n

    Var(ybar[m] - ybar[n]) = V_m / (N K_m) + V_n / (N K_n) + rows_mn / N

V_m is the larger of the method's own seed_m and the mean over methods: a method whose seeds happen to agree
gains nothing by it. Pairs are compared by the studentised range (Tukey 1949; Kramer 1956 for unequal K), with
Satterthwaite's degrees of freedom. `tools/simulate_ranks.py` shows the level and the power of this rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from peftzoo.records.metric_terms import Array, Sample

SIGNIFICANCE = 0.05
POWER = 0.8
"""How often the smallest difference that a table could have found would be found."""
MIN_SEEDS = 3
"""Methods with fewer seeds are not ranked."""
SPLITS = 200
"""Random half-splits of rows and seeds."""


def confidence_half_width(scores: Sequence[float]) -> float | None:
    """Half-width of the 95 % t interval of the mean over seeds; None for fewer than two."""
    if len(scores) < 2:
        return None
    return float(np.std(scores, ddof=1) / len(scores) ** 0.5 * t_quantile(len(scores) - 1))


@lru_cache(maxsize=256)
def t_quantile(degrees_of_freedom: int) -> float:
    """The 97.5 % point of Student's t."""
    return float(stats.t.ppf(1 - SIGNIFICANCE / 2, degrees_of_freedom))


@dataclass(frozen=True)
class Entry:
    """The outcomes of one method and configuration by seed; `reason`: why there are none.

    `fixed`: one thing without seeds, such as the untrained language model.
    """

    samples: dict[int, Sample]
    fixed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Components:
    """Variances of one row's outcome: between seeds (of the whole run), between methods beyond the row, rest.

    `pooled` is the mean of the methods' mean squares between seeds, with `freedom` degrees of freedom; `rows`
    half the median of the pairs; `n` the number of rows.
    """

    seed: float
    rows: float
    rest: float
    pooled: float
    freedom: int
    n: int

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of a method's true score from seed to seed."""
        return self.seed**0.5

    def difference(self, seeds: int, n: int) -> tuple[float, float]:
        """(variance of a difference of two means over so many seeds and rows, its part due to seeds)."""
        from_seeds = 2 * (self.seed / seeds + self.rest / (n * seeds))
        return from_seeds + 2 * self.rows / n, from_seeds


@dataclass(frozen=True)
class Comparison:
    """What can be said of the entries of a table, in their order."""

    ranks: list[tuple[int, int] | None]
    """First and last possible rank, with 95 % confidence for all of them together."""
    best: list[bool]
    """Whether it may be the best: no other entry is significantly better."""
    p_base: list[float | None]
    """Holm-corrected p value of the difference from the baseline."""
    reasons: list[str]
    """Why an entry has no rank."""
    detectable: float | None = None
    """The smallest difference that a table like this finds with probability `POWER`."""
    half_splits: float | None = None
    """Share of pairs and random half-splits (rows and seeds) in which both halves have the same order."""
    components: Components | None = None

    @property
    def can_rank(self) -> bool:
        """Whether any two entries are told apart."""
        return any(r and r[1] - r[0] + 1 < sum(map(bool, self.ranks)) for r in self.ranks)


def compare(
    entries: Sequence[Entry], baseline: int | None = None, higher_is_better: bool = True, splits: int = SPLITS
) -> Comparison:
    """Compare all entries of a table; the others are tested against the one at the index `baseline`."""
    reasons = [_reason(e) for e in entries]
    rows = _common_rows([e for e, why in zip(entries, reasons, strict=True) if not why])
    values: dict[int, Array] = {}
    for i, entry in enumerate(entries):
        if not reasons[i]:
            values[i], reasons[i] = _values(entry, rows, 1 if higher_is_better else -1)
        if reasons[i]:
            values.pop(i, None)
    nothing = [None] * len(entries)
    fixed = {i for i in values if entries[i].fixed}
    if len(values) < 2 or len(fixed) == len(values):
        alone = "nothing here to compare it with"
        return Comparison(nothing, [False] * len(entries), nothing, [r or alone for r in reasons])
    table = _Table(values, fixed)
    better = table.significantly_better()
    at = {i: position for position, i in enumerate(values)}
    ranks = [
        (1 + int(better[:, at[i]].sum()), len(values) - int(better[at[i]].sum())) if i in at else None
        for i in range(len(entries))
    ]
    best = [i in at and not better[:, at[i]].any() for i in range(len(entries))]
    p_base = nothing
    if baseline in at:
        p = table.p_values_against(at[baseline])
        p_base = holm([p[at[i]] if i in at and i != baseline else None for i in range(len(entries))])
    detectable, stable = table.detectable(), half_splits(values, splits)
    return Comparison(ranks, best, p_base, reasons, detectable, stable, table.components)


def _reason(entry: Entry) -> str:
    if entry.reason:
        return entry.reason
    if not entry.samples:
        return "no outcomes per row"
    if len(entry.samples) < MIN_SEEDS and not entry.fixed:
        return f"{len(entry.samples)} of {MIN_SEEDS} seeds"
    return ""


def _common_rows(entries: Sequence[Entry]) -> tuple:
    """The rows that most runs were scored on."""
    counts = Counter(s.rows for e in entries for s in e.samples.values())
    return counts.most_common(1)[0][0] if counts else ()


def _values(entry: Entry, rows: tuple, sign: int) -> tuple[Array, str]:
    """(K, N): the value of each row in each seed, in the order of `rows`; or why they cannot be had."""
    order: dict = {}
    values = np.empty((len(entry.samples), len(rows)))
    for k, sample in enumerate(entry.samples.values()):
        if sample.rows == rows:
            values[k] = sample.values()
            continue
        if set(sample.rows) != set(rows):
            return np.empty((0, 0)), "scored on other rows than the rest"
        order = order or {row: i for i, row in enumerate(rows)}
        values[k, [order[row] for row in sample.rows]] = sample.values()
    if not np.isfinite(values).all():
        return np.empty((0, 0)), "its metric is undefined without some of the rows"
    return sign * values, ""


class _Table:
    """The differences of a table and their variances.

    `values` holds (K_m, N) per method; those in `fixed` have one run and no seeds.
    """

    def __init__(self, values: dict[int, Array], fixed: set[int]) -> None:
        runs, seeded = list(values.values()), [i not in fixed for i in values]
        self.n, m = runs[0].shape[1], len(runs)
        self.means = np.array([y.mean() for y in runs])
        k = np.array([len(y) for y in runs])
        between = np.array([_mean_square_of_seeds(y) for y in runs])
        rest = np.array([_mean_square_of_rest(y) for y in runs])
        self.seeded = np.array(seeded)
        degrees = (k - 1) * self.seeded
        self.freedom_of_seeds = int(degrees.sum())
        pooled = float(between @ degrees) / self.freedom_of_seeds
        own = np.where(self.seeded, np.maximum(between, pooled), 0.0) / (self.n * k)
        self.from_seeds = own[:, None] + own
        of_rest = np.where(self.seeded, rest / k, 0.0)
        covariance = np.atleast_2d(np.cov(np.array([y.mean(0) for y in runs])))
        variances = np.diag(covariance)
        spread = variances[:, None] + variances - 2 * covariance - of_rest[:, None] - of_rest
        self.from_rows = np.maximum(spread, 0.0) / self.n
        np.fill_diagonal(self.from_rows, 0.0)
        self.variance = self.from_seeds + self.from_rows
        self.pairs = np.triu_indices(m, 1)
        rest_of_all = float(rest @ degrees) / self.freedom_of_seeds
        seeded_pairs = (self.seeded[:, None] & self.seeded)[self.pairs]
        of_rows = self.from_rows[self.pairs][seeded_pairs]
        rows = self.n * float(np.median(of_rows)) / 2 if len(of_rows) else 0.0
        self.components = Components(
            max(pooled - rest_of_all, 0.0) / self.n, rows, rest_of_all, pooled, self.freedom_of_seeds, self.n
        )
        self.freedom = self._freedom()

    def _freedom(self) -> float:
        """Satterthwaite's degrees of freedom of a typical difference."""
        from_seeds = float(np.median(self.from_seeds[self.pairs]))
        from_rows = float(np.median(self.from_rows[self.pairs]))
        total = from_seeds + from_rows
        if not total:
            return float(self.freedom_of_seeds)
        return total**2 / (from_seeds**2 / self.freedom_of_seeds + from_rows**2 / max(self.n - 1, 1))

    def significantly_better(self) -> Array:
        """(M, M) of bool: whether the entry of the row is better than that of the column."""
        limit = critical_range(len(self.means), self.freedom) * np.sqrt(self.variance / 2)
        return self.means[:, None] - self.means > np.maximum(limit, 1e-12)

    def p_values_against(self, baseline: int) -> list[float]:
        """Two-sided p values of t tests of all entries against one; 1 where nothing differs."""
        difference = np.abs(self.means - self.means[baseline])
        deviation = np.sqrt(self.variance[baseline])
        t = np.divide(difference, deviation, out=np.full(len(difference), np.inf), where=deviation > 0)
        return np.where(difference > 1e-12, 2 * stats.t.sf(t, self.freedom), 1.0).tolist()

    def detectable(self) -> float:
        """The smallest difference that is found with probability `POWER`, for a pair of median variance."""
        variance = float(np.median(self.variance[self.pairs]))
        return smallest_difference(variance, len(self.means), self.freedom)


def _mean_square_of_seeds(y: Array) -> float:
    """N times the variance over seeds of the runs' means; 0 for one seed."""
    return y.shape[1] * float(y.mean(1).var(ddof=1)) if len(y) > 1 else 0.0


def _mean_square_of_rest(y: Array) -> float:
    """The mean square of what the means of rows and of seeds leave; 0 for one seed or one row."""
    (k, n), rest = y.shape, y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    return float((rest**2).sum()) / ((k - 1) * (n - 1)) if k > 1 and n > 1 else 0.0


def smallest_difference(variance: float, methods: int, freedom: float) -> float:
    """The difference of two methods that is significant with probability `POWER`.

    `variance`: of the difference; `methods`: compared in the table; `freedom`: degrees of freedom.
    """
    deviation = variance**0.5
    limit = critical_range(methods, freedom) / 2**0.5
    return float(deviation * (limit + stats.t.ppf(POWER, freedom)))


def critical_range(methods: int, freedom: float) -> float:
    """The 95 % point of the studentised range of so many means; degrees of freedom are rounded down."""
    return _critical_range(max(methods, 2), max(int(freedom), 1) if freedom < 100 else 100)


@lru_cache(maxsize=1024)
def _critical_range(methods: int, freedom: int) -> float:
    return float(stats.studentized_range.ppf(1 - SIGNIFICANCE, methods, freedom))


def half_splits(values: dict[int, Array], splits: int = SPLITS) -> float | None:
    """Share of pairs of methods and of random half-splits in which both halves have the same order.

    Rows and, in each method with several, seeds are split. None for fewer than two methods or four rows, and
    without any splits.
    """
    n = next(iter(values.values())).shape[1]
    if len(values) < 2 or n < 4 or not splits:
        return None
    rng, same, pairs = np.random.default_rng(0), 0.0, np.triu_indices(len(values), 1)
    runs, sizes = np.concatenate([*values.values()]), [len(y) for y in values.values()]
    for _ in range(splits):
        rows, means = rng.permutation(n), np.empty((2, len(values)))
        sums = [runs[:, rows[half::2]].sum(1) for half in (0, 1)]
        start = 0
        for m, size in enumerate(sizes):
            seeds = start + rng.permutation(size)
            start += size
            for half in (0, 1):
                drawn = seeds[half::2] if size > 1 else seeds
                means[half, m] = sums[half][drawn].sum() / (len(drawn) * len(rows[half::2]))
        order = np.sign(means[:, :, None] - means[:, None, :])
        same += float((order[0] == order[1])[pairs].mean())
    return same / splits


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p values corrected for multiple tests by Holm's step-down method; a None stays and does not count."""
    ascending = sorted((v, i) for i, v in enumerate(p) if v is not None)
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for position, (value, i) in enumerate(ascending):
        largest = max(largest, min(1.0, (len(ascending) - position) * value))
        corrected[i] = largest
    return corrected
