"""Tuned runs beside those with the defaults: pairs, gains, ranges of rates, both rankings, and the plots."""

from __future__ import annotations

import io
import json
import re
import warnings
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from peftzoo.boards import formats, pages, rate_plots, tables, tuning
from peftzoo.records import store
from peftzoo.records.schema import Record
from tests.boards.test_pages import Page
from tests.boards.test_tables import HOSTILE, make

BUDGET = {"sampler": "lr-grid", "by": "loss", "points": 7}
GRID = {lr: [0.9, 0.9, 0.9] for lr in (1e-4, 1e-2)} | {1e-3: [0.4, 0.5, 0.6]}
"""Losses by rate: the best is 1e-3, and both neighbours are far above it."""


def entries(losses: dict[float, list], steps: int = 100, broken: dict[float, int] | None = None) -> list:
    """What a search tried in one of its rounds, as it stands in the record."""
    return [
        {"values": {"lr": lr}, "steps": steps, "losses": values, "breakdowns": (broken or {}).get(lr, 0)}
        for lr, values in losses.items()
    ]


def default(method: str, scores: list[float], lr: float = 1e-3, seeds=None, **changes) -> list[Record]:
    """Runs with the default rate, a score per seed."""
    train = {"lr": lr} | changes.pop("train", {})
    seeds = range(len(scores)) if seeds is None else seeds
    return [make(method, s, v, train=train, **changes) for s, v in zip(seeds, scores, strict=True)]


def tuned(method: str, scores: list[float], lr: float = 1e-2, tried=None, **changes) -> list[Record]:
    """Final runs after a search that chose `lr`; the default is 1e-3."""
    facts = {"budget": BUDGET, "default": {"lr": 1e-3}, "chosen": {"lr": lr}, "start_loss": 2.0,
             "tried": entries(GRID) if tried is None else tried} | changes.pop("facts", {})  # fmt: skip
    return default(method, scores, lr=lr, tuning=facts, **changes)


def board(records: list[Record]) -> list:
    return tuning.beside_default(tables.tables(records))


def effect(records: list[Record]) -> tuning.Effect:
    (found,) = [t.attrs["tuning"] for _, t in board(records) if "tuning" in t.attrs]
    return found


def only_row(records: list[Record]) -> tuning.Row:
    (row,) = effect(records).rows
    return row


# -- the gain and its interval ---------------------------------------------------------------------------

BEFORE, AFTER = [0.50, 0.55, 0.61, 0.52, 0.58], [0.56, 0.63, 0.62, 0.60, 0.61]


def test_the_gain_is_paired_where_the_seeds_are_the_same() -> None:
    row = only_row(default("lora", BEFORE) + tuned("lora", AFTER[::-1], seeds=[4, 3, 2, 1, 0]))
    reference = stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.95)
    assert (row.gain_low, row.gain_high) == pytest.approx(tuple(reference)) and row.paired
    assert row.gain == pytest.approx(np.mean(AFTER) - np.mean(BEFORE))
    assert (row.default_score, row.score) == pytest.approx((np.mean(BEFORE), np.mean(AFTER)))
    assert (row.default_lr, row.lr, row.default_seeds) == (1e-3, 1e-2, 5)


@pytest.mark.parametrize("seeds", [[5, 6, 7], [0, 1, 2], [1, 2, 3, 4, 5]])
def test_other_seeds_make_it_welchs(seeds: list[int]) -> None:
    after = AFTER[: len(seeds)]
    row = only_row(default("lora", BEFORE) + tuned("lora", after, seeds=seeds))
    reference = stats.ttest_ind(after, BEFORE, equal_var=False).confidence_interval(0.95)
    assert (row.gain_low, row.gain_high) == pytest.approx(tuple(reference)) and row.paired is False


