"""Pairs that say or ask the same in other words, and pairs that nearly do (MRPC, QQP)."""

from __future__ import annotations

import random
from typing import Any

from peftzoo.benchmarks.glue import events
from peftzoo.benchmarks.glue.rows import drawn, other, words


def _reports(rng: random.Random, same: int) -> tuple[str, str]:
    """One event told in two ways, with two of its details. Not the same: another detail is told, something is
    changed, or the two people are exchanged."""
    event = second = events.draw(rng)
    told = again = rng.sample(events.DETAILS, 2)
    if not same:
        pick = rng.random()
        if pick < 0.8:
            again = [rng.choice(told), other(rng, events.DETAILS, *told)]
        elif pick < 0.93:
            slots = ("giver", "taker", "sold", "thing", *told)
            second = events.changed(rng, event, slots, rng.choice((1, 2)))
        else:
            second = events.swapped(event)
    one, two = rng.sample(range(events.FORMS), 2)
    return events.tell(event, one, *told), events.tell(second, two, *again)


NEEDS = (  # questions in one line ask the same
    ("Where does {who} keep the {x}?", "At what place is the {x} of {who}?",
     "In which place can one find the {x} that {who} has?"),
    ("When does {who} need the {x}?", "On which day is the {x} of use to {who}?",
     "What is the day on which {who} needs the {x}?"),
    ("How much does the {x} of {who} cost?", "What is the price of the {x} that {who} has?",
     "How many dollars does {who} pay for the {x}?"),
    ("What color is the {x} of {who}?", "Which color does the {x} that {who} has come in?",
     "Is the {x} of {who} red, blue or some other color?"),
)  # fmt: skip
GOODS = words("pen book ball toy cup hat scarf lamp plant puzzle kite box bag coat drawer chair")
SIZES = words("big small little old new")


def _questions(rng: random.Random, same: int) -> tuple[str, str]:
    """One question in two wordings, or two that differ in what is asked, whose thing it is, or the thing."""
    need, who, thing, size = (rng.choice(x) for x in (NEEDS, events.PEOPLE, GOODS, SIZES))
    asked = [need, who, thing]
    if not same:
        for slot in rng.sample(range(3), rng.choice((1, 1, 2))):
            asked[slot] = other(rng, (NEEDS, events.PEOPLE, GOODS)[slot], asked[slot])
    first = rng.choice(need)
    second = other(rng, asked[0], first)
    return (
        first.format(x=f"{size} {thing}", who=who),
        second.format(x=f"{size} {asked[2]}", who=asked[1]),
    )


def mrpc(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first n distinct pairs of a split: sentence1, sentence2, label (1 equivalent), idx."""
    return drawn(_reports, ("sentence1", "sentence2"), 2, split, n, seed, own=2)


def qqp(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first n distinct pairs of a split: question1, question2, label (1 duplicate), idx."""
    return drawn(_questions, ("question1", "question2"), 2, split, n, seed, own=2)
