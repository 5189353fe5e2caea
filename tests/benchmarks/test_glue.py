"""GLUE: what the generators say, what the real rows look like, prompts and groups."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from peftzoo import models
from peftzoo.benchmarks.glue import embedded, events, grammar, inference, paraphrase, pronouns, reading
from peftzoo.errors import UserError
from peftzoo.scoring import evaluation
from peftzoo.tasks import run_data, sources, task_files

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no mirror of the real data sets beside this checkout")

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli")
PAIR = ("sentence1", "sentence2")
MADE = {  # generator, its columns of text, number of labels
    "cola": (grammar.cola, ("sentence",), 2),
    "mrpc": (paraphrase.mrpc, PAIR, 2),
    "qqp": (paraphrase.qqp, ("question1", "question2"), 2),
    "mnli": (inference.mnli, ("premise", "hypothesis"), 3),
    "qnli": (reading.qnli, ("question", "sentence"), 2),
    "rte": (inference.rte, PAIR, 2),
    "wnli": (pronouns.wnli, PAIR, 2),
}


def rows(name: str, n: int = 300, split: str = "train", seed: int | None = None) -> list[dict]:
    """Other rows in every run of the tests."""
    return MADE[name][0](split, n, random.randrange(10**6) if seed is None else seed)


@cache
def made(name: str) -> sources.Rows:
    return sources.load(task_files.get(name), "embedded")


@cache
def mirrored(name: str) -> run_data.RunData:
    return run_data.load(task_files.task_group(name), "mirror", REAL, trains=True)


# -- generators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_rows_have_columns_labels_and_numbers(name: str) -> None:
    _, columns, labels = MADE[name]
    found = rows(name, 800)
    assert all([*row] == [*columns, "label", "idx"] for row in found)
    assert [row["idx"] for row in found] == [*range(800)]
    assert len({tuple(embedded.normalise(row[c]) for c in columns) for row in found}) == 800
    share = Counter(row["label"] for row in found)
    assert set(share) == {*range(labels)}
    assert all(abs(n / 800 - 1 / labels) < 0.08 for n in share.values())


@pytest.mark.parametrize("name", MADE)
def test_rows_are_the_seeds_alone(name: str) -> None:
    state = random.getstate()
    found = rows(name, 80, seed=3)
    assert random.getstate() == state, "the global random state was used"
    assert rows(name, 80, seed=3) == found and rows(name, 30, seed=3) == found[:30]
    assert rows(name, 80, seed=4) != found
    with pytest.raises(ValueError, match="dev"):
        rows(name, 1, "dev")


@pytest.mark.parametrize("name", MADE)
def test_splits_share_nothing(name: str) -> None:
    """No text of one split is in another; of QNLI no sentence, of MNLI, RTE and WNLI no first text."""
    _, columns, _ = MADE[name]
    own = {"qnli": ("sentence",), "mnli": ("premise",), "rte": PAIR[:1], "wnli": PAIR[:1]}.get(name, columns)
    splits = [{embedded.normalise(row[c]) for row in rows(name, 300, s) for c in own}
              for s in ("train", "validation", "test", "reserve")]  # fmt: skip
    for one, two in itertools.combinations(splits, 2):
        assert len(one) >= 250 and not one & two


def best(counts: list[Counter]) -> int:
    """Rows that the best rule gets right that sees only which of these groups a row is in."""
    return sum(max(c.values(), default=0) for c in counts)


@pytest.mark.parametrize("name", MADE)
def test_neither_a_word_nor_the_length_tells_the_label(name: str) -> None:
    _, columns, kinds = MADE[name]
    found = rows(name, 1500)
    total = Counter(row["label"] for row in found)
    for column in columns:
        with_word: dict[str, Counter] = {}
        of_length: dict[int, Counter] = {}
        for row in found:
            words = row[column].lower().rstrip(".?").split()
            of_length.setdefault(min(len(words), 25), Counter())[row["label"]] += 1
            for word in {*words}:
                with_word.setdefault(word, Counter())[row["label"]] += 1
        assert best([*of_length.values()]) / 1500 < 1 / kinds + 0.1
        for word, counts in with_word.items():
            assert best([counts, total - counts]) / 1500 < 1 / kinds + 0.08, word


@pytest.mark.parametrize("name", [n for n, (_, columns, _) in MADE.items() if len(columns) == 2])
def test_one_text_of_a_pair_does_not_tell_the_label(name: str) -> None:
    """A linear model on the words of one of the texts is no better than chance."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    _, columns, kinds = MADE[name]
    found = rows(name, 1200)
    labels = [row["label"] for row in found]
    for column in columns:
        words = CountVectorizer(binary=True).fit_transform(row[column] for row in found)
        model = LogisticRegression(C=0.1, max_iter=50).fit(words[:700], labels[:700])
        assert model.score(words[700:], labels[700:]) < 1 / kinds + 0.11


