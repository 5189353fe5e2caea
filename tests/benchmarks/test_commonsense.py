"""Commonsense: lm-eval's own requests, LLM-Adapters' own instructions, extraction, generated rows."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftzoo.benchmarks.commonsense import embedded, instructions, questions, world
from peftzoo.scoring import evaluation
from peftzoo.tasks import row_numbers, run_data, sources, task_files
from tests.benchmarks.extraction import read, scores

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
CHOICE = task_files.groups()["commonsense-choice"]
GENERATE = task_files.groups()["commonsense"]
SCORED = {name: task_files.get(name).eval_split for name in CHOICE}
real = pytest.mark.skipif(not REAL.is_dir(), reason="no mirror of the real data sets beside this checkout")


# -- the choice view is lm-eval's ------------------------------------------------------------------------

THEIRS = {
    "boolq": "super_glue/boolq/default", "piqa": "piqa/piqa", "social_iqa": "siqa/siqa",
    "hellaswag": "hellaswag/hellaswag", "winogrande": "winogrande/default", "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge", "openbookqa": "openbookqa/openbookqa",
}  # fmt: skip


def some(rows: Any, n: int) -> Any:
    return rows.select(random.sample(range(len(rows)), min(n, len(rows))))


def real_rows(name: str, trains: bool = False) -> sources.Rows:
    return sources.load(task_files.get(name), "mirror", REAL, trains)


def both(name: str, rows: Any) -> tuple[Any, Any]:
    """lm-eval's task from its own file, and ours, over the same rows."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{THEIRS[name]}.yaml")
    found = dict.fromkeys(("train", "validation", "test"), rows)
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: found}), evaluation.harness_task(
        task_files.get(name), sources.Rows(rows, rows)
    )


@pytest.mark.parametrize("source", ["embedded", pytest.param("mirror", marks=real)])
@pytest.mark.parametrize("name", CHOICE)
def test_requests_and_scores_are_those_of_lm_evals_own_task(name: str, source: str) -> None:
    task = task_files.get(name)
    rows = some(sources.load(task, source, REAL, trains=False).test, 25)
    theirs, ours = both(name, rows)
    for lm_task in (theirs, ours):
        lm_task.build_all_requests(limit=None, rank=0, world_size=1)
    assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]
    assert {*ours._metric_fn_list} == {*theirs._metric_fn_list}
    for a, b in zip(theirs.task_docs, ours.task_docs, strict=True):
        options = len([i for i in ours.instances if i.doc == b])
        said = [(math.log(random.random()), False) for _ in range(options)]
        assert {k: float(v) for k, v in theirs.process_results(a, said).items()} == {
            k: float(v) for k, v in ours.process_results(b, said).items()
        }


@real
@pytest.mark.parametrize("name", CHOICE)
def test_the_split_that_lm_eval_scores_is_in_the_mirror_and_needs_no_training_rows(name: str) -> None:
    rows = real_rows(name)
    assert rows.train is None and len(rows.test) >= 500
    with pytest.raises(sources.NoRows, match=r"lacks .*train\.jsonl"):
        real_rows(name, trains=True)


def test_the_markup_of_hellaswag_is_taken_out() -> None:
    row = {"ind": 0, "activity_label": "Tea", "source_id": "", "split": "val", "split_type": "indomain",
           "ctx_a": "[header] How to make tea [title] Heat  water. [step] Wait.", "ctx_b": "", "ctx": "",
           "endings": ["[substeps] Pour it [title] Drink.", "a", "b", "c"], "label": "0"}  # fmt: skip
    import datasets

    _, ours = both("hellaswag", datasets.Dataset.from_list([row]))
    assert ours.doc_to_text(row) == "Tea: How to make tea. Heat water. Wait."
    assert ours.doc_to_choice(row)[0] == " Pour it. Drink."


