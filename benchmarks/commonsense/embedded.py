"""Commonsense questions in the layout of eight data sets, made on the spot and without any download.

The answers are true in a small world (`world.py`) by construction, or follow from the text. Which split a row
belongs to follows from its question without the options, so no question of one split is in another; the two
readings of a Winograd sentence stay together. The right answer is at every place equally often.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from peftzoo.benchmarks.commonsense import questions, world
from peftzoo.benchmarks.commonsense.questions import Question
from peftzoo.benchmarks.commonsense.world import a

Row = dict[str, Any]
Make = Callable[[random.Random], tuple[str, Row]]
"""Draws one row, and the question in it."""

SHARES = {"test": (0, 20), "validation": (20, 40), "train": (40, 100)}


def normalise(text: str) -> str:
    """Lower case, letters and digits only, single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def split_of(question: str) -> str:
    """The split that a question belongs to."""
    place = zlib.crc32(normalise(question).encode()) % 100
    return next(name for name, (low, high) in SHARES.items() if low <= place < high)


def shuffled(rng: random.Random, right: str, wrong: Sequence[str]) -> tuple[list[str], int]:
    """All options, and the place of the right one."""
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def _boolq(rng: random.Random) -> tuple[str, Row]:
    holds = rng.random() < 0.5
    ask, fact = rng.choice(questions.CLAIMS)(rng, holds)
    facts = [fact, rng.choice(questions.CLAIMS)(rng, True)[1]]
    rng.shuffle(facts)
    return ask, {"question": ask, "passage": f"Facts -- {' '.join(facts)}", "idx": 0, "label": int(holds)}


def _piqa(rng: random.Random) -> tuple[str, Row]:
    pick = rng.randrange(3)
    if pick == 0:  # the right thing for a purpose
        tool, other = rng.sample([*world.USES], 2)
        goal = rng.choice(("To {},", "How does one {}?", "You want to {}.", "The best way to {}"))
        goal, pair = goal.format(world.USES[tool]), (f"take {a(tool)}.", f"take {a(other)}.")
    elif pick == 1:  # the right thing in a situation
        when, other = rng.sample([*world.HELPS], 2)
        goal = rng.choice(("What to do when {}?", "Suppose that {}.", "If {},")).format(when)
        pair = tuple(f"look for {a(world.HELPS[w])}." for w in (when, other))
    else:  # the right order
        course, steps = rng.choice([*world.COURSES.items()])
        i, j = sorted(rng.sample(range(len(steps)), 2))
        goal = rng.choice(("{}.", "{}, step by step.", "{}: what comes first?", "{} in the right order"))
        goal = goal.format(course)
        pair = tuple(f"One {steps[m]}, and then one {steps[n]}." for m, n in ((i, j), (j, i)))
    (one, two), label = shuffled(rng, pair[0], pair[1:])
    return goal, {"goal": goal, "sol1": one, "sol2": two, "label": label}


def _social_iqa(rng: random.Random) -> tuple[str, Row]:
    x, y = rng.sample(world.NAMES, 2)
    (told, own), (_, other) = rng.sample(world.EVENTS, 2)
    kind, another = rng.sample(range(len(world.ASKED)), 2)
    options, right = shuffled(rng, own[kind], (own[another], other[kind]))
    context, question = (text.format(x=x, y=y) for text in (told, world.ASKED[kind]))
    answers = dict(zip(("answerA", "answerB", "answerC"), options, strict=True))
    row = {"context": context, "question": question, **answers, "label": str(right + 1)}
    return f"{context} {question}", row


