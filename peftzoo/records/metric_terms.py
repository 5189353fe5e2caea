"""Metrics as functions of means over rows, so that a bootstrap can recompute them on resampled rows.

Each scored row has m terms; the metric is a function of the m means of these terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def mean_terms(values: Array) -> Array:
    """(n, 1) for values (n,) whose mean is the metric, such as accuracy."""
    return np.asarray(values, float)[:, None]


def f1_terms(answers: Array, references: Array) -> Array:
    """(n, 2) for labels (n,): true positives a, and predicted plus actual positives b; F1 is 2 a / b."""
    predicted, actual = answers == 1, references == 1
    return np.stack([predicted & actual, predicted.astype(int) + actual], 1).astype(float)


def correlation_terms(x: Array, y: Array) -> Array:
    """(n, 2k + 3) for x, y (n, k): x, y, |x|^2, |y|^2 and x.y, after both are centred and scaled."""
    x, y = ((v - v.mean(0)) / (v.std() or 1.0) for v in (x, y))
    squares = np.stack([(x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], 1)
    return np.concatenate([x, y, squares], 1)


def matthews_terms(answers: Array, references: Array) -> Array:
    """`correlation_terms` of one-hot labels, which give the Matthews correlation of any number of classes."""
    classes = np.unique(np.concatenate([answers, references]))
    return correlation_terms(*((v[:, None] == classes).astype(float) for v in (answers, references)))


def _ranks(values: Array) -> Array:
    """(n, 1): ranks of the values (n,), ties shared. They are taken once, over all rows."""
    from scipy import stats  # takes a second to import

    return stats.rankdata(values)[:, None]


def _correlation(means: Array) -> Array:
    """(B,) correlations for means (B, 2k + 3) of `correlation_terms`; NaN where one side is constant."""
    k = (means.shape[1] - 3) // 2
    x, y, (xx, yy, xy) = means[:, :k], means[:, k : 2 * k], means[:, 2 * k :].T
    variances = (xx - (x * x).sum(1)) * (yy - (y * y).sum(1))
    return (xy - (x * y).sum(1)) / np.sqrt(np.where(variances > 1e-9, variances, np.nan))


def _f1(means: Array) -> Array:
    """(B,) F1 scores for means (B, 2) of `f1_terms`; NaN where label 1 is neither predicted nor actual."""
    return 2 * means[:, 0] / np.where(means[:, 1] > 0, means[:, 1], np.nan)


METRICS: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array], Array]]] = {
    "acc": (lambda a, r: mean_terms(a == r), lambda means: means[:, 0]),
    "f1": (f1_terms, _f1),
    "mcc": (matthews_terms, _correlation),
    "pearson": (lambda a, r: correlation_terms(a[:, None], r[:, None]), _correlation),
    "spearman": (lambda a, r: correlation_terms(_ranks(a), _ranks(r)), _correlation),
}
"""Metric name -> (terms (n, m) from answers and references (n,), metrics (B,) from mean terms (B, m))."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The outcomes of one run: row ids (n,), the terms (n, m) of each row, and the metric of mean terms."""

    rows: tuple
    terms: Array
    metric: Callable[[Array], Array] = METRICS["acc"][1]

    def values(self) -> Array:
        """(n,): what each row contributes; the mean is the metric.

        The row's own value where the metric is a mean over rows, else its jackknife pseudo-value n theta -
        (n - 1) theta_without_the_row (Quenouille 1956), shifted so that the mean is the metric. NaN where the
        metric is undefined without a row.
        """
        if self.metric is METRICS["acc"][1]:
            return self.terms[:, 0]
        n, mean = len(self.rows), self.terms.mean(0)
        without = (n * mean - self.terms) / max(n - 1, 1)
        pseudo = n * self.value() - (n - 1) * self.metric(without)
        return pseudo - pseudo.mean() + self.value()

    def value(self) -> float:
        """The metric over all rows."""
        return float(self.metric(self.terms.mean(0, keepdims=True))[0])
