"""Questions, and sentences that may hold the answer (QNLI)."""

from __future__ import annotations

import random
from typing import Any

from peftzoo.benchmarks.glue import events
from peftzoo.benchmarks.glue.rows import drawn, other


def _asked(rng: random.Random, unanswered: int) -> tuple[str, str]:
    """The sentence tells two details of an event. No answer in it: the third is asked for, or the question is
    about another thing or about other people."""
    event = about = events.draw(rng)
    missing = rng.choice(events.DETAILS)
    asked = other(rng, events.DETAILS, missing)
    if unanswered:
        pick = rng.random()
        if pick < 0.65:
            asked = missing
        elif pick < 0.9:
            about = events.changed(rng, event, ("giver", "taker", "thing"))
        else:
            about = events.swapped(event)
    told = (d for d in events.DETAILS if d != missing)
    question, sentence = rng.randrange(2), rng.randrange(events.FORMS)
    return events.ask(about, asked, question), events.tell(event, sentence, *told)


def _sentence_first(rng: random.Random, unanswered: int) -> tuple[str, str]:
    question, sentence = _asked(rng, unanswered)
    return sentence, question


def qnli(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first n distinct rows of a split: question, sentence, label (0 answered, 1 not), idx.

    Sentences of one split are in no other; a question may be asked again of another sentence.
    """
    found = drawn(_sentence_first, ("sentence", "question"), 2, split, n, seed)
    return [{"question": row["question"], **row} for row in found]
