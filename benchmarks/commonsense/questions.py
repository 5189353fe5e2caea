"""Questions about the small world: each function draws one with its right answer and the wrong ones.

Right and wrong answers come from the same words in the same proportion, so that no word speaks for itself: a
question that asks for more has a twin that asks for less.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from peftzoo.benchmarks.commonsense import world
from peftzoo.benchmarks.commonsense.world import a


@dataclass(frozen=True)
class Question:
    """A question, or the beginning of a sentence, with the right answer and three wrong ones."""

    stem: str
    right: str
    wrong: tuple[str, ...]


def others(rng: random.Random, words: Sequence[str], right: str, n: int = 3) -> tuple[str, ...]:
    return tuple(rng.sample([w for w in words if w != right], n))


# -- one word or phrase among four -------------------------------------------------------------------------


def kind(rng: random.Random) -> Question:
    own, *rest = rng.sample([*world.KINDS], 4)
    words = [rng.choice(world.KINDS[k]) for k in (own, *rest)]
    stem = rng.choice(("Which of these is {}?", "Which word names {}?", "One of these is {}. Which one?"))
    return Question(stem.format(a(own)), words[0], tuple(words[1:]))


def compared(rng: random.Random) -> Question:
    names, scale = rng.choice([*world.SCALES.items()])
    middle = rng.choice(scale[4:8])
    up = rng.random() < 0.5
    yes, no = world.above(scale, middle), world.below(scale, middle)
    yes, no = (yes, no) if up else (no, yes)
    stem = rng.choice(("Which of these is {} than {}?", "Which thing is {} than {}?"))
    return Question(stem.format(names[not up], a(middle)), rng.choice(yes), tuple(rng.sample(no, 3)))


def legs(rng: random.Random) -> Question:
    middle = rng.choice([x for x, n in world.LEGS.items() if n == 4])
    more = [x for x, n in world.LEGS.items() if n > 4]
    fewer = [x for x, n in world.LEGS.items() if n < 4]
    word, yes, no = rng.choice((("more", more, fewer), ("fewer", fewer, more)))
    stem = rng.choice(("Which of these has {} legs than {}?", "Which animal has {} legs than {}?"))
    return Question(stem.format(word, a(middle)), rng.choice(yes), tuple(rng.sample(no, 3)))


def use(rng: random.Random) -> Question:
    tool, purpose = rng.choice([*world.USES.items()])
    if rng.random() < 0.5:
        stem = rng.choice(("What is {} used for?", "What does one do with {}?")).format(a(tool))
        purposes = [f"to {p}" for p in world.USES.values()]
        return Question(stem, f"to {purpose}", others(rng, purposes, f"to {purpose}"))
    stem = rng.choice(("What does one use to {}?", "Which of these is used to {}?")).format(purpose)
    return Question(stem, tool, others(rng, [*world.USES], tool))


def found(rng: random.Random) -> Question:
    place, thing = rng.choice([*world.FOUND.items()])
    if rng.random() < 0.5:
        stem = rng.choice(("What is most likely in the {}?", "Which of these is at home in the {}?"))
        stem = stem.format(place)
        return Question(stem, thing, others(rng, [*world.FOUND.values()], thing))
    stem = rng.choice(("Where does one look for {}?", "Where is {} most likely?")).format(a(thing))
    return Question(stem, place, others(rng, [*world.FOUND], place))


def helps(rng: random.Random) -> Question:
    when, thing = rng.choice([*world.HELPS.items()])
    stem = rng.choice(("Which of these helps when {}?", "Suppose that {}. What helps?", "What helps if {}?"))
    return Question(stem.format(when), thing, others(rng, [*world.HELPS.values()], thing))


def material(rng: random.Random) -> Question:
    own, *rest = rng.sample([*world.MATERIALS], 4)
    words = [rng.choice(world.MATERIALS[m]) for m in (own, *rest)]
    stem = rng.choice(("Which of these is made of {}?", "What was {} before?", "What does one make from {}?"))
    return Question(stem.format(own), words[0], tuple(words[1:]))


def opposite(rng: random.Random) -> Question:
    pairs = [*world.OPPOSITES.items()]
    pairs = pairs if rng.random() < 0.5 else [(b, a) for a, b in pairs]
    word, right = rng.choice(pairs)
    stem = rng.choice(("What is the opposite of {}?", "Which word means what {} does not mean?"))
    return Question(stem.format(word), right, others(rng, [b for _, b in pairs], right))


def days(rng: random.Random) -> Question:
    i, k = rng.randrange(7), rng.randint(1, 6)
    after = rng.random() < 0.5
    right = world.DAYS[(i + (k if after else -k)) % 7]
    count = "1 day" if k == 1 else f"{k} days"
    stem = f"Which day is {count} {'after' if after else 'before'} {world.DAYS[i]}?"
    return Question(stem, right, others(rng, world.DAYS, right))


def measured(rng: random.Random) -> Question:
    """A small experiment whose result stands in the text."""
    sizes = rng.sample(range(2, 60), 4)
    told = ", ".join(f"plant {n} grew {s} inches" for n, s in zip("ABCD", sizes, strict=True))
    most = rng.random() < 0.5
    right = "ABCD"[sizes.index((max if most else min)(sizes))]
    names = [f"plant {n}" for n in "ABCD"]
    stem = f"With different light {told}. Which one grew the {'most' if most else 'least'}?"
    return Question(stem, f"plant {right}", others(rng, names, f"plant {right}"))


# -- sentences to be finished ------------------------------------------------------------------------------


def finish_use(rng: random.Random) -> Question:
    tool, purpose = rng.choice([*world.USES.items()])
    stem = rng.choice(("{} is used to", "One takes {} to", "With {} one can")).format(a(tool))
    return Question(_capital(stem), purpose, others(rng, [*world.USES.values()], purpose))


def finish_effect(rng: random.Random) -> Question:
    cause, effect = rng.choice([*world.EFFECTS.items()])
    stem = rng.choice(("When {},", "Because {},", "If {},", "After {},")).format(cause)
    return Question(stem, effect, others(rng, [*world.EFFECTS.values()], effect))


def finish_found(rng: random.Random) -> Question:
    place, thing = rng.choice([*world.FOUND.items()])
    stem = rng.choice(
        ("In the {} one looks for", "Who goes to the {} wants to see", "The {} is the place for")
    )
    return Question(stem.format(place), a(thing), others(rng, [a(t) for t in world.FOUND.values()], a(thing)))


def finish_material(rng: random.Random) -> Question:
    own = rng.choice([*world.MATERIALS])
    stem = rng.choice(("{} is made of", "To make {} one needs", "{} comes from")).format(
        a(rng.choice(world.MATERIALS[own]))
    )
    return Question(_capital(stem), own, others(rng, [*world.MATERIALS], own))


def finish_kind(rng: random.Random) -> Question:
    own = rng.choice([*world.KINDS])
    word = rng.choice(world.KINDS[own])
    stem = rng.choice(("{} is a kind of", "{} is an example of the word")).format(a(word))
    return Question(_capital(stem), own, others(rng, [*world.KINDS], own))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# -- claims: a question, the fact that decides it, whether it holds ----------------------------------------


def claim_kind(rng: random.Random, holds: bool) -> tuple[str, str]:
    own, other = rng.sample([*world.KINDS], 2)
    word = rng.choice(world.KINDS[own])
    return f"is {a(word)} a kind of {own if holds else other}", f"{_capital(a(word))} is a kind of {own}."


def claim_use(rng: random.Random, holds: bool) -> tuple[str, str]:
    tool, other = rng.sample([*world.USES], 2)
    asked = world.USES[tool if holds else other]
    return f"does one use {a(tool)} to {asked}", f"One uses {a(tool)} to {world.USES[tool]}."


def claim_material(rng: random.Random, holds: bool) -> tuple[str, str]:
    own, other = rng.sample([*world.MATERIALS], 2)
    thing = rng.choice(world.MATERIALS[own])
    return f"is {a(thing)} made of {own if holds else other}", f"{_capital(a(thing))} is made of {own}."


def claim_compared(rng: random.Random, holds: bool) -> tuple[str, str]:
    names, scale = rng.choice([*world.SCALES.items()])
    low = rng.choice(scale[:-2])
    high = rng.choice(world.above(scale, low))
    up = rng.random() < 0.5
    one, two = (high, low) if up == holds else (low, high)
    fact = f"{_capital(a(high))} is {names[0]} than {a(low)}."
    return f"is {a(one)} {names[not up]} than {a(two)}", fact


def claim_legs(rng: random.Random, holds: bool) -> tuple[str, str]:
    low, high = sorted(rng.sample([*world.LEGS], 2), key=world.LEGS.__getitem__)
    if world.LEGS[low] == world.LEGS[high]:
        return claim_legs(rng, holds)
    up = rng.random() < 0.5
    one, two = (high, low) if up == holds else (low, high)
    fact = f"{_capital(a(low))} has {world.LEGS[low]} legs and {a(high)} has {world.LEGS[high]}."
    return f"does {a(one)} have {'more' if up else 'fewer'} legs than {a(two)}", fact


CLAIMS = (claim_kind, claim_use, claim_material, claim_compared, claim_legs)