def test_differences_that_are_all_equal_and_single_seeds() -> None:
    row = only_row(default("lora", [0.5, 0.75]) + tuned("lora", [0.625, 0.875]))
    assert (row.gain, row.gain_low, row.gain_high) == (0.125, 0.125, 0.125)
    row = only_row(default("lora", [0.5]) + tuned("lora", [0.625]))
    assert row.gain == 0.125 and row.gain_low is None and row.paired is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = only_row(default("lora", [0.1 + 0.2, 0.4]) + tuned("lora", [0.4, 0.5]))
        assert row.gain_low == row.gain_high == pytest.approx(0.1)
        row = only_row(default("lora", [0.5, 0.5, 0.5]) + tuned("lora", [0.6, 0.7], seeds=[7, 8]))
    reference = stats.t.interval(0.95, 1, loc=0.15, scale=0.05)  # the spread of the tuned runs alone
    assert (row.gain_low, row.gain_high) == pytest.approx(reference)


def test_a_gain_is_an_improvement_also_where_lower_is_better() -> None:
    records = default("lora", BEFORE) + tuned("lora", AFTER)
    for record in records:
        record.score.higher_is_better = False
    row = only_row(records)
    low, high = stats.ttest_rel(BEFORE, AFTER).confidence_interval(0.95)
    assert row.gain == pytest.approx(np.mean(BEFORE) - np.mean(AFTER)) and row.gain < 0
    assert (row.gain_low, row.gain_high) == pytest.approx((low, high))


def test_medians_have_no_interval_and_undefined_scores_no_seed() -> None:
    median = {"protocol": "best", "average": "median"}
    row = only_row(default("lora", [0.1, 0.5, 0.6], **median) + tuned("lora", [0.2, 0.7, 0.75], **median))
    assert row.gain == pytest.approx(0.2) and row.gain_low is None
    records = default("lora", BEFORE) + tuned("lora", AFTER)
    records[0].score.value = None
    row = only_row(records)
    reference = stats.ttest_ind(AFTER, BEFORE[1:], equal_var=False).confidence_interval(0.95)
    assert row.default_seeds == 4 and (row.gain_low, row.gain_high) == pytest.approx(tuple(reference))


# -- which runs are the defaults -------------------------------------------------------------------------


def test_the_default_is_the_run_at_the_default_rate_with_the_same_options() -> None:
    others = default("lora", [0.1, 0.1], lr=1e-2) + default("lora", [0.2, 0.2], options={"r": 2})
    others += default("dora", [0.3, 0.3])
    row = only_row(others + default("lora", [0.4, 0.6]) + tuned("lora", [0.7, 0.7]))
    assert row.default_score == pytest.approx(0.5) and row.why == ""


@pytest.mark.parametrize(("changes", "why"), [
    ({"train": {"warmup": 0.5}}, "no run"), ({"train": {"steps": 200}}, "no run"),
    ({"environment": {"device": "CPU two"}}, "no run"), ({"protocol": "best-step"}, "no run"),
    ({"lr": 3e-3}, "no run"), ({"train": {"steps": 0}}, "no run"), ({"options": {"r": 2}}, "no run"),
])  # fmt: skip
def test_runs_that_differ_elsewhere_are_not_the_default(changes: dict, why: str) -> None:
    found = effect(default("lora", BEFORE, **changes) + default("dora", BEFORE) + tuned("lora", AFTER))
    assert found.rows[0].why.startswith(why) and found.rows[0].gain is None
    assert found.rows[0].score == pytest.approx(np.mean(AFTER)) and found.rows[0].lr == 1e-2
    assert "peftzoo bench" in found.sentence and found.kendall_tau is None


def test_two_settings_that_may_be_the_default_are_not_chosen_from() -> None:
    a, b = (
        default("lora", BEFORE, train={"micro_batch": 4}),
        default("lora", BEFORE, train={"micro_batch": 8}),
    )
    assert only_row(a + b + tuned("lora", AFTER)).why.startswith("several settings")
    assert only_row(a + b + tuned("lora", AFTER, train={"micro_batch": 4})).gain is not None


