"""BBH: what is extracted from an answer, what the generators say, how rows are cut, groups of tasks."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest

from peftzoo.benchmarks.bbh import embedded, world
from peftzoo.errors import UserError
from peftzoo.scoring import evaluation
from peftzoo.tasks import sources, task_files
from tests.benchmarks import extraction
from tests.benchmarks.extraction import read

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
MADE = [n for n, f in vars(embedded).items() if getattr(f, "__name__", "") == "rows"]
VIEWS = ("bbh", "bbh-fewshot", "bbh-cot", "bbh-lorahub")


# -- extraction -----------------------------------------------------------------------------------------


def scores(name: str, text: str, target: str) -> tuple[bool, ...]:
    """Whether the strict and the lenient score count an output as right."""
    return extraction.scores(name, text, {"target": target})


NO = evaluation.INVALID
EXTRACTED = [  # task, output, strict, lenient
    ("bbh-date_understanding", " (B)", "(B)", "(B)"),
    ("bbh-date_understanding", "(B).", "(B)", "(B)"),
    ("bbh-date_understanding", "(b)", "(b)", NO),
    ("bbh-date_understanding", "B", NO, "B"),
    ("bbh-date_understanding", "B. 05/01/2021", NO, "B"),
    ("bbh-date_understanding", "(B) 05/01/2021", NO, "(B)"),
    ("bbh-date_understanding", "The answer is (C), not (A).", NO, "(C)"),
    ("bbh-date_understanding", "(A) is wrong. So the answer is C.", NO, "C"),
    ("bbh-date_understanding", "A day later it is May.", NO, NO),
    ("bbh-date_understanding", "", NO, NO),
    ("bbh-reasoning_about_colored_objects", "(Q)", "(Q)", "(Q)"),
    ("bbh-boolean_expressions", " True.", "True", "True"),
    ("bbh-boolean_expressions", "False or True", NO, "False"),
    ("bbh-boolean_expressions", "not True = False, so the answer is False.", NO, "False"),
    ("bbh-boolean_expressions", "truely", NO, NO),
    ("bbh-navigate", "Yes", "Yes", "Yes"),
    ("bbh-navigate", "No, you do not.", NO, "No"),
    ("bbh-navigate", "Nowhere near", NO, NO),
    ("bbh-sports_understanding", "yes", "yes", "yes"),
    ("bbh-formal_fallacies", "invalid", "invalid", "invalid"),
    ("bbh-formal_fallacies", "The argument is invalid.", NO, "invalid"),
    ("bbh-multistep_arithmetic_two", " -35", "-35", "-35"),
    ("bbh-multistep_arithmetic_two", "1,234", "1,234", "1,234"),
    ("bbh-multistep_arithmetic_two", "3 - 5 = -2", NO, "-2"),
    ("bbh-multistep_arithmetic_two", "A = 7, B = 12, A * B = 84.", NO, "84"),
    ("bbh-multistep_arithmetic_two", "The answer is 84, since 7 * 12 is that.", NO, "84"),
    ("bbh-multistep_arithmetic_two", "none", NO, NO),
    ("bbh-object_counting", "I have 14 fruits", NO, "14"),
    ("bbh-word_sorting", " barn damp it&t", "barn damp it&t", "barn damp it&t"),
    ("bbh-word_sorting", "Sorted: barn, damp, it&t.\nDone", NO, "barn, damp, it&t"),
    ("bbh-word_sorting", "The answer is: barn damp it&t.", "The answer is: barn damp it&t", "barn damp it&t"),
    ("bbh-dyck_languages", " ] ) >", "] ) >", "] ) >"),
    ("bbh-dyck_languages", "])>", NO, "])>"),
    ("bbh-dyck_languages", "nothing", NO, NO),
    ("bbh-cot-date_understanding", "It is May. So the answer is (B).", "(B)", "(B)"),
    ("bbh-cot-date_understanding", "It is May. So the answer is (B)", "(B)", "(B)"),
    ("bbh-cot-date_understanding", "(A) no, (B) no, hence (C) fits", NO, "(C)"),
    ("bbh-cot-date_understanding", "The answer is (A)? No. The answer is (D).", "(D)", "(D)"),
    ("bbh-cot-multistep_arithmetic_two", "A = -3, B = 4. So the answer is -12.", "-12", "-12"),
    ("bbh-cot-multistep_arithmetic_two", "A = -3, B = 4, A * B = -12", NO, "-12"),
    ("bbh-cot-web_of_lies", "Yes, he lies. So the answer is No.", "No", "No"),
    ("bbh-cot-word_sorting", "We compare. So the answer is barn damp.", "barn damp", "barn damp"),
    ("bbh-cot-dyck_languages", "[ ( are open. So the answer is ) ].", ") ]", ") ]"),
    ("bbh-cot-dyck_languages", "[ ( are open, so we need ) ]", NO, ") ]"),
    ("bbh-cot-dyck_languages", "( ) is closed, [ is not: ]", NO, "]"),
    ("bbh-date_understanding", "The answer is **B**.", NO, "B"),
    ("bbh-date_understanding", "(A) is wrong. The answer is B, since it is May.", NO, "B"),
    ("bbh-word_sorting", 'The answer is "barn damp".', NO, "barn damp"),
    ("bbh-word_sorting", "The answer is **barn damp**.", NO, "barn damp"),
    ("bbh-cot-multistep_arithmetic_two", "So the answer is 24 - 8 = 16.", NO, "16"),
    ("bbh-cot-multistep_arithmetic_two", "So the answer is 24 - 8 = -16.\nQ", NO, "-16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "strict", "lenient"), EXTRACTED)
def test_extraction(name: str, text: str, strict: str, lenient: str) -> None:
    assert read(name, text) == (strict, lenient)


SCORED = [  # task, output, target, strict, lenient
    ("bbh-date_understanding", "(B)", "(B)", True, True),
    ("bbh-date_understanding", "B", "(B)", False, True),
    ("bbh-date_understanding", "(A)", "(B)", False, False),
    ("bbh-multistep_arithmetic_two", "1,234", "1234", True, True),
    ("bbh-multistep_arithmetic_two", "-35", "35", False, False),
    ("bbh-multistep_arithmetic_two", "24.0", "24", True, True),
    ("bbh-multistep_arithmetic_two", "2.40", "24", False, False),
    ("bbh-word_sorting", "barn, damp", "barn damp", True, True),
    ("bbh-word_sorting", "damp barn", "barn damp", False, False),
    ("bbh-dyck_languages", "])", "] )", False, True),
    ("bbh-cot-web_of_lies", "So the answer is yes", "Yes", True, True),
]


@pytest.mark.parametrize(("name", "text", "target", "strict", "lenient"), SCORED)
def test_scores(name: str, text: str, target: str, strict: bool, lenient: bool) -> None:
    assert scores(name, text, target) == (strict, lenient)


@pytest.mark.parametrize("name", MADE)
def test_the_right_answer_is_right_in_every_view(name: str) -> None:
    for row in getattr(embedded, name)("test", 12):
        for view in ("bbh", "bbh-fewshot", "bbh-lorahub"):
            assert scores(f"{view}-{name}", f" {row['target']}", row["target"]) == (True, True)
        thought = f" First this, then 7 of that.\nSo the answer is {row['target']}"
        assert scores(f"bbh-cot-{name}", thought, row["target"]) == (True, True)


@pytest.mark.skipif(not REAL.is_dir(), reason="no mirror of the real data sets beside this checkout")
@pytest.mark.parametrize("name", task_files.groups()["bbh"])
def test_every_real_target_can_be_given(name: str) -> None:
    """Two rows of BBH have the text of an option as target where the others have its letter."""
    rows = sources.load(task_files.get(name), "mirror", REAL).test.to_list()
    missed = [r["target"] for r in rows if scores(name, r["target"], r["target"]) != (True, True)]
    assert set(missed) <= {"Monsters, Inc", "dearth, wind, & fire", "rita, sue and bob poo"}


def test_the_strict_score_is_loraHubs_rule_where_the_answer_has_its_form() -> None:
    """LoraHub compares after strip, lower case and removal of full stops."""
    rng = random.Random(0)
    for target in ("(B)", "True", "No", "valid", "7", "] )"):
        name = next(n for n in task_files.groups()["bbh-lorahub"] if scores(n, target, target)[0])
        for _ in range(60):
            text = (
                rng.choice((" ", "", "\n"))
                + rng.choice((target, target.lower(), target[:-1]))
                + "." * rng.randint(0, 2)
            )
            rule = text.strip().lower().replace(".", "") == target.lower()
            assert scores(name, text, target)[0] == rule, (name, text)


# -- generators: every answer worked out again from the text alone ------------------------------------------


def rows_of(name: str) -> list[dict[str, str]]:
    return getattr(embedded, name)("train", 120, seed=random.randrange(10**6))


def letter(text: str, answer: str) -> str:
    """The letter of the option with this text."""
    return dict((b, a) for a, b in re.findall(r"^(\([A-Z]\)) (.*)$", text, re.MULTILINE))[answer]


@pytest.mark.parametrize("name", ["boolean_expressions", "multistep_arithmetic_two"])
def test_expressions(name: str) -> None:
    for row in rows_of(name):
        expression = row["input"].removesuffix(" is").removesuffix(" =")
        assert re.fullmatch(r"[-+*()\d ]+|(?:True|False|not|and|or|[() ])+", expression)
        assert str(eval(expression)) == row["target"]


def test_dyck_languages() -> None:
    for row in rows_of("dyck_languages"):
        text = row["input"].partition("Input: ")[2] + " " + row["target"]
        while (less := re.sub(r"\( \)|\[ \]|\{ \}|< >", "", " ".join(text.split()))) != text:
            text = less
        assert not text.strip()


def test_word_sorting() -> None:
    for row in rows_of("word_sorting"):
        assert row["target"].split() == sorted(row["input"].partition("List: ")[2].split())


def test_navigate() -> None:
    turns = {"left": 1j, "right": -1j, "around": -1}
    sides = {"forward": 1, "backward": -1, "left": 1j, "right": -1j}
    seen = set()
    for row in rows_of("navigate"):
        at, facing = 0, 1
        for n, way, turn in re.findall(r"Take (\d+) steps?(?: (\w+))?\.|Turn (\w+)\.", row["input"]):
            facing *= turns[turn] if turn else 1
            at += (int(n) * sides[way] if way else int(n) * facing) if n else 0
        assert row["target"] == ("Yes" if at == 0 else "No")
        seen.add(row["target"])
    assert seen == {"Yes", "No"}


def test_web_of_lies() -> None:
    for row in rows_of("web_of_lies"):
        honest: dict[str, bool] = {}
        for who, said, about, claim in re.findall(
            r"(\w+) (?:says (\w+) )?()(tells the truth|lies)\.", row["input"].removeprefix("Question: ")
        ):
            assert not about
            honest[who] = (claim != "lies") == (honest[said] if said else True)
        asked = re.search(r"Does (\w+) tell the truth\?", row["input"])[1]
        assert row["target"] == ("Yes" if honest[asked] else "No")


def test_object_counting() -> None:
    for row in rows_of("object_counting"):
        listed, kind = re.fullmatch(r"I have (.*)\. How many (.*) do I have\?", row["input"]).groups()
        total = 0
        for piece in re.split(r", (?:and )?", listed):
            count, thing = piece.removeprefix("and ").split(" ", 1)
            n = 1 if count in ("a", "an") else world.COUNT.index(count)
            own = [t for t in world.KINDS[kind] if re.fullmatch(rf"{t}(?:e?s)?|{t[:-1]}ies", thing)]
            total += n if own or kind == "objects" else 0
        assert row["target"] == str(total)


def test_date_understanding() -> None:
    for row in rows_of("date_understanding"):
        told = re.search(r"(\w{3}) (\d+), (\d{4})|(\d\d)/(\d\d)/(\d{4})", row["input"])
        text = told[0] if told[4] else f"{told[1]} {int(told[2]):02} {told[3]}"
        day = datetime.strptime(text, "%m/%d/%Y" if told[4] else "%b %d %Y").date()
        lead = row["input"].partition("?")[0]
        shift = {"The day before": 2, "Yesterday": 1, "Tomorrow": -1, "Jane": -1}
        day += timedelta(next((v for k, v in shift.items() if lead.startswith(k)), 0))
        asked = re.search(r"What is the date (.*) in MM", row["input"])[1]
        right: date = day + timedelta(dict(world.SHIFTS)[asked])
        assert row["target"] == letter(row["input"], right.strftime("%m/%d/%Y"))


def test_temporal_sequences() -> None:
    def hours(text: str) -> list[int]:
        return [int(h) % 12 + 12 * (half == "pm") for h, half in re.findall(r"(\d+)(am|pm)", text)]

    for row in rows_of("temporal_sequences"):
        facts = row["input"].partition("know that:\n")[2].partition("\nBetween")[0].splitlines()
        (start,), (end,) = hours(facts[0]), hours(facts[-1])
        busy = [h for line in facts[1:-1] for h in range(*hours(line))]
        free = [h for h in range(start, end) if h not in busy]
        options = {a: hours(b) for a, b in re.findall(r"^(\([A-Z]\)) (.*)$", row["input"], re.MULTILINE)}
        assert options[row["target"]] == [free[0], free[-1] + 1]
        assert free == [*range(free[0], free[-1] + 1)]


@pytest.mark.parametrize("n", ["three", "five", "seven"])
def test_tracking_shuffled_objects(n: str) -> None:
    for row in rows_of(f"tracking_shuffled_objects_{n}_objects")[:40]:
        story, _, rest = row["input"].partition(".\n")
        held = dict(
            re.findall(r"(\w+) (?:gets|has a|is dancing with) ([^,]+?)(?=,|$)", story.partition(": ")[2])
        )
        for a, b in re.findall(r"(?:First|Then|Finally), (\w+) and (\w+) ", rest):
            held[a], held[b] = held[b], held[a]
        asked = re.search(r"At the end of [\w ]+, (\w+) ", rest)[1]
        assert row["target"] == letter(row["input"], held[asked])


@pytest.mark.parametrize("n", ["three", "five"])
def test_logical_deduction(n: str) -> None:
    """Every order that agrees with all clues gives the same answer, by trying all orders."""
    front = {"leftmost": 0, "oldest": 0, "first": 0, "rightmost": -1, "newest": -1, "last": -1}
    ranks = {w: i for i, w in enumerate(("first", "second", "third", "fourth", "fifth"))}
    for row in rows_of(f"logical_deduction_{n}_objects")[:25]:
        text = row["input"]
        things = [t.lower() for t in re.findall(r"^\([A-Z]\) (.*?) (?:is|finished) ", text, re.MULTILINE)]

        def place(said: str, things=things) -> int:
            if m := re.search(r"(\w+)(?: from the |-)(left|right|oldest|newest)", said):
                k = ranks[m[1]]
                return k if m[2] in ("left", "oldest") else len(things) - 1 - k
            k = front.get(word := said.split()[-1], ranks.get(word))
            return k % len(things)

        clues = text.partition(": ")[2].partition("\n")[0].split(". ")[1:]
        orders = []
        for order in itertools.permutations(things):
            at = {t: i for i, t in enumerate(order)}
            ok = True
            for clue in clues:
                clue = clue.rstrip(".").lower()
                who = [t for t in sorted(things, key=len, reverse=True) if re.search(rf"\b{t}\b", clue)]
                if len(who) == 2:
                    a, b = sorted(who, key=clue.index)
                    earlier = re.search("left of|older|above", clue)
                    ok &= at[a] < at[b] if earlier else at[a] > at[b]
                else:
                    ok &= at[who[0]] == place(clue)
            orders += [at] if ok else []
        assert len(orders) == 1
        right = {a: (t.lower(), place(b)) for a, t, b in
                 re.findall(r"^(\([A-Z]\)) (.*?) (?:is|finished) (.*)$", text, re.MULTILINE)}  # fmt: skip
        who, k = right[row["target"]]
        assert orders[0][who] == k


def test_hyperbaton() -> None:
    kind = {w: i for i, words in enumerate(world.ADJECTIVES) for w in words}
    for row in rows_of("hyperbaton"):
        for mark, text in re.findall(r"^(\([AB]\)) (.*)$", row["input"], re.MULTILINE):
            order = [kind[w] for w in text.split()[:-1]]
            assert (order == sorted(order)) == (mark == row["target"])


def test_colored_objects() -> None:
    for row in rows_of("reasoning_about_colored_objects"):
        listed, ask = re.search(r"arranged in a row: (.*?)\. (.*\?)", row["input"]).groups()
        row_ = [p.split()[-2:] for p in re.split(r", (?:and )?", listed)]
        at = next(i for i, (_, item) in enumerate(row_) if ask.endswith(f" {item}?"))
        far = max(range(len(row_)), key=lambda i: abs(i - at))
        i = at + ("right of" in ask) - ("left of" in ask) if "furthest" not in ask else far
        assert row["target"] == letter(row["input"], row_[i][0])


@pytest.mark.parametrize("name", MADE)
def test_splits_share_no_problem_whatever_the_order_of_its_options(name: str) -> None:
    def texts(split: str) -> set[str]:
        found = getattr(embedded, name)(split, 60)
        assert len(found) >= 5 and len({r["input"] for r in found}) == len(found)
        return {" ".join(sorted(re.findall(r"\w+|[^\w\s]", r["input"].lower()))) for r in found}

    found = {s: texts(s) for s in embedded.SHARES}
    for one, two in itertools.combinations(found, 2):
        assert not found[one] & found[two]
    assert getattr(embedded, name)("train", 9) == getattr(embedded, name)("train", 9)


# -- the task files, the cut, the groups ------------------------------------------------------------------


def test_the_files_are_what_the_tool_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_bbh", ROOT / "tools" / "make_bbh.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    there = {str(p.relative_to(tool.HERE)): p.read_text() for p in tool.HERE.rglob("*.yaml")}
    assert there == tool.files()


def test_groups() -> None:
    assert {v: len(task_files.groups()[v]) for v in VIEWS} == dict.fromkeys(VIEWS, 27)
    assert task_files.expand(["gsm8k", "bbh", "bbh-navigate"]) == ["gsm8k", *task_files.groups()["bbh"]]
    assert not {*task_files.groups()} & {*task_files.tasks()}
    with pytest.raises(UserError, match="group of 27 tasks"):
        task_files.get("bbh")
    with pytest.raises(UserError, match='did you mean "bbh-navigate"'):
        task_files.get("bbh-navigat")


def test_lm_eval_knows_the_groups() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_files.folder()), include_defaults=False)
    assert {*VIEWS} <= set(manager.all_groups)


def test_few_shot_prompts_hold_the_five_rows_that_lorahub_learns_from() -> None:
    few, five = task_files.get("bbh-fewshot-navigate"), task_files.get("bbh-lorahub-navigate")
    shown, learnt = sources.load(few, "embedded"), sources.load(five, "embedded")
    assert shown.fewshot.to_list() == learnt.train.to_list() and len(learnt.train) == 5
    assert shown.test.to_list() == learnt.test.to_list()
    prompt, answer = evaluation.prompt_and_answer(evaluation.harness_task(few, shown), shown.test[0])
    for row in learnt.train:
        assert f"Q: {row['input']}\nA: {row['target']}\n\n" in prompt
    assert prompt.endswith(f"Q: {shown.test[0]['input']}\nA:") and answer == f" {shown.test[0]['target']}"
    plain, _ = evaluation.prompt_and_answer(evaluation.harness_task(five, learnt), learnt.test[0])
    assert plain == f"Q: {learnt.test[0]['input']}\nA:"


def mirror(folder: Path, rows: list[dict[str, str]]) -> Path:
    place = folder / "lukaemon__bbh" / "navigate"
    place.mkdir(parents=True)
    (place / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_a_cut_is_the_seeds_alone_and_keeps_equal_texts_together(tmp_path) -> None:
    rows = [{"input": f"row {i % 140}", "target": "Yes" if i < 140 else "No"} for i in range(170)]
    folder = mirror(tmp_path, rows)
    few, zero, five = (
        sources.load(task_files.get(f"{v}-navigate"), "mirror", folder)
        for v in (VIEWS[1], VIEWS[0], VIEWS[3])
    )
    assert (len(five.train), len(zero.train)) == (5, 95)
    assert few.fewshot.to_list() == five.train.to_list()
    assert zero.test.to_list() == five.test.to_list() == few.test.to_list()
    seen = [{r["input"] for r in part} for part in (five.train, zero.train, zero.test)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 140
    cut = zero.info["cut"]
    assert (cut["seed"], cut["of"]) == (42, "test") and zero.info["files"]["test"]["rows"] == 170
    assert {k: v["rows"] for k, v in cut["splits"].items()} == {
        "fewshot": 5,
        "train": 95,
        "test": len(zero.test),
    }
    again = sources.load(task_files.get("bbh-navigate"), "mirror", folder)
    assert again.info == zero.info


def test_a_cut_of_too_few_rows(tmp_path) -> None:
    folder = mirror(tmp_path, [{"input": str(i), "target": "Yes"} for i in range(99)])
    with pytest.raises(UserError, match="has 99 distinct rows; the task cuts off 100"):
        sources.load(task_files.get("bbh-navigate"), "mirror", folder)


# -- groups are run and averaged --------------------------------------------------------------------------


def test_the_average_gives_every_task_the_same_weight() -> None:
    from peftzoo.boards import tables
    from tests.boards.test_tables import make

    values = {"bbh-navigate": 0.2, "bbh-snarks": 0.6, "bbh-web_of_lies": 0.7}
    records = [make("lora", s, v + s / 10, task=t) for t, v in values.items() for s in (0, 1)]
    records += [make("dora", 0, 0.9, task="bbh-navigate"), make("lora", 0, 1.0, task="sst2")]
    records += [make("ia3", 0, None, task="bbh-navigate", status="failed")]
    found = tables.averages(records, task_files.groups()["bbh"])
    told = [(r["method"], r["seed"], r["tasks"], round(r["score"], 6)) for r in found]
    assert told == [("lora", 0, 3, 0.5), ("lora", 1, 3, 0.6), ("dora", 0, 1, 0.9)]
    assert tables.averages(records, ["gsm8k"]) == []


def test_the_average_is_one_whatever_the_metrics_and_the_words_for_the_tasks() -> None:
    from peftzoo.boards import tables
    from tests.boards.test_tables import make

    told = {"cola": "mcc", "stsb": "pearson", "sst2": "acc"}
    records = [
        make("lora-gen", 0, None, task=t, options={"r": 8, "description": f"about {t}"},
             score={"metric": m, "value": v, "rows": 9})
        for (t, m), v in zip(told.items(), (0.1, 0.2, 0.6), strict=True)
    ]  # fmt: skip
    (row,) = tables.averages(records, told)
    assert (row["tasks"], row["metric"], row["score"]) == (3, "acc, mcc, pearson", pytest.approx(0.3))


def test_bench_runs_a_group_leaves_out_what_has_no_rows_and_says_the_mean(
    tmp_path, monkeypatch, capsys
) -> None:
    import sys

    from peftzoo import cli

    group = ("bbh-boolean_expressions", "bbh-snarks", "bbh-multistep_arithmetic_two")
    monkeypatch.setattr(task_files, "_groups", lambda: {"few": group})
    monkeypatch.setattr(task_files, "_jointly_trained", lambda name: None)
    words = "peftzoo bench --method none --task few --limit 2 --max-new-tokens 2 --precision fp32"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    assert 'skipped: task "bbh-snarks" has no embedded generator' in shown.err
    assert re.search(r"none +0 +2 of 3 +exact_match,strict +\d\.\d{3}", shown.out), shown.out
    assert len(list((tmp_path / "records").rglob("*.json"))) == 2
