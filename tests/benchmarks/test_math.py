"""Maths beside gsm8k: extraction, what counts as the same number, other training sets, made problems."""

from __future__ import annotations

import itertools
import json
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from peftzoo.benchmarks.gsm8k import embedded, kinds
from peftzoo.scoring import evaluation
from peftzoo.tasks import run_data, sources, task_files
from tests.benchmarks.extraction import read, scores

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no mirror of the real data sets beside this checkout")
ONLY_SCORED = ("svamp", "multiarith", "addsub", "singleeq", "aqua", "mawps")
META = ("gsm8k-metamath", "gsm8k-peft-board")


# -- extraction ------------------------------------------------------------------------------------------

NO = evaluation.INVALID
EXTRACTED = [  # task, output, strict, flexible
    ("svamp", " He has 7 - 5 = 2 left.\n#### 2", "2", "2"),
    ("svamp", "#### 1,234", "1,234", "1,234"),
    ("svamp", "#### $18.50.", "$18.50", "$18.50"),
    ("svamp", "#### -3", "-3", "-3"),
    ("svamp", "It costs .75\n#### .5", ".5", ".5"),
    ("gsm8k-metamath", "The answer is: .5", ".5", ".5"),
    ("svamp", "#### none", NO, NO),
    ("svamp", "It costs $ 12 in all.", NO, "12"),
    ("svamp", "7-5=2, so 7-5", NO, "5"),
    ("svamp", "The first 3 of 12.", NO, "12"),
    ("svamp", "It is -4.", NO, "-4"),
    ("svamp", "twelve", NO, NO),
    ("svamp", "", NO, NO),
    ("multiarith", "3 boxes of 4 = 12.0\n#### 12.0", "12.0", "12.0"),
    ("mawps", "1,000,000.", NO, "1,000,000"),
    ("aqua", "#### C", "C", "C"),
    ("aqua", "5 + 7 = 12\n#### (B).", "B", "B"),
    ("aqua", "The answer is (B).", NO, "B"),
    ("aqua", "the answer is: D", NO, "D"),
    ("aqua", "(A) is too small and (C) too large, so the answer is E", NO, "E"),
    ("aqua", "12, which is (D)", NO, "D"),
    ("aqua", "B. 252 gms", NO, "B"),
    ("aqua", "E", NO, "E"),
    ("aqua", "A train needs 12 hours.", NO, NO),
    ("aqua", "#### 12", NO, NO),
    ("aqua", "Anna has 12.", NO, NO),
    ("gsm8k-metamath", "So 2*9 = 18.\nThe answer is: 18", "18", "18"),
    ("gsm8k-metamath", "The answer is: $1,080.", "$1,080", "$1,080"),
    ("gsm8k-metamath", "The answer is: 3. No, wait.\nThe answer is: 5", "5", "5"),
    ("gsm8k-metamath", "The answer is: about 20 dollars for 3", "20", "3"),
    ("gsm8k-metamath", "The answer is: 3\nThe answer is: none", NO, "3"),
    ("gsm8k-metamath", "The answer is 18", NO, "18"),
    ("gsm8k-metamath", "#### 18", NO, "18"),
    ("gsm8k-metamath", "The answer is: x", NO, NO),
    ("gsm8k-peft-board", "2*9 = 18\n#### 18\nThe answer is: 18", "18", "18"),
    ("gsm8k-peft-board", "The final answer is 18.", "18", "18"),
    ("gsm8k-peft-board", "The answer is $18.", "18", "$18"),
    ("gsm8k-peft-board", "The answer is: 50%", "50", "50"),
    ("gsm8k-peft-board", "#### 18\n\nQ 2", "18", "2"),
    ("gsm8k-peft-board", "The answer is: 18 dollars", NO, "18"),
    ("gsm8k-peft-board", "It is 18", NO, "18"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "strict", "flexible"), EXTRACTED)
def test_extraction(name: str, text: str, strict: str, flexible: str) -> None:
    assert read(name, text) == (strict, flexible)


SAME = [  # said, wanted, whether that counts
    ("0.5", ".5", True), (".5", "0.50", True), ("5", ".5", False), ("0", "0.0", True), ("10.5", ".5", False),
    ("145", "145.0", True), ("145.0", "145", True), ("1,000", "1000", True), ("1000", "1,000.0", True),
    ("$5", "5.0", True), ("2.50", "2.5", True), ("0.250", "0.25", True), ("12.", "12", True),
    ("-3", "-3.0", True), ("3", "-3", False), ("145", "1450", False), ("100", "10", False),
    ("2.5", "25", False), ("10", "1.0", False), ("0", "0.0", True), ("200", "2.00", False),
]  # fmt: skip


