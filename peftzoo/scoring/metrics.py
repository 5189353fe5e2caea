"""Metrics for trained heads.

A metric that is not defined (a constant prediction has no correlation) is None, never NaN; `UNDEFINED` says
why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from peftzoo.errors import UserError, unknown

Values = np.ndarray


def accuracy(p: Values, r: Values) -> float:
    """Share of rows whose predicted label is the reference."""
    return float(np.mean(p == r))


def f1(p: Values, r: Values) -> float:
    """Harmonic mean of precision and recall of the label 1."""
    marked = int(np.sum(p == 1) + np.sum(r == 1))
    return 2 * int(np.sum((p == 1) & (r == 1))) / marked if marked else math.nan


def matthews(p: Values, r: Values) -> float:
    """Matthews correlation: that of the labels' indicators, which is Pearson's for two labels."""
    kinds = np.unique(np.concatenate([p, r]))
    x, y = ((v[:, None] == kinds).astype(float) for v in (p, r))
    x, y = x - x.mean(0), y - y.mean(0)
    spread = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread) if spread else math.nan


def pearson(p: Values, r: Values) -> float:
    """Linear correlation."""
    return _quiet(stats.pearsonr, p, r)


def spearman(p: Values, r: Values) -> float:
    """Rank correlation."""
    return _quiet(stats.spearmanr, p, r)


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "acc": accuracy, "f1": f1, "mcc": matthews, "pearson": pearson, "spearman": spearman,
}  # fmt: skip
"""Of predictions and references, one number each per row; NaN where the metric is not defined."""

_CONSTANT = "all predictions, or all references, are the same"
UNDEFINED = {
    "f1": "neither predictions nor references have the label 1",
    "mcc": _CONSTANT,
    "pearson": _CONSTANT,
    "spearman": _CONSTANT,
}
"""Why a metric has no value, where it has none for finite predictions."""


def _quiet(correlation: Any, p: Values, r: Values) -> float:
    if len(p) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant input; the NaN becomes None in compute()
        return float(correlation(p, r)[0])


def compute(names: list[str], predictions: list[float], references: list[float]) -> dict[str, float | None]:
    """Each named metric on these rows. Raises `UserError` for an unknown name or no rows."""
    if not predictions:
        raise UserError("no rows to score: raise --limit")
    p, r = np.asarray(predictions, float), np.asarray(references, float)
    out: dict[str, float | None] = {}
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        value = METRICS[name](p, r)
        out[name] = value if math.isfinite(value) else None
    return out


def standard_error(
    name: str, predictions: list[float], references: list[float], rounds: int = 200
) -> float | None:
    """Standard error over rows: binomial for accuracy, bootstrap (fixed seed) for the others."""
    p, r = np.asarray(predictions, float), np.asarray(references, float)
    if name == "acc":
        hits = p == r
        return float(hits.std(ddof=1) / len(hits) ** 0.5) if len(hits) > 1 else None
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(p), len(p)) for _ in range(rounds)]
    values = np.array([METRICS[name](p[d], r[d]) for d in draws])
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else None
