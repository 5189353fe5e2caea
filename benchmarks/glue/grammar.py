"""Sentences, and sentences with one fault: agreement, number, form, order, a word too few or too many (CoLA).

A sentence is a list of (tag, word): D determiner, A adjective, N noun, X auxiliary, V verb, P preposition.
"""

from __future__ import annotations

import random
import re
from typing import Any

from peftzoo.benchmarks.glue.embedded import ACTS, LOOKS, WHO
from peftzoo.benchmarks.glue.rows import drawn, other, words

ONE, MANY = words("a"), words("two three")
BEINGS = {w: {"man": "men", "woman": "women", "lady": "ladies", "child": "children"}.get(w, f"{w}s")
          for group in WHO for w in group}  # fmt: skip
GOODS = {w: f"{w}es" if w[-1] in "xh" else f"{w}s" for _, found in ACTS for group in found for w in group}
VERBS = dict(zip(words("carrying holding painting drawing watching cleaning washing fixing throwing tossing"),
                 words("carry hold paint draw watch clean wash fix throw toss"), strict=True))  # fmt: skip
STUFF = words("stone rock rope cord")
"""What needs no determiner: there is some of it."""
SIZES = tuple(w for group in LOOKS for w in group)
PLACES = tuple(map(words, ("in the garden", "in the yard", "in the street", "on the road", "near the lake")))
OTHER = {"is": "are", "are": "is"}
OTHER |= {
    a: b for pairs in (BEINGS, GOODS) for one, many in pairs.items() for a, b in ((one, many), (many, one))
}

Words = list[tuple[str, str]]


def _noun(rng: random.Random, nouns: dict[str, str], word: str, many: bool) -> Words:
    look = [("A", rng.choice(SIZES))] if rng.random() < 0.35 else []
    return [("D", rng.choice(MANY if many else ONE)), *look, ("N", nouns[word] if many else word)]


def _right(rng: random.Random) -> Words:
    """An acceptable sentence."""
    many, (acts, things) = rng.random() < 0.2, rng.choice(ACTS)
    who = _noun(rng, BEINGS, rng.choice([*BEINGS]), many)
    what = _noun(rng, GOODS, rng.choice(rng.choice(things)), rng.random() < 0.1)
    verb = rng.choice([act for act in acts if act in VERBS])
    place = [*zip("PDN", rng.choice(PLACES), strict=True)] if rng.random() < 0.6 else []
    return [*who, ("X", "are" if many else "is"), ("V", verb), *what, *place]


def _number(rng: random.Random, s: Words) -> Words:
    """The auxiliary or a noun that has the wrong number."""
    i = rng.choice([i for i, (_, word) in enumerate(s) if word in OTHER])
    return [*s[:i], (s[i][0], OTHER[s[i][1]]), *s[i + 1 :]]


def _form(rng: random.Random, s: Words) -> Words:
    """The verb without its ending."""
    return [(tag, VERBS.get(word, word)) for tag, word in s]


def _order(rng: random.Random, s: Words) -> Words:
    """Two neighbours exchanged."""
    wrong = {("D", "N"), ("D", "A"), ("A", "N"), ("P", "D"), ("X", "V")}
    i = rng.choice([i for i in range(len(s) - 1) if (s[i][0], s[i + 1][0]) in wrong])
    return [*s[:i], s[i + 1], s[i], *s[i + 2 :]]


def _moved(rng: random.Random, s: Words) -> Words:
    """The verb at the end."""
    i = [tag for tag, _ in s].index("X")
    return [*s[:i], *s[i + 2 :], *s[i : i + 2]]


def _missing(rng: random.Random, s: Words) -> Words:
    """Without a preposition, a noun of one thing or its determiner."""

    def needed(i: int) -> bool:
        (tag, _), one = s[i], [w for tag, w in s[i:] if tag == "N"][:1]
        if tag == "N" and s[i - 1][1] == "little":  # "is watching a little"
            return False
        if tag == "D" and one[0] in STUFF:  # "is carrying stone"
            return False
        return tag == "P" or (tag in "DN" and one[0] in {**BEINGS, **GOODS})

    i = rng.choice([i for i in range(len(s)) if needed(i)] or [len(s)])
    return [*s[:i], *s[i + 1 :]]


def _extra(rng: random.Random, s: Words) -> Words:
    """One word twice, or a determiner or preposition beside another."""
    i = rng.choice([i for i, (tag, _) in enumerate(s) if tag != "A"])
    beside = {"D": ("D", "the"), "P": ("P", other(rng, words("in on near"), s[i][1]))}
    return [*s[: i + 1], beside.get(s[i][0], s[i]), *s[i + 1 :]]


FAULTS = {_number: 2, _form: 1, _order: 3, _moved: 2, _missing: 3, _extra: 3}


def _sentence(rng: random.Random, right: int) -> tuple[str]:
    """A right sentence, or one with a fault; `an` before a vowel, a capital and a full stop."""
    found = base = _right(rng)
    while not right and found == base:
        found = rng.choices([*FAULTS], [*FAULTS.values()])[0](rng, base)
    line = re.sub(r"\ba(?= [aeiou])", "an", " ".join(word for _, word in found))
    return (f"{line[0].upper()}{line[1:]}.",)


def cola(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first n distinct sentences of a split: sentence, label (1 acceptable, 0 not), idx."""
    return drawn(_sentence, ("sentence",), 2, split, n, seed)
