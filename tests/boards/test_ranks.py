"""Intervals, paired tests, corrections and ranks against scipy and statsmodels; damaged side files."""

from __future__ import annotations

import gzip
import hashlib
import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from peftzoo.boards import ranks
from peftzoo.errors import UserError
from peftzoo.records import outcomes, store
from peftzoo.records.metric_terms import METRICS, Sample, mean_terms
from peftzoo.records.schema import Record
from peftzoo.scoring import metrics
from tests.boards.test_tables import make


def by_seed(values: np.ndarray) -> ranks.SamplesBySeed:
    """Samples from right (1) and wrong (0) answers (seeds, n)."""
    rows = tuple(range(values.shape[1]))
    return {s: Sample(rows, mean_terms(v)) for s, v in enumerate(values)}


def guesses(rng: np.random.Generator, right: float, seeds: int = 1, n: int = 200) -> ranks.SamplesBySeed:
    """Independent answers that are right with this probability."""
    return by_seed((rng.random((seeds, n)) < right).astype(float))


# -- tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_mcnemar_is_statsmodels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 150)) < rng.uniform(0.3, 0.9, (2, 1))
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    expected = mcnemar(table, exact=True).pvalue
    p = ranks.paired_p_value(by_seed(a[None].astype(float)), by_seed(b[None].astype(float)))
    assert p == pytest.approx(min(expected, 1.0), rel=1e-9)


def test_several_seeds_are_one_pair_per_row() -> None:
    """Three copies of the same outcomes tell no more than one of them."""
    rng = np.random.default_rng()
    a, b = (rng.random((1, 100)) < 0.7).astype(float), (rng.random((1, 100)) < 0.5).astype(float)
    once = ranks.paired_p_value(by_seed(a), by_seed(b))
    assert ranks.paired_p_value(by_seed(a.repeat(3, 0)), by_seed(b.repeat(3, 0))) == pytest.approx(
        once, abs=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_several_seeds_are_tested_as_scipy_tosses_signs(seed: int) -> None:
    """All 2^12 ways to swap the two methods on a row, by scipy's own count."""
    rng = np.random.default_rng(seed)
    a, b = (rng.random((2, 3, 12)) < rng.uniform(0.2, 0.9, (2, 1, 1))).astype(float)
    expected = stats.permutation_test(
        (a.sum(0), b.sum(0)), lambda x, y, axis: (x - y).sum(axis=axis), permutation_type="samples",
        n_resamples=np.inf, vectorized=True,
    ).pvalue  # fmt: skip
    assert ranks.paired_p_value(by_seed(a), by_seed(b)) == pytest.approx(min(expected, 1.0), rel=1e-9)


def test_what_is_better_on_average_is_not_beaten_by_the_count_of_rows() -> None:
    """Far better on some rows, a little worse on more: the mean over seeds and rows decides."""
    a, b = np.zeros((3, 400)), np.zeros((3, 400))
    a[:, :100] = 1
    a[:2, 100:260] = b[:, 100:260] = 1
    p = ranks.paired_p_value(by_seed(a), by_seed(b))
    assert a.mean() > b.mean() and p < 0.05
    few = (a[:, 50:] - b[:, 50:]).sum()
    assert few < 0, "the example must turn with its rows"
    assert ranks.ranks([by_seed(a), by_seed(b)], [True, True]) == [1, 2]


def test_only_common_seeds_and_rows_count() -> None:
    rng = np.random.default_rng()
    a, b = guesses(rng, 0.9, 3), guesses(rng, 0.4, 3)
    expected = ranks.paired_p_value({1: a[1]}, {1: b[1]})
    assert ranks.paired_p_value({1: a[1], 5: a[0]}, {1: b[1], 6: b[0]}) == expected
    assert ranks.paired_p_value({0: a[0]}, {1: b[1]}) is None
    other = {0: Sample(tuple(range(1, 201)), b[0].terms)}
    assert ranks.paired_p_value(a, other) is None, "other rows were compared"


def test_a_test_of_equals_is_rarely_significant_and_of_unequals_often() -> None:
    rng = np.random.default_rng(0)
    equals = [ranks.paired_p_value(guesses(rng, 0.6, 3), guesses(rng, 0.6, 3)) for _ in range(300)]
    unequals = [ranks.paired_p_value(guesses(rng, 0.7, 3), guesses(rng, 0.5, 3)) for _ in range(50)]
    assert np.mean(np.array(equals) < 0.05) < 0.07 and np.mean(np.array(unequals) < 0.05) > 0.9


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.12, 0.3])
def test_the_bootstrap_of_a_mean_agrees_with_the_t_test(shift: float) -> None:
    rng = np.random.default_rng(int(shift * 100))
    a, b = rng.normal(size=(2, 1, 400))
    p = ranks.paired_p_value(by_seed(a + shift), by_seed(b))
    assert p == pytest.approx(stats.ttest_rel(a[0] + shift, b[0]).pvalue, abs=0.02)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_from_its_terms_is_the_metric(name: str) -> None:
    rng = np.random.default_rng()
    for n, scale in ((40, 1.0), (300, 1e-4)):
        if name == "pearson":
            r = rng.normal(size=n) * scale + 3
            p = r + rng.normal(size=n) * scale
        else:
            p, r = rng.integers(0, 2 if name == "f1" else 3, (2, n)).astype(float)
        terms, metric = METRICS[name]
        sample = Sample(tuple(range(n)), terms(p, r), metric)
        assert sample.value() == pytest.approx(metrics.METRICS[name](p, r))
        counts = ranks._resample_counts(n, sample.rows)
        values = ranks.bootstrap_metric(sample)
        for i in rng.integers(0, len(values), 5):
            drawn = np.repeat(np.arange(n), counts[i].astype(int))
            assert values[i] == pytest.approx(metrics.METRICS[name](p[drawn], r[drawn]), abs=2e-4)