# -- generators: every label worked out again from the text alone ------------------------------------------

DATA_FIELDS = re.compile(
    r"(?:On (?P<day1>\w+) |At the (?P<place1>\w+) )?(?P<one>\w+) (?P<verb>gives|sells|gets|buys) "
    r"(?:(?P<to>[A-Z]\w+) )?(?P<count>\d+|some) (?P<thing>\w+)(?: (?:to|from) (?P<two>\w+))?"
    r"(?: at the (?P<place2>\w+))?(?: on (?P<day2>\w+))?\."
)
ASKED = re.compile(
    r"(?:(?P<slot>Where|When)|(?P<count>How many) (?P<things>\w+)) does (?P<one>\w+) "
    r"(?P<verb>give|sell|get|buy) (?:the (?P<thing>\w+) )?(?:to|from) (?P<two>\w+)\?"
)


def sides(found: dict) -> dict:
    """Who gives, who takes, and whether it is paid."""
    verb, people = found["verb"].removesuffix("s"), (found["one"], found.get("to") or found["two"])
    giver, taker = people if verb in ("give", "sell") else people[::-1]
    return {"giver": giver, "taker": taker, "paid": verb in ("sell", "buy")}


def event(text: str) -> dict:
    found = DATA_FIELDS.fullmatch(text).groupdict()
    known = {k: found[f"{k}1"] or found[f"{k}2"] for k in ("place", "day")}
    count = None if found["count"] == "some" else found["count"]
    return sides(found) | known | {"count": count, "thing": found["thing"]}


def test_mrpc_pairs_tell_one_event_or_two() -> None:
    for row in rows("mrpc"):
        one, two = event(row["sentence1"]), event(row["sentence2"])
        assert [*one.values()].count(None) == 1
        assert row["label"] == (one == two)


def test_rte_statements_follow_from_an_event_or_not() -> None:
    for row in rows("rte"):
        told, claim = event(row["sentence1"]), event(row["sentence2"])
        known = {k: v for k, v in claim.items() if v is not None}
        assert len(known) == len(claim) - 2
        assert row["label"] == (not known.items() <= told.items())


def test_qnli_sentences_hold_the_answer_or_not() -> None:
    slots = {"Where": "place", "When": "day", None: "count"}
    for row in rows("qnli"):
        told, asked = event(row["sentence"]), ASKED.fullmatch(row["question"]).groupdict()
        about = sides(asked) | {"thing": asked["thing"] or asked["things"]}
        answered = about.items() <= told.items() and told[slots[asked["slot"]]] is not None
        assert row["label"] == (not answered)


KEYS = {"cost": "cost|price|dollars", "place": "Where|place", "color": "color", "time": "When|day"}


def question(text: str) -> tuple[str, ...]:
    (key,) = (k for k, words in KEYS.items() if re.search(rf"\b(?:{words})\b", text))
    (who,) = (name for name in events.PEOPLE if re.search(rf"\b{name}\b", text))
    return key, who, *re.search(r"the (big|small|little|old|new) (\w+)", text).groups()


def test_qqp_pairs_ask_the_same_or_not() -> None:
    for row in rows("qqp"):
        assert row["question1"] != row["question2"]
        assert row["label"] == (question(row["question1"]) == question(row["question2"]))


CLAUSES = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "in": r"(\w+) is (?:(not) )?in the (\w+)",
        "hat": r"the hat of (\w+) is (?:(not) )?(\w+)",
        "books": r"(\w+) (?:has|does (not) have) (\w+) books",
        "comes": r"(\w+) (?:comes|does (not) come) on (\w+)",
        "stops": r"(the \w+ \w+) (?:stops|does (not) stop) near the (\w+)",
        "front": r"the front of (the \w+ \w+) is (?:(not) )?(\w+)",
        "takes": r"(the \w+ \w+) (?:takes|does (not) take) (\w+) people",
        "leaves": r"(the \w+ \w+) (?:leaves|does (not) leave) at (\w+)",
    }.items()
}


def clause(text: str) -> tuple[tuple[str, str], bool, str]:
    """What is spoken of, whether it is denied, and the value."""
    ((kind, found),) = ((k, m) for k, p in CLAUSES.items() if (m := p.fullmatch(text)))
    return (found[1], kind), found[2] is not None, found[3]