def test_what_was_searched_may_differ_from_the_default() -> None:
    """A search of warm-up and rank: neither must be that of the default run, everything else must."""
    facts = {"chosen": {"lr": 1e-2, "warmup": 0.3, "set.r": 4}}
    runs = tuned("lora", AFTER, facts=facts, train={"warmup": 0.3}, options={"r": 4, "alpha": 16})
    row = only_row(default("lora", BEFORE, options={"r": 8, "alpha": 16}) + runs)
    assert row.gain == pytest.approx(np.mean(AFTER) - np.mean(BEFORE))
    assert only_row(default("lora", BEFORE, options={"r": 8, "alpha": 1}) + runs).gain is None
    assert only_row(default("lora", BEFORE, options={"r": 8, "alpha": 16}, train={"clip": 9.0}) + runs).why
    facts = {"chosen": {"warmup": 0.3}, "default": {}}  # the rate was not searched
    runs = tuned("lora", AFTER, lr=1e-3, facts=facts, train={"warmup": 0.3})
    row = only_row(default("lora", BEFORE) + default("lora", AFTER, lr=1e-2) + runs)
    assert (row.default_lr, row.default_score) == (1e-3, pytest.approx(np.mean(BEFORE)))


# -- both rankings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_tau_and_the_ratio_of_spreads_are_those_of_scipy_and_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.normal(size=(2, 6)).round(1)  # rounded: with ties
    records = [r for i in range(6) for r in default(f"m{i}", [before[i] - 1, before[i] + 1])
               + tuned(f"m{i}", [after[i] - 1, after[i] + 1])]  # fmt: skip
    records += [*tuned("alone", [9.0, 9.0]), make("none", 0, 0.1, train={"steps": 0})]
    found = effect(records)
    assert found.kendall_tau == pytest.approx(stats.kendalltau(before, after).statistic)
    assert found.spread_ratio == pytest.approx(np.std(after, ddof=1) / np.std(before, ddof=1))
    assert found.methods == 6 and len(found.rows) == 7
    assert (
        f"{found.kendall_tau:.2f}" in found.sentence and f"{found.spread_ratio:.2f} times" in found.sentence
    )
    assert found.sentence.startswith("6 of 7 settings")


def test_it_takes_three_methods_and_scores_that_differ() -> None:
    found = effect(
        default("lora", BEFORE) + tuned("lora", AFTER) + default("dora", AFTER) + tuned("dora", BEFORE)
    )
    assert found.kendall_tau is found.spread_ratio is None and "it takes 3" in found.sentence
    same = [r for m in ("a", "b", "c") for r in default(m, BEFORE) + tuned(m, AFTER)]
    found = effect(same)
    assert found.kendall_tau is found.spread_ratio is None and "equal" in found.sentence


# -- the range of rates ----------------------------------------------------------------------------------

# The best has the losses 0.4, 0.5, 0.6: mean 0.5, standard error 0.1 / sqrt(3) = 0.0577; so up to 0.5577.
BEST, NEAR, FAR = [0.4, 0.5, 0.6], [0.55, 0.55, 0.55], [0.56, 0.56, 0.56]


@pytest.mark.parametrize(("losses", "expected"), [
    ([FAR, BEST, FAR], (2, 2, False)), ([FAR, NEAR, BEST, NEAR, FAR], (2, 4, False)),
    ([BEST, FAR], (1, 1, True)), ([NEAR, BEST], (1, 2, True)), ([FAR, NEAR, BEST], (2, 3, True)),
    ([NEAR, FAR, BEST, FAR], (3, 3, False)), ([FAR, BEST, [0.1, 0.1, None], FAR], (2, 2, False)),
    ([FAR, BEST, NEAR[:1], FAR], (2, 2, True)),  # the next one was not tried with three seeds
    ([BEST], (1, 1, True)), ([[None] * 3, [None] * 3], None), ([BEST[:2], NEAR[:1]], None), ([], None),
])  # fmt: skip
def test_the_range_of_rates_by_hand(losses: list, expected: tuple | None) -> None:
    rates = tuning.tried(make(tuning={"tried": entries({i + 1: v for i, v in enumerate(losses)})}))
    assert tuning.forgiving(rates) == expected


