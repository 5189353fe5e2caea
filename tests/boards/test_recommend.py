"""Recommendations from records: only what was measured, and what was not."""

from __future__ import annotations

import pytest

from peftzoo.boards import recommend
from peftzoo.errors import UserError
from peftzoo.records.schema import Record
from peftzoo.units import amount
from tests.boards.test_tables import make, with_outcomes
from tests.cli.test_cli import one_document

MIB = 2**20


def records(folder=None) -> list[Record]:
    facts = {"task": "gsm8k", "suite": "gsm8k"}
    found = []
    for method, value, trained, memory in (
        ("lora", 0.6, 1000, 50), ("full", 0.9, 10**6, 500), ("vera", 0.5, 10, 40), ("oft", 0.7, 900, None),
    ):  # fmt: skip
        more = {"trainable_params": trained, "memory": {"computed_total": memory * MIB} if memory else {}}
        found += [make(method, s, value + s / 100, **facts, **more) for s in range(3)]
    found += [make("none", 0, 0.1, trainable_params=0, memory={}, train={"steps": 0}, **facts)]
    return [*found, make("lora", 0, 0.99), make("lora", 0, 0.99, model="minilm", **facts)]


def test_only_rows_within_the_budget_are_named() -> None:
    advice = recommend.recommend(records(), "embedded", "math", 2000, 100 * MIB)
    ((facts, table),) = advice.tables
    assert facts["task"] == "gsm8k" and table["method"].tolist() == ["lora", "vera", "none"]
    assert table["score"].tolist() == pytest.approx([0.61, 0.51, 0.1])
    assert advice.over_budget == 1 and advice.unknown == 1, "full is beyond, of oft the memory is not known"
    ((_, without_budget),) = recommend.recommend(records(), "embedded", "gsm8k").tables
    assert without_budget["method"].tolist() == ["full", "oft", "lora", "vera", "none"]


def test_what_was_not_measured_is_listed() -> None:
    missing = recommend.recommend(records(), "embedded", "gsm8k", 2000).missing
    text = "; ".join(m.sentence() for m in missing)
    assert "methods have no run here: " in text and "dora" in text and "vera," not in text
    assert "not ranked: none" in text and "not looked at: sst2" in text and "generated" in text


def test_a_budget_that_nothing_fits() -> None:
    trained = [r for r in records() if r.method != "none"]
    advice = recommend.recommend(trained, "embedded", "gsm8k", 1)
    assert advice.tables == [] and advice.over_budget == 4


@pytest.mark.parametrize(("word", "fits"), [("gsm8k", True), ("MATH", True), ("gsm", True), ("law", False)])
def test_tasks_like_this_one(word: str, fits: bool) -> None:
    assert recommend.matches_task(make(task="gsm8k", suite="gsm8k"), word) == fits
    assert recommend.matches_task(make(task="my-own-maths", suite="own"), "math")


def test_an_unknown_model_or_task() -> None:
    with pytest.raises(UserError, match='"llama"'):
        recommend.recommend(records(), "llama", "gsm8k")
    with pytest.raises(UserError, match='"law"'):
        recommend.recommend(records(), "embedded", "law")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1M", 10**6), ("16GB", 16 * 10**9), ("2 GiB", 2**31), ("3000", 3000), ("1.5k", 1500), ("1e3", 1000)],
)
def test_amounts(text: str, value: int) -> None:
    assert amount("--x", text) == value


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "inf", "nan", "1MM", "1e999", "one"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(UserError, match="--x"):
        amount("--x", text)


def test_the_command(run_cli, tmp_path) -> None:
    with_outcomes(tmp_path, "lora", 0.8)
    line = f"recommend --results {tmp_path} --model embedded --task-like sentiment"
    code, out, err = run_cli(f"{line} --max-trainable 1M")
    assert code == 0 and "lora" in out and "Missing: " in out and "+-95 %" in out and err == ""
    code, out, _ = run_cli(f"{line} --json")
    (table,) = one_document(out)["tables"]
    assert table["table"][0]["method"] == "lora" and table["table"][0]["rank"] is None
    assert table["table"][0]["why"]
    code, out, _ = run_cli(f"{line} --max-trainable 3")
    assert code == 0 and "No measured row is within this budget" in out and "Beyond the budget: 1" in out
    for extra, message in (("--max-trainable x", '"x"'), ("--results ./nowhere", "no such folder")):
        code, out, err = run_cli(f"{line} {extra}")
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_long_list_of_names_is_cut_and_says_so() -> None:
    names = ("a", "b", "c", "d", "e")
    assert recommend.Missing("not here", names[:4]).sentence(most=3) == "not here: a, b, c, d"
    assert recommend.Missing("not here", names).sentence(most=3) == (
        "not here: a, b, c and 2 more (--json names all)"
    )
    assert recommend.Missing("not here", names).sentence() == "not here: a, b, c, d, e"