@pytest.mark.parametrize("split", ["train", "validation_matched", "validation_mismatched"])
def test_mnli_statements_follow_or_contradict_or_neither(split: str) -> None:
    kinds = set()
    for row in rows("mnli", split=split):
        told = [clause(t) for t in re.split(" and |, while ", row["premise"].lower().rstrip("."))]
        facts = {what: value for what, denied, value in told if not denied}
        what, denied, value = clause(row["hypothesis"].lower().rstrip("."))
        holds = (facts.get(what) == value) != denied
        assert len(facts) == 2 and row["label"] == (1 if what not in facts else 0 if holds else 2)
        kinds |= {kind for _, kind in facts}
    assert kinds == {*(([*CLAUSES][4:]) if split.endswith("mismatched") else [*CLAUSES][:4])}


def acceptable(sentence: str) -> bool:
    """Whether the sentence is one of the grammar's, by a pattern."""
    sizes = "|".join(grammar.SIZES)

    def noun(nouns: dict[str, str], many: bool) -> str:
        first = "two|three" if many else "a(?! [aeiou])|an(?= [aeiou])"
        return rf"(?:{first}) (?:(?:{sizes}) )?(?:{'|'.join(nouns.values() if many else nouns)})"

    who = rf"(?:{noun(grammar.BEINGS, False)} is|{noun(grammar.BEINGS, True)} are)"
    what = rf"(?:{noun(grammar.GOODS, False)}|{noun(grammar.GOODS, True)})"
    where = "(?: (?:in the garden|in the yard|in the street|on the road|near the lake))?"
    whole = rf"{who} (?:{'|'.join(grammar.VERBS)}) {what}{where}\."
    return bool(re.fullmatch(whole, sentence[0].lower() + sentence[1:]))


def test_cola_sentences_are_in_the_grammar_or_not() -> None:
    for row in rows("cola"):
        assert row["label"] == acceptable(row["sentence"]), row


def test_cola_faults_keep_the_length_on_the_average() -> None:
    lengths = {0: [], 1: []}
    for row in rows("cola", 2000):
        lengths[row["label"]].append(len(row["sentence"].split()))
    wrong, right = (sum(x) / len(x) for x in lengths.values())
    assert abs(wrong - right) < 0.4


FIRST = """gives has-two-of-them, sells needs-the-money, carries is-strong, cannot-see is-too-small,
    runs-after lost-the, teaches knows-how, asks cannot-find-it, makes likes-to-make, pays bought-it,
    thanks got-a, go-into is-too-big, hides is-so-large, breaks is-so-hard, falls-off rolls, cleaner is-new"""
SECOND = """gives has-none, sells needs-one-for-school, carries is-weak, cannot-see is-too-tall,
    runs-after took-the, teaches does-not-know, asks used-it, makes wants-to-get, pays sold-it,
    thanks gave-a, go-into is-too-small, hides is-so-little, breaks is-so-weak, falls-off has-no,
    cleaner is-old"""


def test_wnli_pronouns_mean_what_the_sense_says() -> None:
    meant = {tuple(pair.split()): at for at, text in enumerate((FIRST, SECOND)) for pair in text.split(",")}
    seen = set()
    for row in rows("wnli", 600):
        story, pronoun, ending = re.fullmatch(r"(.*) because (she|he|it) (.*)", row["sentence1"]).groups()
        (case,) = (
            (verb, cue) for verb, cue in meant
            if f" {verb.replace('-', ' ')} " in story and ending.startswith(cue.replace("-", " "))
        )  # fmt: skip
        pool = {"she": events.WOMEN, "he": events.MEN, "it": pronouns.GOODS}[pronoun]
        named = [w for w in re.findall(r"\w+", story) if w in pool]
        claim = row["sentence2"].removeprefix("The ").split()
        assert len(named) == 2 and row["sentence2"].endswith(ending) and claim[0] in named
        assert row["label"] == (claim[0] == named[meant[case]]), row
        seen.add(case)
    assert seen == {*meant}


# -- the task files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLUE)
def test_embedded_rows_load_as_the_task_file_says(name: str) -> None:
    task, found = task_files.get(name), made(name)
    assert (len(found.train), len(found.test)) == (2400, 300)
    texts = {*task.extra.head.text}
    assert texts <= {*found.train.column_names}
    if task.extra.head.labels:
        assert {*found.test["label"]} == {*range(len(task.extra.head.labels))}


def test_the_two_views_of_mnli_share_their_training_rows() -> None:
    one, two = (made(f"mnli_{m}") for m in ("matched", "mismatched"))
    assert one.train.to_list() == two.train.to_list()
    assert not {*one.test["premise"]} & {*two.test["premise"]}