def test_earlier_rounds_and_breakdowns_are_outside_the_range() -> None:
    losses = {1: FAR, 2: NEAR, 3: BEST, 4: NEAR, 5: FAR}
    early = entries({i: [0.01] for i in range(1, 8)}, steps=25) + entries(
        {3: [0.9] * 3, 7: [0.01] * 3}, steps=50
    )
    facts = {"tried": early + entries(losses, broken={4: 1})}
    assert tuning.forgiving(tuning.tried(make(tuning=facts))) == (2, 3, False)
    row = only_row(tuned("lora", AFTER, tried=entries({1e-4: FAR, 1e-3: BEST, 1e-2: NEAR, 1e-1: FAR})))
    assert (row.lr_low, row.lr_high, row.lr_decades, row.lr_at_least) == (1e-3, 1e-2, 1.0, False)
    assert formats.rate_range(row) == "0.001 to 0.01" and formats.decades(row) == "1.0"
    row = only_row(tuned("lora", AFTER, tried=entries({1e-3: BEST, 1e-2: NEAR})))
    assert formats.decades(row) == "at least 1.0"


def test_a_search_of_several_values_has_no_range() -> None:
    several = [{"values": {"lr": 1e-3, "warmup": 0.1}, "steps": 100, "losses": BEST}]
    assert tuning.tried(make(tuning={"tried": several})) == []
    assert only_row(tuned("lora", AFTER, tried=several)).lr_decades is None
    by_score = [{"values": {"lr": 1e-3}, "score": 0.5}]
    assert only_row(tuned("lora", AFTER, tried=by_score)).lr_decades is None


ODD = [7, [1], {"a": {}}, {"lr": -1.0}, None]
ODD_TRIED = ["x", [[]], [{}], [{"values": {"lr": -1}}], [{"values": {"lr": "x"}, "steps": 1, "losses": [1]}],
             [{"values": {"lr": 1.0}, "steps": 1, "losses": ["x", 1e300, [2]]}]]  # fmt: skip


@pytest.mark.parametrize(("key", "odd"), [
    *product(("tried", "chosen", "default", "start_loss", "budget"), ODD),
    *(("tried", odd) for odd in ODD_TRIED),
])  # fmt: skip
def test_the_facts_of_a_search_may_be_anything(key: str, odd) -> None:
    found = board(default("lora", BEFORE) + tuned("lora", AFTER, facts={key: odd}))
    json.dumps(formats.as_rows(found), allow_nan=False)
    assert "lora" in formats.markdown(found) and formats.files(found)
    for _, table in found:
        if "tuning" in table.attrs:
            for panel in rate_plots.panels_of_losses(table.attrs["tuning"]):
                rate_plots.plot(panel, "loss")


# -- breakdowns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("validation", "broken"), [
    ({"rows": 9, "start_loss": 1.0, "loss": 1.1}, True), ({"rows": 9, "start_loss": 1.0, "loss": None}, True),
    ({"rows": 9, "start_loss": 1.0, "loss": 1.0}, False), ({"start_loss": None, "loss": 2.0}, False),
    ({"rows": 9, "start_loss": 1.0}, False), (None, False), ({}, False),
])  # fmt: skip
def test_a_run_that_ends_above_its_first_held_out_loss_broke_down(validation, broken: bool) -> None:
    records = default("lora", [0.5] * 10, id="0" * 12)
    for record in records[:2]:
        record.validation = validation
    found = tables.tables(records)
    assert found[0][1]["broken"].tolist() == [2 if broken else 0]
    assert ("| 2 of 10 |" in formats.markdown(found)) == broken, "and the mean counts it like any other"
    assert found[0][1]["score"].tolist() == [0.5] and found[0][1]["seeds"].tolist() == [10]