def test_a_correlation_is_compared_on_the_same_rows() -> None:
    rng, rows = np.random.default_rng(1), tuple(range(200))
    terms, metric = METRICS["pearson"]
    equals, unequals = [], []
    for _ in range(20):
        r = rng.normal(size=200)
        good, same, bad = (r + rng.normal(size=200) * s for s in (0.8, 0.8, 1.6))
        a, b, c = ({0: Sample(rows, terms(x, r), metric)} for x in (good, same, bad))
        equals.append(ranks.paired_p_value(a, b))
        unequals.append(ranks.paired_p_value(a, c))
    assert ranks.paired_p_value(a, a) == 1.0
    assert np.mean(np.array(equals) < 0.05) < 0.25 and np.mean(np.array(unequals) < 0.05) > 0.9
    constant = {0: Sample(rows, terms(np.ones(200), r), metric)}
    assert ranks.paired_p_value(a, constant) is None, "an undefined metric was compared"


# -- corrections and ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 66])
def test_holm_is_statsmodels(n: int) -> None:
    p = np.random.default_rng(n).random(n) ** 3
    assert ranks.holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])
    gaps = [*p[: n // 2], None, *p[n // 2 :]]
    assert [v for v in ranks.holm(gaps) if v is not None] == pytest.approx(multipletests(p, method="holm")[1])


def test_rows_that_cannot_be_told_apart_share_a_rank() -> None:
    rng = np.random.default_rng(3)
    base = rng.random((3, 500))
    near = base + rng.normal(size=base.shape) * 0.01
    cases = ((base, 0.9), (near, 0.9), (base, 0.6), (base, 0.3))
    methods = [by_seed((x < q).astype(float)) for x, q in cases]
    assert ranks.ranks(methods, [True] * 4) == [1, 1, 3, 4]
    assert ranks.ranks(methods, [True, False, True, True]) == [1, None, 2, 3]
    assert ranks.ranks(methods, [False] * 4) == [None] * 4
    assert ranks.ranks([], []) == []
    other_seeds = {s + 7: sample for s, sample in methods[3].items()}
    assert ranks.ranks([*methods[:3], other_seeds], [True] * 4) == [1, 1, 3, None], (
        "no seed in common, yet ranked"
    )


def test_every_rank_is_one_plus_the_number_of_better_ranked_rows() -> None:
    rng = np.random.default_rng()
    methods = [guesses(rng, q, 3, 80) for q in sorted(rng.uniform(0.2, 0.9, 12), reverse=True)]
    result = ranks.ranks(methods, [True] * 12)
    assert all(r == 1 + sum(s < r for s in result) for r in result) and result[0] == 1


# -- the side file --------------------------------------------------------------------------------------


def written(tmp_path, lines: list[dict], **changes) -> Record:
    record = make(**changes)
    store.write(tmp_path, record, lines)
    return store.read(record.file)


def right(values, **more) -> list[dict]:
    return [{"row": i, "filter": "none", "answer": [], "acc": v} | more for i, v in enumerate(values)]


def test_outcomes_make_the_score(tmp_path) -> None:
    values = np.random.default_rng().integers(0, 2, 30).astype(float).tolist()
    other = [o | {"filter": "lenient", "acc": 1.0} for o in right(values)]
    sample = outcomes.sample(written(tmp_path, right(values) + other))
    assert sample.binary and sample.value() == pytest.approx(np.mean(values))
    strict = {"metric": "exact_match,strict", "value": 0.5, "rows": 30}
    lines = [{"row": i, "filter": f, "exact_match": float(f == "strict")}
             for i, f in itertools.product(range(30), ("strict", "lenient"))]  # fmt: skip
    assert outcomes.sample(written(tmp_path, lines, score=strict)).value() == 1.0


def test_outcomes_of_a_head_make_the_score(tmp_path) -> None:
    rng = np.random.default_rng()
    lines = [{"row": i, "answer": float(a), "reference": float(r)}
             for i, (a, r) in enumerate(rng.normal(size=(40, 2)))]  # fmt: skip
    score = {"metric": "pearson", "value": 0.5, "rows": 40}
    expected = stats.pearsonr(*([o[k] for o in lines] for k in ("answer", "reference")))[0]
    assert outcomes.sample(written(tmp_path, lines, score=score)).value() == pytest.approx(expected)
    bare = [{k: o[k] for k in ("row", "answer")} for o in lines]
    assert outcomes.sample(written(tmp_path, bare, score=score)) is None, "made up references"


def test_outcomes_of_several_tasks_make_their_mean(tmp_path) -> None:
    lines = right([1, 1, 0, 0], task="a") + right([1] * 10, task="b")
    score = {"metric": "mean", "value": 0.75, "rows": 14, "others": {"a/acc": 0.5, "b/acc": 1.0}}
    assert outcomes.sample(written(tmp_path, lines, score=score)).value() == pytest.approx(0.75)


BAD = {
    "no gzip": b"hello", "truncated": gzip.compress(b'{"row": 0}' * 99)[:20],
    "no json": gzip.compress(b"{row}"), "a list": gzip.compress(b"[1]"),
    "nested": gzip.compress(b"[" * 100_000), "no utf-8": gzip.compress(b'{"row": "\xff"}'),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_side_file_is_named(tmp_path, kind: str) -> None:
    record = written(tmp_path, right([1]))
    side = record.file.with_suffix(".examples.jsonl.gz")
    side.write_bytes(BAD[kind])
    with pytest.raises(UserError, match="sha256"):
        outcomes.read(record)
    record.examples["sha256"] = hashlib.sha256(BAD[kind]).hexdigest()
    with pytest.raises(UserError, match=side.name) as error:
        outcomes.read(record)
    assert "\n" not in str(error.value)


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(outcomes, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(UserError, match="more than"):
        outcomes.read(written(tmp_path, right([1] * 500)))


def test_a_record_cannot_name_a_file_elsewhere(tmp_path) -> None:
    record = written(tmp_path, right([1]))
    record.examples["file"] = "../../secret.gz"
    with pytest.raises(UserError, match="another file"):
        outcomes.read(record)


@pytest.mark.parametrize("odd", [{"acc": "x"}, {"acc": None}, {"acc": [1]}, {"acc": 10**400}, {"row": "x"},
                                 {"row": 1}, {"acc": {}}])  # fmt: skip
def test_odd_outcomes_give_no_test(tmp_path, odd: dict) -> None:
    lines = [*right([1, 0]), {"row": 2, "acc": 1, "filter": "none"} | odd]
    assert outcomes.sample(written(tmp_path, lines)) is None