@real
@pytest.mark.parametrize("name", [n for n in GLUE if n != "mnli_mismatched"])
def test_real_rows_load_and_look_like_the_generated_ones(name: str) -> None:
    task = task_files.get(name)
    found = mirrored(name).eval_sets[0].rows
    for one, two in ((found.train, made(name).train), (found.test, made(name).test)):
        assert one.column_names == two.column_names and len(one) > 70
        assert {k: type(v) for k, v in one[0].items()} == {k: type(v) for k, v in two[0].items()}
    if task.extra.head.labels:
        assert {*found.test["label"]} == {*range(len(task.extra.head.labels))}
    stands_in = found.info["files"][task.eval_split].get("stand_in")
    assert stands_in == ("train_heldout" if name in ("qqp", "mnli_matched") else None)


@real
def test_a_real_set_that_the_mirror_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"mnli/validation_mismatched\.jsonl"):
        sources.load(task_files.get("mnli_mismatched"), "mirror", REAL)


@real
@pytest.mark.parametrize("name", [n for n in GLUE if n != "mnli_mismatched"])
def test_scored_rows_that_are_training_rows_too(name: str) -> None:
    """None but in two data sets, whose task files say so; anything else is refused when the rows load."""
    found, columns = mirrored(name), task_files.get(name).extra.head.text
    rows = found.eval_sets[0].rows
    counts = []
    for same in (str, embedded.normalise):  # of equal signs, and of equal letters and digits
        seen, scored = (
            [tuple(map(same, texts)) for texts in zip(*(part[c] for c in columns), strict=True)]
            for part in (rows.train, rows.test)
        )
        known = {*seen}
        counts.append(sum(text in known for text in scored))
    least, most = counts
    told = found.info.get("overlap", {}).get(name, {"rows": 0, "of": len(rows.test)})
    assert least <= told["rows"] <= most and told["of"] == len(rows.test)
    assert (most > 0) == (task_files.get(name).extra.overlap == "record") == (name in ("cola", "stsb"))


THEIRS = {"cola": "cola/default", "mrpc": "mrpc/default", "qqp": "qqp/default", "qnli": "qnli/default",
          "rte": "rte/default", "wnli": "wnli/default", "mnli_matched": "mnli/default",
          "mnli_mismatched": "mnli/mismatch"}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_prompts_choices_and_metrics_are_lm_evals(name: str) -> None:
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    task = task_files.get(name)
    found = made(name)
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "glue" / f"{THEIRS[name]}.yaml")
    splits = {task.training_split: found.train, task.eval_split: found.test}
    theirs = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits})
    ours = evaluation.harness_task(task, found)
    for row in [*found.test.select(range(20)), found.test[0] | {task.extra.head.text[-1]: " no stop "}]:
        assert ours.doc_to_text(row) == theirs.doc_to_text(row)
        assert ours.doc_to_choice(row) == theirs.doc_to_choice(row)
        assert ours.doc_to_target(row) == theirs.doc_to_target(row)
    assert {m["metric"] for m in config["metric_list"]} <= {task.extra.metric, *task.extra.also}


def test_the_group_and_its_protocols() -> None:
    assert task_files.expand(["glue"]) == [
        "cola",
        "sst2",
        "mrpc",
        "stsb",
        "qqp",
        "mnli",
        "qnli",
        "rte",
        "wnli",
    ]
    assert [t.name for t in task_files.task_group("mnli").tasks] == ["mnli_matched", "mnli_mismatched"]
    for name in task_files.expand(["glue"]):
        about = task_files.task_group(name).about
        assert about.protocol == "last-step" and {*about.protocols} == {"best-epoch", "clean"}
        best, clean = about.protocols["best-epoch"], about.protocols["clean"]
        assert (best.choose, best.average) == ("scored", "median")
        assert clean.choose == (1000 if name in ("qqp", "mnli", "qnli") else 0.5)
        for task in task_files.task_group(name).tasks:
            assert task.extra.protocols == about.protocols


@pytest.mark.parametrize(
    ("name", "metric", "theirs"), [("cola", "mcc", matthews_corrcoef), ("mrpc", "f1", f1_score)]
)
def test_choice_scoring_of_scores_over_all_rows(capsys, name: str, metric: str, theirs) -> None:
    """A constant choice has 0 there, as lm-eval and scikit-learn say; nothing goes to standard output."""
    loaded, task, found = models.load("embedded"), task_files.get(name), made(name)
    few = replace(found, test=found.test.select(range(8)))
    lm_task = evaluation.harness_task(task, few)
    scores = evaluation.score_language(loaded.model, loaded.tokenizer, lm_task, 8)
    assert capsys.readouterr().out == ""
    outcomes = json.loads(json.dumps(scores.outcomes))
    chosen = [row["answer"].index(max(row["answer"])) for row in sorted(outcomes, key=lambda o: o["row"])]
    assert scores.metrics[metric] == pytest.approx(theirs(few.test["label"], chosen))
    assert scores.metrics["acc"] == pytest.approx(accuracy_score(few.test["label"], chosen))