def _hellaswag(rng: random.Random) -> tuple[str, Row]:
    course, *foreign = rng.sample([*world.COURSES], 3)
    steps = world.COURSES[course]
    at = rng.randrange(2, len(steps))
    same = rng.choice([s for s in steps[2:] if s != steps[at]])
    ends, right = shuffled(rng, steps[at], [same, *(rng.choice(world.COURSES[f][2:]) for f in foreign)])
    who, look = rng.choice([*world.ACTORS]), rng.choice(world.LOOKS)
    if rng.random() < 0.25:  # marked up as the WikiHow part is
        label, more = "Home and Garden", ""
        ctx = f"[header] {course}, told by {a(look)} {who} [title] One {steps[at - 2]}"
        ctx = f"{ctx} [step] Then one {steps[at - 1]}."
        ends = [f"[substeps] Then one {end}." for end in ends]
    else:
        label, more = course, world.ACTORS[who]
        ctx = f"{_sentence(a(look), who, steps[at - 2])} {_sentence(more, steps[at - 1])}"
        ends = [f"{end}." for end in ends]
    whole = f"{ctx} {more}".strip()
    row = {"ind": 0, "activity_label": label, "ctx_a": ctx, "ctx_b": more, "ctx": whole, "endings": ends,
           "source_id": "made~0", "split": "val", "split_type": "indomain", "label": str(right)}  # fmt: skip
    return f"{label}: {whole}", row


def _sentence(*parts: str) -> str:
    text = " ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _winogrande(rng: random.Random) -> tuple[str, Row]:
    template, *decides = rng.choice(world.TWINS)
    x, y = rng.sample(world.NAMES, 2)
    small, holder, thing = (rng.choice(words) for words in (world.SMALL, world.HOLDERS, world.THINGS))
    told = template.replace("{p}", "%s").format(x=x, y=y, s=small, h=holder, t=thing)
    first = rng.randrange(2)
    pair = (x, y) if "{x}" in template else (small, holder)
    (one, two), right = shuffled(rng, pair[first], (pair[1 - first],))
    row = {"sentence": told % decides[first], "option1": one, "option2": two, "answer": str(right + 1)}
    return told % "", row


def _asked(*families: Callable[[random.Random], Question]) -> Make:
    """Four options with letters, or now and then with numbers, as ARC has them."""

    def make(rng: random.Random) -> tuple[str, Row]:
        found = rng.choice(families)(rng)
        options, right = shuffled(rng, found.right, found.wrong)
        labels = list("1234" if rng.random() < 0.1 else "ABCD")
        choices = {"text": options, "label": labels}
        return found.stem, {"id": "", "question": found.stem, "choices": choices, "answerKey": labels[right]}

    return make


_arc_easy = _asked(questions.kind, questions.compared, questions.legs, questions.use, questions.found)
_arc_challenge = _asked(
    questions.helps, questions.material, questions.opposite, questions.days, questions.measured
)
_finished = _asked(
    questions.finish_use, questions.finish_effect, questions.finish_found, questions.finish_material,
    questions.finish_kind,
)  # fmt: skip


def _openbookqa(rng: random.Random) -> tuple[str, Row]:
    stem, row = _finished(rng)
    choices = row["choices"] | {"label": list("ABCD")}
    key = "ABCD"[row["choices"]["label"].index(row["answerKey"])]
    return stem, {"id": "", "question_stem": stem, "choices": choices, "answerKey": key}


def _numbered(row: Row, i: int, name: str) -> Row:
    """The row with its number where the data set has one."""
    mine = {"idx": i, "ind": i, "id": f"{name}-{i}", "source_id": f"made~{i}"}
    return row | {k: v for k, v in mine.items() if k in row}


def _task(name: str, make: Make) -> Callable[..., list[Row]]:
    def rows(split: str, n: int, seed: int = 0) -> list[Row]:
        if split not in SHARES:
            raise ValueError(f"no split {split!r}; there are {', '.join(SHARES)}")
        rng, seen, found = random.Random(f"{name} {split} {seed}"), set(), []
        while len(found) < n:
            question, row = make(rng)
            if split_of(question) == split and (text := normalise(repr(row))) not in seen:
                seen.add(text)
                found.append(_numbered(row, len(found), name))
        return found

    rows.__doc__ = f"The first n distinct rows of a split, with the columns of {name}."
    return rows


boolq = _task("boolq", _boolq)
piqa = _task("piqa", _piqa)
social_iqa = _task("social_iqa", _social_iqa)
hellaswag = _task("hellaswag", _hellaswag)
winogrande = _task("winogrande", _winogrande)
arc_easy = _task("arc_easy", _arc_easy)
arc_challenge = _task("arc_challenge", _arc_challenge)
openbookqa = _task("openbookqa", _openbookqa)