def test_a_winograd_sentence_is_trained_on_with_the_right_option() -> None:
    row = {"sentence": "Mia thanked Leo because _ helped.", "option1": "Mia", "option2": "Leo", "answer": "2"}
    import datasets

    rows = datasets.Dataset.from_list([row])
    lm_task = evaluation.harness_task(task_files.get("winogrande"), sources.Rows(rows, rows))
    assert evaluation.prompt_and_answer(lm_task, row) == ("Mia thanked Leo because Leo", " helped.")


# -- the generate view is LLM-Adapters' ------------------------------------------------------------------


def told(name: str) -> Any:
    return getattr(instructions, "from_arc" if name.startswith("arc") else f"from_{name}")


@real
@pytest.mark.parametrize("name", CHOICE)
def test_our_wording_of_the_original_rows_is_llm_adapters_own(name: str) -> None:
    ours, theirs = (row_numbers.without(real_rows(n).test) for n in (name, f"commonsense-{name}"))
    assert len(ours) == len(theirs)
    for i in random.sample(range(len(ours)), 150):
        assert told(name)(ours[i]) == theirs[i]


@pytest.mark.parametrize("name", CHOICE)
def test_the_embedded_instructions_are_the_scored_rows_of_the_choice_view(name: str) -> None:
    tasks = (task_files.get(f"commonsense-{name}"), task_files.get(name))
    ours, choice = (row_numbers.without(sources.load(t, "embedded").test).to_list() for t in tasks)
    assert ours == [told(name)(row) for row in choice] and len(ours) == 100


def test_the_prompt_is_alpacas_and_the_answer_a_sentence() -> None:
    row = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "", "answer": "true"}
    import datasets

    rows = datasets.Dataset.from_list([row])
    lm_task = evaluation.harness_task(task_files.get("commonsense-boolq"), sources.Rows(rows, rows))
    prompt, answer = evaluation.prompt_and_answer(lm_task, row)
    assert prompt + answer == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request. \n\n### Instruction:\nIs it?\n\nAnswer format: true/false\n\n### Response:\n"
        "the correct answer is true"
    )


@real
@pytest.mark.parametrize("name", GENERATE)
def test_what_is_learned_is_the_output_column(name: str) -> None:
    task, rows = task_files.get(name), real_rows(name)
    for row in rows.test.to_list()[:200] + (rows.train.to_list()[:200] if rows.train else []):
        assert task.doc_to_target.replace("{{answer}}", row["answer"]) == row["output"]
        assert scores(name, row["output"], row) == (True, True)


# -- extraction ------------------------------------------------------------------------------------------

NO = evaluation.INVALID
EXTRACTED = [  # task, output, first, strict
    ("boolq", "\nthe correct answer is true", "true", "true"),
    ("boolq", "The correct answer is True.", "True", "True"),
    ("boolq", "False", "False", NO),
    ("boolq", "It is not true, so the correct answer is false", "true", NO),
    ("boolq", "the correct answer is truely", NO, NO),
    ("boolq", "untrue", NO, NO),
    ("boolq", "yes", NO, NO),
    ("boolq", "", NO, NO),
    ("piqa", "the correct answer is solution2", "solution2", "solution2"),
    ("piqa", "Solution1: take a saw.", "Solution1", NO),
    ("piqa", "solution3", NO, NO),
    ("piqa", "solution 1", NO, NO),
    ("social_iqa", "the correct answer is answer3", "answer3", "answer3"),
    ("social_iqa", "(answer2).", "answer2", NO),
    ("social_iqa", "the correct answer is answer12", NO, NO),
    ("social_iqa", "answer1/answer2/answer3", "answer1", NO),
    ("hellaswag", "the correct answer is ending4.", "ending4", "ending4"),
    ("hellaswag", "the correct answer is answer4", NO, NO),
    ("winogrande", "THE CORRECT ANSWER IS OPTION1", "OPTION1", "OPTION1"),
    ("winogrande", "the correct answer is option1, not option2", "option1", NO),
    ("arc_easy", "the correct answer is answer5", "answer5", "answer5"),
    ("arc_easy", "B", NO, NO),
    ("arc_challenge", "the correct answer is\nanswer2", "answer2", NO),
    ("arc_challenge", "the answer is 2", NO, NO),
    ("openbookqa", "the correct answer is answer4\n\nthe correct answer is answer1", "answer4", NO),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "first", "strict"), EXTRACTED)