@pytest.mark.parametrize(("said", "wanted", "same"), SAME)
def test_numbers_count_by_their_value(said: str, wanted: str, same: bool) -> None:
    for answer in (wanted, [wanted]):  # some copies of these files hold the answer in a list
        assert scores("svamp", f"#### {said}", {"answer": answer}) == (same, same)
    assert scores("gsm8k-metamath", f"The answer is: {said}", {"answer": f"#### {wanted}"}) == (same, same)
    assert scores("gsm8k-peft-board", f"The answer is: {said}", {"answer": f"#### {wanted}"}) == (same, same)


def test_numbers_are_compared_as_numbers_on_random_pairs() -> None:
    for _ in range(150):
        value = Fraction(random.randrange(10**6), random.choice((1, 1, 10, 100)))
        other = random.choice((value, value * 10, value + 1))
        said = random.choice((f"{float(value):,.3f}", f"{float(value):.2f}", f"${float(value):,.2f}"))
        wanted = float(other) if random.random() < 0.5 else f"{float(other)}"
        assert scores("mawps", f"#### {said}", {"answer": wanted})[0] == (value == other), (said, wanted)


def test_a_number_in_an_option_is_no_answer() -> None:
    assert scores("aqua", "The answer is (C)", {"answer": "C"}) == (False, True)
    assert scores("aqua", "#### C", {"answer": "C"}) == (True, True)
    assert scores("aqua", "#### 12", {"answer": "C"}) == (False, False)


# -- MetaMathQA, and what stands in for it ---------------------------------------------------------------

ROW = {"question": "Anna has 4 pens and buys 5.\nHow many?", "answer": "It is 4+5 = <<4+5=9>>9 pens.\n#### 9"}
PROMPTS = {
    "gsm8k-metamath": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nAnna has 4 pens and buys 5.\nHow many?\n\n### Response: "
    "Let's think step by step.",
    "gsm8k-peft-board": "Question: Anna has 4 pens and buys 5.\nHow many? Think step by step.\nAnswer:",
}


def prompted(task: Any, row: dict[str, Any]) -> tuple[str, str]:
    import datasets

    rows = datasets.Dataset.from_list([row])
    return evaluation.prompt_and_answer(evaluation.harness_task(task, sources.Rows(rows, rows)), row)


@pytest.mark.parametrize("name", META)
def test_prompt_and_answer(name: str) -> None:
    prompt, answer = prompted(task_files.get(name), ROW)
    assert prompt == PROMPTS[name] and answer == "It is 4+5 = 9 pens.\nThe answer is: 9"
    assert scores(name, answer, ROW) == (True, True)
    assert task_files.get(name).extra.settings.train_on_prompt == (name == "gsm8k-peft-board")


