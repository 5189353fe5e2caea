"""Metrics for trained heads: `evaluate` modules that live here, so that no network is needed.

A metric that is not defined (a constant prediction has no correlation) is None, never NaN; `UNDEFINED` says
why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats

from peftzoo.errors import UserError, unknown

Values = np.ndarray


class _Head(evaluate.Metric):
    """Predictions and references, one number each per row."""

    key: str
    of: Callable[[Values, Values], float]

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=_Head.__doc__ or "",
            features=features,
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.key: self.of(np.asarray(predictions, float), np.asarray(references, float))}


class Accuracy(_Head):
    """Share of rows whose predicted label is the reference."""

    key = "acc"

    @staticmethod
    def of(p: Values, r: Values) -> float:
        return float(np.mean(p == r))


class F1(_Head):
    """Harmonic mean of precision and recall of the label 1."""

    key = "f1"

    @staticmethod
    def of(p: Values, r: Values) -> float:
        marked = int(np.sum(p == 1) + np.sum(r == 1))
        return 2 * int(np.sum((p == 1) & (r == 1))) / marked if marked else math.nan


class Matthews(_Head):
    """Matthews correlation: that of the labels' indicators, which is Pearson's for two labels."""

    key = "mcc"

    @staticmethod
    def of(p: Values, r: Values) -> float:
        kinds = np.unique(np.concatenate([p, r]))
        x, y = ((v[:, None] == kinds).astype(float) for v in (p, r))
        x, y = x - x.mean(0), y - y.mean(0)
        spread = math.sqrt((x * x).sum() * (y * y).sum())
        return float((x * y).sum() / spread) if spread else math.nan


class Pearson(_Head):
    """Linear correlation."""

    key = "pearson"

    @staticmethod
    def of(p: Values, r: Values) -> float:
        return _quiet(stats.pearsonr, p, r)


class Spearman(_Head):
    """Rank correlation."""

    key = "spearman"

    @staticmethod
    def of(p: Values, r: Values) -> float:
        return _quiet(stats.spearmanr, p, r)


METRICS: dict[str, type[_Head]] = {m.key: m for m in (Accuracy, F1, Matthews, Pearson, Spearman)}

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
    out: dict[str, float | None] = {}
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        value = METRICS[name]().compute(predictions=predictions, references=references)[name]
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
    values = np.array([METRICS[name].of(p[d], r[d]) for d in draws])
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else None