def test_breakdowns_on_both_sides_are_counted(tmp_path) -> None:
    up = {"rows": 9, "start_loss": 1.0, "loss": 3.0}
    before, after = default("lora", BEFORE, id="0" * 12), tuned("lora", AFTER, id="1" * 12)
    before[0].validation = before[3].validation = after[2].validation = up
    found = board(before + after)
    row = only_row(before + after)
    assert (row.default_broken, row.broken, row.default_runs) == (2, 1, 5)
    assert "2 of 5 runs broke down with the defaults, 1 of 5 tuned." in effect(before + after).sentence
    assert "| 2 of 5 | 1 of 5 |" in formats.markdown(found)
    pages.write(tmp_path, before + after, found, [])
    page = Page(tmp_path / "index.html")
    assert page.text.count("1 of 5") >= 3 and page.text.count("2 of 5") >= 3


# -- what tables say of rows that were held out ----------------------------------------------------------


def test_rows_held_out_and_early_stops_stand_in_the_recipe() -> None:
    def recipe(**changes) -> str:
        ((shared, _),) = tables.tables([make("lora", **changes)])
        return shared["recipe"]

    data = make().data
    plain = "linear, warm-up 0.06, clip 1.0, head lr 0.001"
    assert recipe() == plain
    data = data | {"validation": {"rows": [40, 60], "seed": 0}}
    assert recipe(data=data) == f"{plain}, 100 rows held out"
    stop = {"rows": 100, "early_stop": 3, "start_loss": 2.0, "loss": 1.0}
    assert recipe(data=data, validation=stop) == f"{plain}, 100 rows held out, early stop 3"
    for odd in (7, [1], {"rows": "x"}, {"rows": ["x"]}, {"rows": []}):
        assert recipe(data=data | {"validation": odd}) == plain
    assert len(tables.tables([make("lora"), make("dora", data=data)])) == 2


# -- what is shown ---------------------------------------------------------------------------------------


def test_nothing_is_added_without_tuned_runs(tmp_path) -> None:
    records = default("lora", BEFORE) + default("lora", BEFORE, lr=1e-2) + [make("none", train={"steps": 0})]
    before = tables.tables(records)
    after = tuning.beside_default(before)
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert formats.files(after) == formats.files(before)
    assert "Tuned" not in formats.markdown(after) and "tuning_effect" not in formats.as_rows(after)[0]
    pages.write(tmp_path, records, after, [])
    page = Page(tmp_path / "index.html")
    assert "Tuned beside default" not in page.text and "learning rate" not in page.text


def test_markdown_csv_and_json_say_the_same() -> None:
    records = [make("none", 0, 0.1, train={"steps": 0})]
    for i, method in enumerate(("lora", "dora", "vera")):
        records += default(method, [0.5 + i / 10, 0.52 + i / 10])
        records += tuned(method, [0.7 - i / 10, 0.74 - i / 10])
    found = board(records)
    text = formats.markdown(found)
    assert text.count("### Tuned beside default") == 1 and "-1.00" in text, "the order is turned round"
    assert "| lora | 0.510 | 0.720 | +0.210 | +0.083 to +0.337 | 0.001 | 0.01 | 0.001 | 0.0 |" in text
    frames = [pd.read_csv(io.StringIO(t)) for t in formats.files(found).values()]
    wide, narrow = sorted(frames, key=lambda f: -len(f.columns))
    assert list(wide.columns[: len(narrow.columns)]) == list(narrow.columns)
    assert list(wide.columns[len(narrow.columns) :]) == [*tuning.OF_METHODS, *tuning.OF_TABLES]
    lora = wide[wide["method"] == "lora"].iloc[0]
    assert lora["gain"] == pytest.approx(0.21) and lora["kendall_tau"] == -1.0 and lora["default_seeds"] == 2
    assert np.isnan(wide[wide["method"] == "none"].iloc[0]["gain"])
    (whole,) = [b for b in json.loads(json.dumps(formats.as_rows(found), allow_nan=False)) if b["tuning"]]
    facts = whole["tuning_effect"]
    assert facts["kendall_tau"] == -1.0 and facts["spread_ratio"] == pytest.approx(1.0)
    assert [r["gain"] for r in whole["table"] if r["method"] == "lora"] == [pytest.approx(0.21)]
    assert facts["losses"][0]["rates"][0] == {"lr": 1e-4, "steps": 100, "losses": [0.9] * 3, "breakdowns": 0}


