"""Sentences with a pronoun, and the same with a name in its place (WNLI).

Of each pair of endings one makes the pronoun mean the first name and the other the second; both names fit the
pronoun, so only the sense of the sentence decides.
"""

from __future__ import annotations

import random
from typing import Any

from peftzoo.benchmarks.glue.events import DAYS, MEN, WOMEN
from peftzoo.benchmarks.glue.rows import drawn, words

# A sentence about {a} and {b}, an ending that is about {a}, one that is about {b}.
PERSONS = (
    ("{a} gives the {x} to {b} because {it}", "has two of them", "has none"),
    ("{a} sells the {x} to {b} because {it}", "needs the money", "needs one for school"),
    ("{a} carries the {x} for {b} because {it}", "is strong", "is weak"),
    ("{a} cannot see the {x} behind {b} because {it}", "is too small", "is too tall"),
    ("{a} runs after {b} because {it}", "lost the {x}", "took the {x}"),
    ("{a} teaches {b} to make a {x} because {it}", "knows how to do it", "does not know how to do it"),
    ("{a} asks {b} where the {x} is because {it}", "cannot find it", "used it last"),
    ("{a} makes a {x} for {b} because {it}", "likes to make things", "wants to get one"),
    ("{a} pays {b} for the {x} because {it}", "bought it", "sold it"),
    ("{a} thanks {b} for the {x} because {it}", "got a nice thing", "gave a nice thing"),
)
THINGS = (
    ("the {a} does not go into the {b} because {it}", "is too big", "is too small"),
    ("the {a} hides the {b} because {it}", "is so large", "is so little"),
    ("the {a} breaks the {b} because {it}", "is so hard", "is so weak"),
    ("the {a} falls off the {b} because {it}", "rolls so well", "has no flat top"),
    ("the {a} is cleaner than the {b} because {it}", "is new", "is old"),
)
GOODS = words("pen book ball toy cup hat scarf lamp plant puzzle kite coat chair box bag drawer")


def _resolved(rng: random.Random, right: int) -> tuple[str, str]:
    persons = rng.random() < 0.7
    names, it = rng.choice(((WOMEN, "she"), (MEN, "he"))) if persons else (GOODS, "it")
    a, b = rng.sample(names, 2)
    sentence, *endings = rng.choice(PERSONS if persons else THINGS)
    meant = rng.randrange(2)
    blanks = {"a": a, "b": b, "x": rng.choice(GOODS), "it": it}
    ending = endings[meant].format(**blanks)
    told = f"{rng.choice(('', 'on ' + rng.choice(DAYS) + ' '))}{sentence.format(**blanks)} {ending}."
    named = (a, b)[meant if right else 1 - meant]
    claim = f"{named if persons else 'the ' + named} {ending}."
    return told[0].upper() + told[1:], claim[0].upper() + claim[1:]


def wnli(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first n distinct pairs of a split: sentence1, sentence2, label (1 it follows), idx."""
    return drawn(_resolved, ("sentence1", "sentence2"), 2, split, n, seed)