def test_extraction(name: str, text: str, first: str, strict: str) -> None:
    assert read(f"commonsense-{name}", text) == (first, strict)


def test_scores_ignore_case_and_nothing_else() -> None:
    assert scores("commonsense-boolq", "True", {"answer": "true"}) == (True, False)
    assert scores("commonsense-boolq", "The correct answer is TRUE", {"answer": "true"}) == (True, True)
    assert (
        scores("commonsense-piqa", "the correct answer is solution1", {"answer": "solution2"}) == (False,) * 2
    )


PUBLISHED = {  # what LLM-Adapters looks for, and takes the first of
    "boolq": "true|false", "piqa": "solution1|solution2", "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2", "social_iqa": "answer1|answer2|answer3|answer4|answer5",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_first_match_is_llm_adapters_rule_for_words_that_stand_alone(name: str) -> None:
    words = [*PUBLISHED[name].split("|"), "the", "correct", "answer", "is", "maybe", ":", "\n", "no."]
    for _ in range(150):
        text = " ".join(random.choices(words, k=random.randint(0, 9)))
        want = re.findall(PUBLISHED[name], text.strip())
        assert read(f"commonsense-{name}", text)[0] == (want[0] if want else NO)


# -- generated rows --------------------------------------------------------------------------------------


def rows_of(name: str, split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    return getattr(embedded, name)(split, n, seed)


def options(name: str, row: dict[str, Any]) -> tuple[list[str], int]:
    """The options of a row and the place of the right one, read as lm-eval reads them."""
    if name == "winogrande":
        return [row["option1"], row["option2"]], int(row["answer"]) - 1
    if name == "boolq":
        return ["no", "yes"], row["label"]
    if name == "piqa":
        return [row["sol1"], row["sol2"]], row["label"]
    if name == "social_iqa":
        return [row[f"answer{x}"] for x in "ABC"], int(row["label"]) - 1
    if name == "hellaswag":
        return row["endings"], int(row["label"])
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


@real
@pytest.mark.parametrize("name", CHOICE)
def test_columns_are_those_of_the_data_set(name: str) -> None:
    def kinds(row: dict[str, Any]) -> dict[str, Any]:
        inside = row.get("choices", {})
        return {k: type(v) for k, v in row.items()} | {f"choices.{k}": type(v) for k, v in inside.items()}

    assert kinds(rows_of(name, "train", 1)[0]) == kinds(row_numbers.without(real_rows(name).test)[0])


@pytest.mark.parametrize("name", CHOICE)
def test_rows_are_the_seeds_alone_and_distinct(name: str) -> None:
    seed, state = random.randrange(10**6), random.getstate()
    rows = rows_of(name, "train", 300, seed)
    assert random.getstate() == state, "the global random state was used"
    assert rows == rows_of(name, "train", 300, seed) and rows[:40] == rows_of(name, "train", 40, seed)
    assert rows != rows_of(name, "train", 300, seed + 1)
    bare = [{k: v for k, v in row.items() if k not in ("id", "idx", "ind", "source_id")} for row in rows]
    assert len({repr(row) for row in bare}) == len(rows)
    with pytest.raises(ValueError, match="dev"):
        rows_of(name, "dev", 1)


def question(name: str, row: dict[str, Any]) -> str:
    if name == "winogrande":  # both readings of a sentence count as one question: up to the word that decides
        return row["sentence"].rpartition(" _ ")[0]
    asked = {"boolq": "question", "piqa": "goal", "arc_easy": "question", "arc_challenge": "question",
             "openbookqa": "question_stem"}  # fmt: skip
    if name == "social_iqa":
        return f"{row['context']} {row['question']}"
    return f"{row['activity_label']} {row['ctx']}" if name == "hellaswag" else row[asked[name]]


@pytest.mark.parametrize("name", CHOICE)
def test_splits_share_no_question(name: str) -> None:
    found = {
        s: {embedded.normalise(question(name, r)) for r in rows_of(name, s, 400)} for s in embedded.SHARES
    }
    for one, two in itertools.combinations(found, 2):
        assert not found[one] & found[two]


def margin(chance: float, n: int) -> float:
    """Five standard errors of a share."""
    return 5 * math.sqrt(chance * (1 - chance) / n)


@pytest.mark.parametrize("name", CHOICE)
def test_the_right_answer_is_at_every_place_and_of_every_length(name: str) -> None:
    rows = [options(name, r) for r in rows_of(name, "train", 1200, random.randrange(10**6))]
    k = len(rows[0][0])
    places = Counter(right for _, right in rows)
    for place in range(k):
        assert abs(places[place] / len(rows) - 1 / k) < margin(1 / k, len(rows)), "not at every place"
    if name == "boolq":
        return
    for extreme in (max, min):  # choosing the longest or the shortest option, ties by lot
        hits = 0.0
        for texts, right in rows:
            lengths = [len(t) for t in texts]
            best = extreme(lengths)
            hits += (lengths[right] == best) / lengths.count(best)
        assert abs(hits / len(rows) - 1 / k) < margin(1 / k, len(rows)), "the length tells"


@pytest.mark.parametrize("name", CHOICE)
def test_no_word_tells_the_right_answer(name: str) -> None:
    """A linear model of the options' words (the question's, for yes or no) does no better than chance."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    def pieces(row: dict[str, Any]) -> tuple[list[str], int]:
        return ([row["question"]], row["label"]) if name == "boolq" else options(name, row)

    seed = random.randrange(10**6)
    known = [pieces(r) for r in rows_of(name, "train", 1000, seed)]
    asked = [pieces(r) for r in rows_of(name, "validation", 600, seed)]
    words = CountVectorizer(binary=True, token_pattern=r"\w+").fit(t for texts, _ in known for t in texts)
    x = words.transform([t for texts, _ in known for t in texts])
    y = [right if name == "boolq" else i == right for texts, right in known for i in range(len(texts))]
    model = LogisticRegression(C=1.0, max_iter=300).fit(x, y)
    score = model.decision_function(words.transform([t for texts, _ in asked for t in texts]))
    score = score.reshape(len(asked), -1)
    picked = (score[:, 0] > 0) if name == "boolq" else score.argmax(1)
    hits = float(np.mean(picked == np.array([right for _, right in asked])))
    chance = 0.5 if name == "boolq" else 1 / len(asked[0][0])
    assert hits < chance + margin(chance, len(asked))


def test_comparisons_are_true() -> None:
    """Worked out again from the text: exactly the right option is on the right side of the thing it names."""
    scales = {w: (scale, 1 - 2 * i) for pair, scale in world.SCALES.items() for i, w in enumerate(pair)}
    seen = 0
    for row in rows_of("arc_easy", "train", 800):
        texts, right = options("arc_easy", row)
        if m := re.search(r"(more|fewer) legs than an? (\w+)\?", row["question"]):
            above = [world.LEGS[t] > world.LEGS[m[2]] for t in texts]
            below = [world.LEGS[t] < world.LEGS[m[2]] for t in texts]
            found = above if m[1] == "more" else below
        elif m := re.search(r"(\w+) than an? (\w+)\?", row["question"]):
            scale, up = scales[m[1]]
            found = [up * (scale.index(t) - scale.index(m[2])) > 0 for t in texts]
        else:
            continue
        seen += 1
        assert found == [i == right for i in range(4)], row
    assert seen > 100


def test_claims_are_true_where_the_label_says_so() -> None:
    """A question of yes or no against the fact in its passage, by the tables alone."""
    scale_of = {word: (scale, i == 0) for pair, scale in world.SCALES.items() for i, word in enumerate(pair)}
    seen: Counter[str] = Counter()
    for row in rows_of("boolq", "train", 800):
        ask = row["question"]
        if m := re.fullmatch(r"is an? (\w+) (\w+) than an? (\w+)", ask):
            scale, up = scale_of[m[2]]
            holds, kind = (scale.index(m[1]) > scale.index(m[3])) == up, "compared"
        elif m := re.fullmatch(r"does an? (\w+) have (more|fewer) legs than an? (\w+)", ask):
            holds, kind = (world.LEGS[m[1]] > world.LEGS[m[3]]) == (m[2] == "more"), "legs"
        elif m := re.fullmatch(r"is an? (\w+) a kind of (.+)", ask):
            holds, kind = m[1] in world.KINDS[m[2]], "kind"
        elif m := re.fullmatch(r"is an? (\w+) made of (\w+)", ask):
            holds, kind = m[1] in world.MATERIALS[m[2]], "material"
        else:
            m = re.fullmatch(r"does one use (?:an? )?(\w+) to (.+)", ask)
            holds, kind = world.USES[m[1]] == m[2], "use"
        assert row["label"] == holds, row
        seen[kind] += 1
    assert len(seen) == len(questions.CLAIMS) and min(seen.values()) > 50


def test_experiments_days_and_orders_are_true() -> None:
    for row in rows_of("arc_challenge", "train", 600):
        texts, right = options("arc_challenge", row)
        if m := re.search(r"Which one grew the (\w+)\?", row["question"]):
            sizes = {n: int(s) for n, s in re.findall(r"(plant \w) grew (\d+)", row["question"])}
            assert texts[right] == (max if m[1] == "most" else min)(sizes, key=sizes.__getitem__)
        if m := re.search(r"is (\d) days? (\w+) (\w+)\?", row["question"]):
            step = int(m[1]) * (1 if m[2] == "after" else -1)
            assert texts[right] == world.DAYS[(world.DAYS.index(m[3]) + step) % 7]
    for row in rows_of("piqa", "train", 300):
        texts, right = options("piqa", row)
        if m := re.fullmatch(r"One (.*), and then one (.*)\.", texts[right]):
            (steps,) = [s for c, s in world.COURSES.items() if row["goal"].startswith(c)]
            assert steps.index(m[1]) < steps.index(m[2])
    for row in rows_of("hellaswag", "train", 300):
        texts, right = options("hellaswag", row)
        (steps,) = [s for c, s in world.COURSES.items() if c in f"{row['activity_label']} {row['ctx_a']}"]
        at = [i for i, s in enumerate(steps) if s in texts[right]]
        assert any(i and steps[i - 1] in row["ctx_a"] and steps[i - 2] in row["ctx_a"] for i in at), row


# -- groups, overlap -------------------------------------------------------------------------------------


def test_two_views_that_never_share_a_table() -> None:
    for group, names in (("commonsense", GENERATE), ("commonsense-choice", CHOICE)):
        task_group = task_files.task_group(group)
        assert [t.name for t in task_group.tasks] == [*names] and len(names) == 8
        assert {t.extra.protocol for t in task_group.tasks} == {task_group.about.protocol}
    assert (
        task_files.task_group("commonsense").about.protocol
        != task_files.task_group("commonsense-choice").about.protocol
    )


def test_all_eight_are_trained_together_on_all_rows() -> None:
    found = run_data.load(task_files.task_group("commonsense"), "embedded", None, trains=True)
    assert found.info["trained_on"] == dict.fromkeys(GENERATE, 600) and "overlap" not in found.info
    assert found.trained_rows == 4800 and found.scored_rows == 800


@real
def test_the_mirror_has_four_training_files_and_known_overlaps() -> None:
    found = run_data.load(task_files.task_group("commonsense"), "mirror", REAL, trains=True)
    assert {*found.info["trained_on"]} == {
        f"commonsense-{n}" for n in ("boolq", "arc_easy", "arc_challenge", "openbookqa")
    }
    assert {k: v["rows"] for k, v in found.info["overlap"].items()} == {"commonsense-arc_easy": 2}
    assert "left_out" not in found.info
