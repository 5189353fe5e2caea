"""What follows from a text (MNLI, RTE)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from peftzoo.benchmarks.glue import events
from peftzoo.benchmarks.glue.rows import drawn, other, words

NUMBERS = words("two three four five six seven eight nine")
COLOURS = words("red blue green yellow white black brown pink")


@dataclass(frozen=True)
class Fact:
    """Something of which each subject has one value: {s} the subject, {v} the value."""

    said: str
    denied: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Genre:
    subjects: tuple[str, ...]
    facts: tuple[Fact, ...]


HOME = Genre(
    events.PEOPLE,
    (
        Fact("{s} is in the {v}", "{s} is not in the {v}",
             words("kitchen garden library museum school park market station")),
        Fact("the hat of {s} is {v}", "the hat of {s} is not {v}", COLOURS),
        Fact("{s} has {v} books", "{s} does not have {v} books", NUMBERS),
        Fact("{s} comes on {v}", "{s} does not come on {v}", events.DAYS),
    ),
)  # fmt: skip
ROAD = Genre(
    tuple(f"the {how} {what}" for how in ("old", "big", "small", "little")
          for what in ("truck", "bus", "train", "tram", "boat", "plane", "car")),
    (
        Fact("{s} stops near the {v}", "{s} does not stop near the {v}",
             words("lake school park market library museum")),
        Fact("the front of {s} is {v}", "the front of {s} is not {v}", COLOURS),
        Fact("{s} takes {v} people", "{s} does not take {v} people", NUMBERS),
        Fact("{s} leaves at {v}", "{s} does not leave at {v}", NUMBERS),
    ),
)  # fmt: skip

ENTAILED, NEUTRAL, CONTRADICTED = range(3)


def _stated(rng: random.Random, genre: Genre, label: int) -> tuple[str, str]:
    """Two facts of one subject, or one of each of two; then one of them, or another, is said or denied."""
    facts = rng.sample(genre.facts, 3)
    one, two = rng.sample(genre.subjects, 2)
    if rng.random() < 0.8:
        two = one
    told = [(s, f, rng.choice(f.values)) for s, f in zip((one, two), facts, strict=False)]
    premise = rng.choice((" and ", ", while ")).join(f.said.format(s=s, v=v) for s, f, v in told)
    denied = rng.random() < 0.3
    at = rng.randrange(2)
    subject, fact, value = told[at]
    if label == NEUTRAL:  # a fact that is not told, or told of the other subject
        fact = facts[2] if one == two or rng.random() < 0.5 else facts[1 - at]
        value = rng.choice(fact.values)
    elif denied == (label == ENTAILED):
        value = other(rng, fact.values, value)
    hypothesis = (fact.denied if denied else fact.said).format(s=subject, v=value)
    return _sentence(premise), _sentence(hypothesis)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _home(rng: random.Random, label: int) -> tuple[str, str]:
    return _stated(rng, HOME, label)


def _road(rng: random.Random, label: int) -> tuple[str, str]:
    return _stated(rng, ROAD, label)


def mnli(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first n distinct pairs of a split: premise, hypothesis, label (0 entailed, 1 neutral, 2
    contradicted), idx. `validation_mismatched` is of another genre than all else."""
    make = _road if split.endswith("_mismatched") else _home
    plain = split.removesuffix("_mismatched").removesuffix("_matched")
    return drawn(make, ("premise", "hypothesis"), 3, plain, n, seed)


def _follows(rng: random.Random, wrong: int) -> tuple[str, str]:
    """An event with two of its details; then the event again, perhaps from the other side, with one of them.
    It does not follow if that detail was not told, something is changed, or the people are exchanged."""
    event = claim = events.draw(rng)
    missing = rng.choice(events.DETAILS)
    detail = other(rng, events.DETAILS, missing)
    if wrong:
        pick = rng.random()
        if pick < 0.65:
            detail = missing
        elif pick < 0.85:
            claim = events.changed(rng, event, ("giver", "taker", "thing", detail))
        else:
            claim = events.swapped(event)
    told = (d for d in events.DETAILS if d != missing)
    one, two = (rng.randrange(events.FORMS) for _ in range(2))
    return events.tell(event, one, *told), events.tell(claim, two, detail)


def rte(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first n distinct pairs of a split: sentence1, sentence2, label (0 entailed, 1 not), idx."""
    return drawn(_follows, ("sentence1", "sentence2"), 2, split, n, seed)