def test_the_command_writes_them(run_cli, tmp_path) -> None:
    for record in default("lora", BEFORE) + tuned("lora", AFTER):
        store.write(tmp_path / "in", record)
    out = tmp_path / "out"
    code, text, err = run_cli(f"board {tmp_path / 'in'} --out {out} --html {tmp_path / 'site'}")
    assert code == 0, err
    assert "+0.052" in (out / "board.md").read_text() and len([*(out / "tables").iterdir()]) == 2
    assert "+0.052" in Page(tmp_path / "site" / "index.html").text
    code, text, err = run_cli(f"board {tmp_path / 'in'} --json")
    assert code == 0 and sum("tuning_effect" in b for b in json.loads(text)) == 1
    assert run_cli(f"board {tmp_path / 'in'} --out {out}")[0] == 0
    assert len([*(out / "tables").iterdir()]) == 2


def test_text_of_a_tuned_record_stays_text(tmp_path) -> None:
    options = {HOSTILE: HOSTILE}
    records = [r for n in (4, 8) for r in tuned(HOSTILE, AFTER, options=options | {"r": n})]
    records += [r for lr in (1e-4, 1e-3, 1e-2) for r in default(HOSTILE, BEFORE, lr=lr, options=options)]
    found = board(records)
    text = formats.markdown(found)
    assert "<" not in text and "\x1b" not in text and "[" not in text
    lines = [line for line in text.split("### Tuned")[1].splitlines() if line.startswith("|")][:4]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    pages.write(tmp_path, records, found, [])
    page, source = Page(tmp_path / "index.html"), (tmp_path / "index.html").read_text()
    assert page.tags.count("script") == 1 and "<script>alert" not in source
    figures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert any("alert(1)" in f for f in figures) and all("<title><" not in f for f in figures)
    assert page.text.count("<script>alert(1)</script>") > 10


def test_scores_at_three_rates_are_drawn_and_at_two_not(tmp_path) -> None:
    grid = [r for lr in (1e-4, 1e-3, 1e-2) for r in default("lora", BEFORE, lr=lr)]
    two = [r for lr in (1e-4, 1e-3) for r in default("dora", BEFORE, lr=lr)]
    other = default("dora", BEFORE, lr=1e-2, options={"r": 2})
    records = grid + two + other
    ((_, table),) = tables.tables(records)
    (panel,) = rate_plots.panels_of_scores(table)
    (line,) = panel.lines
    assert line.name == "lora" and [p.lr for p in line.points] == [1e-4, 1e-3, 1e-2]
    assert line.points[0].stderr == pytest.approx(stats.sem(BEFORE))
    assert line.points[0].value == pytest.approx(np.mean(BEFORE)) and line.points[0].runs == 5
    pages.write(tmp_path, records, board(records), [])
    page = Page(tmp_path / "index.html")
    assert "acc against learning rate" in page.text and "Tuned" not in page.text
    assert page.tags.count("svg") == 3 + 1 + 1 + 1, "the costs, all methods, its legend, one method"


# -- coordinates -----------------------------------------------------------------------------------------


