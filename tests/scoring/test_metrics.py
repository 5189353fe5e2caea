"""Metrics against scikit-learn and scipy; standard errors against formulas and a large bootstrap."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from peftzoo.errors import UserError
from peftzoo.scoring import metrics

ALL = list(metrics.METRICS)


def numbers(seed: int, n: int = 60, noise: float = 1.0) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    references = rng.normal(size=n)
    return (references + noise * rng.normal(size=n)).tolist(), references.tolist()


def labels(seed: int, n: int = 60, kinds: int = 3) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, kinds, n).astype(float).tolist(), rng.integers(0, kinds, n).astype(float).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_is_scikit_learns(seed: int) -> None:
    p, r = labels(seed)
    assert metrics.compute(["acc"], p, r) == {"acc": pytest.approx(accuracy_score(r, p))}


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys(seed: int) -> None:
    for p, r in (numbers(seed), labels(seed)):  # labels: many ties
        values = metrics.compute(["pearson", "spearman"], p, r)
        assert values["pearson"] == pytest.approx(stats.pearsonr(p, r)[0])
        assert values["spearman"] == pytest.approx(stats.spearmanr(p, r)[0])


@pytest.mark.parametrize("seed", range(5))
def test_f1_and_mcc_are_scikit_learns(seed: int) -> None:
    p, r = labels(seed, kinds=2)
    assert metrics.compute(["f1"], p, r)["f1"] == pytest.approx(f1_score(r, p))
    for q, s in ((p, r), labels(seed + 50), ([1 - x for x in r], r)):
        assert metrics.compute(["mcc"], q, s)["mcc"] == pytest.approx(matthews_corrcoef(s, q))


@pytest.mark.parametrize("name", ["mcc", "pearson", "spearman"])
@pytest.mark.parametrize("constant", ["predictions", "references", "both"])
def test_a_correlation_with_a_constant_is_none_and_silent(name: str, constant: str) -> None:
    p, r = numbers(0)
    p = [1.5] * 60 if constant in ("predictions", "both") else p
    r = [2.0] * 60 if constant in ("references", "both") else r
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.compute([name], p, r) == {name: None}
        assert metrics.standard_error(name, p, r) is None
    assert name in metrics.UNDEFINED


def test_f1_of_constant_labels_is_scikit_learns_where_it_is_defined() -> None:
    _, r = labels(0, kinds=2)
    always, never = [1.0] * len(r), [0.0] * len(r)
    assert metrics.compute(["f1"], always, r)["f1"] == pytest.approx(f1_score(r, always))
    assert metrics.compute(["f1"], never, r) == {"f1": 0.0} == {"f1": f1_score(r, never)}
    assert metrics.compute(["f1"], never, never) == {"f1": None} and "f1" in metrics.UNDEFINED


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [([1.0], [1.0]), ([1.0, 1.0], [1.0, 0.0]), ([1.0, 2.0], [2.0, 1.0])])
def test_few_rows_never_give_nan(name: str, rows) -> None:
    for value in (metrics.compute([name], *rows)[name], metrics.standard_error(name, *rows)):
        assert value is None or math.isfinite(value)


@pytest.mark.parametrize("name", ALL)
def test_predictions_that_are_not_numbers_give_none_or_less(name: str) -> None:
    p, r = numbers(0)
    p[3] = float("nan")
    value = metrics.compute([name], p, r)[name]
    assert value is None or math.isfinite(value)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
def test_the_error_of_an_accuracy_is_binomial(rate: float) -> None:
    n = 2000
    p = [1.0] * int(rate * n) + [0.0] * (n - int(rate * n))
    expected = math.sqrt(rate * (1 - rate) / n)
    assert metrics.standard_error("acc", p, [1.0] * n) == pytest.approx(expected, rel=1e-3)


def agreeing(seed: int, n: int, share: float) -> tuple[list[float], list[float]]:
    """Labels of which about this share agree."""
    rng = np.random.default_rng(seed)
    references = rng.random(n) < 0.4
    return (references ^ (rng.random(n) > share)).astype(float).tolist(), references.astype(float).tolist()


REFERENCES = {
    "pearson": lambda p, r: stats.pearsonr(p, r)[0],
    "spearman": lambda p, r: stats.spearmanr(p, r)[0],
    "f1": lambda p, r: f1_score(r, p),
    "mcc": lambda p, r: matthews_corrcoef(r, p),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_the_error_is_that_of_a_large_bootstrap(name: str, noise: float) -> None:
    p, r = agreeing(1, 200, 1 - noise / 5) if name in ("f1", "mcc") else numbers(1, 200, noise)
    rng = np.random.default_rng(5)
    draws = [rng.integers(0, 200, 200) for _ in range(1000)]
    large = np.std([REFERENCES[name](np.array(p)[d], np.array(r)[d]) for d in draws], ddof=1)
    assert metrics.standard_error(name, p, r) == pytest.approx(large, rel=0.2)


def test_errors_are_the_same_every_time_and_leave_no_trace() -> None:
    p, r = numbers(2)
    before = np.random.get_state()[1].copy()
    assert metrics.standard_error("pearson", p, r) == metrics.standard_error("pearson", p, r)
    assert np.array_equal(before, np.random.get_state()[1])


def test_the_error_shrinks_with_the_root_of_the_rows() -> None:
    small, large = (metrics.standard_error("pearson", *numbers(3, n, 1.0)) for n in (100, 1600))
    assert 2.5 < small / large < 6


def test_unknown_metrics_and_no_rows_are_the_users_errors() -> None:
    with pytest.raises(UserError, match='unknown metric "pearsn": did you mean "pearson"'):
        metrics.compute(["pearsn"], [1.0], [1.0])
    with pytest.raises(UserError, match="no rows"):
        metrics.compute(["acc"], [], [])
