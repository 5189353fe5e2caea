"""Metrics for trained heads, of predictions p (N,) and references r (N,).

A metric that is not defined (a constant prediction has no correlation) is None, never NaN; `UNDEFINED` says
why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np

from peftzoo.errors import UserError, unknown

Values = np.ndarray


def accuracy(p: Values, r: Values) -> float:
    """The share of rows whose prediction is the reference."""
    return float(np.mean(p == r))


def f1(p: Values, r: Values) -> float:
    """The harmonic mean of precision and recall of the label 1; NaN if no row has it."""
    marked = int(np.sum(p == 1) + np.sum(r == 1))
    return 2 * int(np.sum((p == 1) & (r == 1))) / marked if marked else math.nan


def matthews(p: Values, r: Values) -> float:
    """Matthews correlation coefficient: the correlation of one-hot labels; Pearson's for two labels.

    For several labels as in Gorodkin (2004), "Comparing two K-category assignments by a K-category
    correlation coefficient".
    """
    classes = np.unique(np.concatenate([p, r]))
    x, y = ((v[:, None] == classes).astype(float) for v in (p, r))
    x, y = x - x.mean(0), y - y.mean(0)
    spread = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread) if spread else math.nan


def pearson(p: Values, r: Values) -> float:
    """Pearson's linear correlation; NaN if one side is constant."""
    return _correlation("pearsonr", p, r)


def spearman(p: Values, r: Values) -> float:
    """Spearman's rank correlation; NaN if one side is constant."""
    return _correlation("spearmanr", p, r)


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "acc": accuracy, "f1": f1, "mcc": matthews, "pearson": pearson, "spearman": spearman,
}  # fmt: skip
"""Name -> function of predictions (N,) and references (N,); it gives NaN where the metric is not defined."""

_CONSTANT = "all predictions, or all references, are the same"
UNDEFINED = {
    "f1": "neither predictions nor references have the label 1",
    "mcc": _CONSTANT,
    "pearson": _CONSTANT,
    "spearman": _CONSTANT,
}
"""Why a metric has no value, where it has none for finite predictions."""


def _correlation(function: str, p: Values, r: Values) -> float:
    """The coefficient of this function of `scipy.stats`, without warnings; NaN for fewer than two rows."""
    if len(p) < 2:
        return math.nan
    from scipy import stats  # takes a second to import, which most runs do not need

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant input; the NaN becomes None in compute()
        return float(getattr(stats, function)(p, r)[0])


def compute(names: list[str], predictions: list[float], references: list[float]) -> dict[str, float | None]:
    """Each named metric, None where it is not defined. Raises `UserError` for an unknown name or no rows."""
    if not predictions:
        raise UserError("no rows to score: raise --limit")
    p, r = np.asarray(predictions, float), np.asarray(references, float)
    values: dict[str, float | None] = {}
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        value = METRICS[name](p, r)
        values[name] = value if math.isfinite(value) else None
    return values


def standard_error(
    name: str, predictions: list[float], references: list[float], rounds: int = 200
) -> float | None:
    """Standard error over rows: binomial for accuracy, bootstrap (`rounds` resamples, fixed seed) for others.

    None where it is not defined.
    """
    p, r = np.asarray(predictions, float), np.asarray(references, float)
    if name == "acc":
        correct = p == r
        return float(correct.std(ddof=1) / len(correct) ** 0.5) if len(correct) > 1 else None
    rng = np.random.default_rng(0)
    resamples = [rng.integers(0, len(p), len(p)) for _ in range(rounds)]
    values = np.array([METRICS[name](p[rows], r[rows]) for rows in resamples])
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else None