def panel(points: list[tuple], cap: float | None = None, **changes) -> rate_plots.Panel:
    made = [rate_plots.Point(lr, value, stderr, 3, broken) for lr, value, stderr, broken in points]
    return rate_plots.Panel([rate_plots.Line("lora", 0, made)], cap=cap, **changes)


PANELS = {
    "one point": panel([(1e-3, 0.5, None, 0)]),
    "all equal": panel([(1e-4, 0.0, 0.0, 0), (1e-3, 0.0, 0.0, 0)], band=(1e-4, 1e-3), limit=0.0),
    "far apart": panel([(1e-12, -1e9, 1.0, 0), (1e6, 3.0, 2e8, 0)], default=1.0, limit=9e9),
    "close": panel([(1e-3, 0.50000, 1e-9, 0), (1.01e-3, 0.50001, 1e-9, 0)], band=(1e-3, 1e-3)),
    "broken": panel([(1e-4, 0.5, 0.1, 0), (1e-3, 7.0, 9.0, 1), (1e-2, None, None, 3)], cap=2.0),
    "nothing finite": panel([(1e-4, None, None, 3), (1e-3, None, None, 3)], default=1e-2),
    "tiny values": panel([(1e-4, -0.000123, 1e-6, 0), (1e-3, -0.000125, 1e-6, 0)]),
}


@pytest.mark.parametrize("size", [rate_plots.LARGE, rate_plots.SMALL])
@pytest.mark.parametrize("name", PANELS)
def test_nothing_lies_outside_the_box(name: str, size: tuple[int, int]) -> None:
    p = rate_plots.plot(PANELS[name], "loss", size)
    numbers = [float(v) for line in p["lines"] for v in re.findall(r"-?[\d.]+", line["d"])]
    xs, ys = numbers[::2], numbers[1::2]
    xs += [m["x"] for m in p["marks"]] + [b["x"] for b in p["bars"]]
    ys += [m["y"] for m in p["marks"]] + [y for b in p["bars"] for y in (b["y1"], b["y2"])]
    xs += [v for v in (p["default"],) if v is not None]
    ys += [v for v in (p["limit"],) if v is not None]
    assert all(p["left"] <= x <= p["right"] for x in xs) and all(p["top"] <= y <= p["bottom"] for y in ys)
    assert p["x_ticks"] and p["y_ticks"]
    for x, text in p["x_ticks"]:  # centred below; 8.1 px is more than a digit is wide
        assert x - 4.05 * len(text) >= 0 and x + 4.05 * len(text) <= p["width"], text
    for (a, s), (b, t) in pairwise(p["x_ticks"]):
        assert b - a > 3.3 * (len(s) + len(t)), "labels overlap"
    for y, text in p["y_ticks"]:  # to the left of the axis
        assert p["left"] - 6 - 8.1 * len(text) >= 0 and 8 <= y <= p["bottom"] + 1, text
    for m in p["marks"]:
        corners = [float(v) for v in re.findall(r"-?[\d.]+", m["d"] + (m["broken"] or ""))]
        assert all(0 <= x <= p["width"] for x in corners[::2]) and all(y >= 0 for y in corners[1::2])


def test_coordinates_are_in_order_and_breakdowns_at_the_upper_edge() -> None:
    p = rate_plots.plot(panel([(1e-4, 0.9, None, 0), (1e-3, 0.4, 0.1, 0), (1e-2, 0.6, None, 0)]), "loss")
    (a, b, c), (bar,) = p["marks"], p["bars"]
    assert b["x"] - a["x"] == pytest.approx(c["x"] - b["x"], abs=0.2), "not a log axis"
    assert a["y"] < c["y"] < b["y"] and bar["y1"] < b["y"] < bar["y2"]
    assert not any(m["broken"] for m in p["marks"]) and "lora: loss 0.4 at 0.001, 3 seeds" in b["title"]
    broken = rate_plots.plot(PANELS["broken"], "loss")
    fine, above, infinite = broken["marks"]
    assert above["y"] == infinite["y"] == broken["top"] < fine["y"] and not fine["broken"]
    assert above["broken"] and "1 of 3 broke down" in above["title"] and "loss 7" in above["title"]
    assert infinite["broken"] and "not finite" in infinite["title"]