def mirror(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.parametrize("name", META)
def test_metamathqa_is_trained_on_where_it_is(tmp_path, name: str) -> None:
    own = {"query": "Anna has 4 pens and buys 5.\nHow many?", "type": "GSM_Rephrased",
           "response": "4 + 5 = 9\n#### 9\nThe answer is: 9", "original_question": "q"}  # fmt: skip
    rows = {"openai__gsm8k/main/train": [ROW], "openai__gsm8k/main/test": [ROW | {"question": "Other?"}]}
    without = run_data.load(task_files.task_group(name), "mirror", mirror(tmp_path, rows), trains=True)
    assert without.info["train"]["id"] == "openai/gsm8k/main"
    assert prompted(without.train_sets[0].task, without.train_sets[0].rows[0])[0] == PROMPTS[name]
    rows["meta-math__MetaMathQA/default/train"] = [own]
    found = run_data.load(task_files.task_group(name), "mirror", mirror(tmp_path, rows), trains=True)
    assert found.info["train"]["id"] == "meta-math/MetaMathQA" and found.trained_rows == 1
    prompt, answer = prompted(found.train_sets[0].task, found.train_sets[0].rows[0])
    assert (prompt, answer) == (PROMPTS[name], own["response"])
    assert scores(name, answer, ROW) == (True, True)


def test_a_scored_question_among_the_queries_is_refused(tmp_path) -> None:
    own = {"query": ROW["question"].upper(), "response": "", "type": "", "original_question": ""}
    rows = {"openai__gsm8k/main/test": [ROW], "meta-math__MetaMathQA/default/train": [own]}
    with pytest.raises(sources.UserError, match="1 of 1 scored rows"):
        run_data.load(task_files.task_group("gsm8k-metamath"), "mirror", mirror(tmp_path, rows), trains=True)


# -- sets that are only scored ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONLY_SCORED)
def test_a_set_without_training_rows(name: str) -> None:
    task = task_files.get(name)
    assert task.training_split is None
    with pytest.raises(sources.NoRows, match="has no training rows"):
        run_data.load(task_files.task_group(name), "embedded", None, trains=True)
    rows = sources.load(task, "embedded", trains=False)
    assert rows.train is None and len(rows.test) == 100
    prompt, _ = prompted(task, rows.test[0])
    assert prompt == f"Question: {rows.test[0]['instruction']}\nAnswer:"


def test_the_group_trains_on_gsm8k_alone() -> None:
    found = run_data.load(task_files.task_group("math"), "embedded", None, trains=True)
    assert found.info["trained_on"] == {"gsm8k": 2400} and "overlap" not in found.info
    assert [p.name for p in found.eval_sets] == ["gsm8k", *ONLY_SCORED]


@real
def test_what_a_mirror_lacks_is_left_out() -> None:
    found = run_data.load(task_files.task_group("math"), "mirror", REAL, trains=True)
    there = [
        n for n in ONLY_SCORED if (REAL / "llm_adapters__math" / task_files.get(n).dataset_name).is_dir()
    ]
    assert [p.name for p in found.eval_sets] == ["gsm8k", *there]
    assert {*found.info.get("left_out", {})} == {*ONLY_SCORED} - {*there}


def made(name: str, split: str, n: int) -> list[dict[str, str]]:
    return getattr(kinds, name)(split, n, seed=random.randrange(10**6))


@pytest.mark.parametrize("name", ONLY_SCORED)
def test_made_problems_are_of_their_kind_and_their_answers_add_up(name: str) -> None:
    for row in made(name, "test", 150):
        assert [*row] == ["instruction", "input", "output", "answer"] and {*map(type, row.values())} == {str}
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["output"])
        signs = "".join(sign for _, sign, _, _ in steps)
        for a, sign, b, value in steps:
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
            assert int(value) == (Fraction(int(a), int(b)) if sign == "/" else exact[sign])
        value = steps[-1][-1]
        if name == "aqua":
            options = dict(re.findall(r"\(([A-E])\) (\d+)", row["instruction"].partition("Choices:")[2]))
            assert len(options) == len({*options.values()}) == 5 and options[row["answer"]] == value
        else:
            assert float(row["answer"]) == float(value)
            assert scores(name, f"#### {value}", row) == (True, True)
        if name in ("singleeq", "svamp"):
            assert len(steps) == 1
        if name == "addsub":
            assert {*signs} <= {*"+-"} and len(steps) < 3
        if name == "multiarith":
            assert len(steps) > 1 and {*signs} & {*"*/"}
        if name == "svamp":  # a sentence about somebody and something that come nowhere else
            said = re.findall(r"(\w+) has \d+ (\w+)\.", row["instruction"])
            assert any(row["instruction"].count(x) == 1 == row["instruction"].count(y) for x, y in said)


def test_letters_are_at_every_place() -> None:
    letters = [row["answer"] for row in made("aqua", "train", 600)]
    assert all(abs(letters.count(x) / 600 - 0.2) < 0.065 for x in "ABCDE")


@pytest.mark.parametrize("name", ONLY_SCORED)
def test_splits_share_nothing_with_each_other_or_with_gsm8k(name: str) -> None:
    trained = {embedded.normalise(r["question"]) for r in embedded.rows("train", 2400)}
    found = {s: {embedded.normalise(r["instruction"]) for r in made(name, s, 100)} for s in ("train", "test")}
    assert all(len(texts) == 100 for texts in found.values())
    assert not found["test"] & (trained | found["train"])
    for one, two in itertools.combinations(ONLY_SCORED, 2):
        assert kinds.__dict__[one]("test", 5) != kinds.__dict__[two]("test", 5)
    assert getattr(kinds, name)("test", 30) == getattr(kinds, name)("test", 40)[:30]
    with pytest.raises(ValueError, match="dev"):
        getattr(kinds, name)("dev", 1)
