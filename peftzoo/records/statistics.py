"""What a metric is made of: parts per scored row, whose means give the metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def share(values: Array) -> Array:
    """(n, 1): values per row, whose mean is the metric."""
    return np.asarray(values, float)[:, None]


def labels(answers: Array, references: Array) -> Array:
    """(n, 2): right answers of label 1, and how often 1 was said or wanted: F1 is 2 a / b."""
    said, wanted = answers == 1, references == 1
    return np.stack([said & wanted, said.astype(int) + wanted], 1).astype(float)


def moments(x: Array, y: Array) -> Array:
    """(n, 2k + 3) for x, y (n, k): what the correlation of their centred columns is made of."""
    x, y = ((v - v.mean(0)) / (v.std() or 1.0) for v in (x, y))
    squares = np.stack([(x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], 1)
    return np.concatenate([x, y, squares], 1)


def indicators(answers: Array, references: Array) -> Array:
    """`moments` of the labels' indicators: Matthews correlation."""
    kinds = np.unique(np.concatenate([answers, references]))
    return moments(*((v[:, None] == kinds).astype(float) for v in (answers, references)))


def _correlation(means: Array) -> Array:
    k = (means.shape[1] - 3) // 2
    x, y, (xx, yy, xy) = means[:, :k], means[:, k : 2 * k], means[:, 2 * k :].T
    spread = (xx - (x * x).sum(1)) * (yy - (y * y).sum(1))
    return (xy - (x * y).sum(1)) / np.sqrt(np.where(spread > 1e-9, spread, np.nan))


def _f1(means: Array) -> Array:
    return 2 * means[:, 0] / np.where(means[:, 1] > 0, means[:, 1], np.nan)


METRICS: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array], Array]]] = {
    "acc": (lambda a, r: share(a == r), lambda means: means[:, 0]),
    "f1": (labels, _f1),
    "mcc": (indicators, _correlation),
    "pearson": (lambda a, r: moments(a[:, None], r[:, None]), _correlation),
}
"""Metrics of answers and references that come from means over rows: rows to parts, mean parts to metric."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The outcomes of one run: which rows, and for each the parts (n, m) that its metric is made of."""

    rows: tuple
    parts: Array
    of: Callable[[Array], Array] = METRICS["acc"][1]

    @property
    def binary(self) -> bool:
        """Whether each row is right or wrong, and the metric is the share of right ones."""
        return self.of is METRICS["acc"][1] and bool(np.isin(self.parts, (0, 1)).all())

    def value(self) -> float:
        return float(self.of(self.parts.mean(0, keepdims=True))[0])