def test_earlier_rounds_do_not_flatten_the_last_one() -> None:
    """Those far above it are left out, and so is the line to them."""

    def line(values: list, faint: bool) -> rate_plots.Line:
        points = [rate_plots.Point(10.0**-i, v, None, 1, 0) for i, v in enumerate(values, 1)]
        return rate_plots.Line("lora", 0, points, faint=faint)

    p = rate_plots.plot(rate_plots.Panel([line([9.0, 0.9, 9.0, 0.8], True), line([0.4, 0.6], False)]), "loss")
    assert [m["faint"] for m in p["marks"]] == [True, True, False, False], "9.0 is drawn"
    assert p["lines"][0]["d"].count("M") == 2 and max(float(t) for _, t in p["y_ticks"]) < 1
    with_nines = rate_plots.plot(rate_plots.Panel([line([9.0, 0.9], False)]), "loss")
    assert len(with_nines["marks"]) == 2 and max(float(t) for _, t in with_nines["y_ticks"]) > 7


def test_the_panel_of_a_search(tmp_path) -> None:
    tried = entries({1e-4: [0.9], 1e-3: [0.8], 1e-2: [0.7], 1e-1: [9.0]}, steps=25, broken={1e-1: 1})
    tried += entries({1e-4: FAR, 1e-3: BEST, 1e-2: NEAR, 1e-1: FAR})
    records = tuned("lora", AFTER, lr=1e-3, tried=tried) + tuned("dora", AFTER)
    found = effect(records)
    lora = next(p for p in rate_plots.panels_of_losses(found) if p.lines[-1].name == "lora")
    early, last = lora.lines
    assert early.faint and [p.value for p in early.points] == [0.9, 0.8, 0.7, 9.0]
    assert [p.filled for p in last.points] == [False, True, False, False]
    assert lora.band == (1e-3, 1e-2) and lora.limit == pytest.approx(0.5 + 0.1 / 3**0.5)
    assert lora.default == 1e-3 and lora.cap == 2.0
    every = rate_plots.together(rate_plots.panels_of_losses(found))
    assert sorted(line.name for line in every.lines) == ["dora", "lora"] and every.cap == 2.0
    pages.write(tmp_path, records, board(records), [])
    text = Page(tmp_path / "index.html").text
    assert "Held-out loss against learning rate" in text and "0.001 to 0.01 (1.0 powers of ten)" in text


def test_methods_differ_in_more_than_colour() -> None:
    styles = range(rate_plots.COLOURS * len(rate_plots.SHAPES))
    looks = {(s % rate_plots.COLOURS, s % len(rate_plots.SHAPES)) for s in styles}
    assert len(looks) == len(styles), "two methods look alike"
    assert len({str(shape) for shape in rate_plots.SHAPES}) == len(rate_plots.SHAPES) >= 7


def luminance(colour: str) -> float:
    """As in WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_every_colour_stands_out_on_paper_and_on_dark_screens() -> None:
    css = (Path(pages.__file__).parents[1] / "assets" / "site" / "style.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in
                   re.findall(r":root \{(.*?)\}", css, re.DOTALL))  # fmt: skip
    for colours, number in product((light, dark), range(rate_plots.COLOURS)):
        a, b = sorted((luminance(colours["paper"]), luminance(colours[f"c{number}"])))
        assert (b + 0.05) / (a + 0.05) >= 3, f"c{number}: WCAG asks for 3 to 1"
    assert all(f"path.rates.d{i}" in css for i in range(1, rate_plots.DASHES))
