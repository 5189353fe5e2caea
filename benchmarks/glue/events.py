"""Who gives or sells what to whom, where and when: one event, told in several ways that mean the same."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from peftzoo.benchmarks.glue.rows import other, words

WOMEN = words("Anna Ella Emma Ivy Jane Kate Lily Lucy Maya Mia Nora Rosa Sara Zoe")
MEN = words("Adam Ben Dan Finn Hugo Jack Leo Luke Max Noah Omar Paul Sam Tom")
PEOPLE = WOMEN + MEN
THINGS = words("apples books coins cards marbles pens stickers shells stamps cookies eggs toys buttons "
                "pencils flowers balls beads stones pears lemons")  # fmt: skip
PLACES = words("market station museum library park school lake")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COUNTS = tuple(range(2, 13))
DETAILS = ("place", "day", "count")
FORMS = 4


@dataclass(frozen=True)
class Event:
    giver: str
    taker: str
    sold: bool
    count: int
    thing: str
    place: str
    day: str

    @property
    def verbs(self) -> tuple[str, str]:
        """What the giver and what the taker does, without the ending -s."""
        return ("sell", "buy") if self.sold else ("give", "get")


def draw(rng: random.Random) -> Event:
    giver, taker = rng.sample(PEOPLE, 2)
    sold = rng.random() < 0.5
    return Event(giver, taker, sold, *(rng.choice(pool) for pool in (COUNTS, THINGS, PLACES, DAYS)))


def tell(e: Event, form: int, *details: str) -> str:
    """A sentence with these details (without a count: some)."""
    give, get = (f"{verb}s" for verb in e.verbs)
    much = f"{e.count if 'count' in details else 'some'} {e.thing}"
    at = f" at the {e.place}" if "place" in details else ""
    on = f" on {e.day}" if "day" in details else ""
    clause, front = (
        (f"{e.giver} {give} {much} to {e.taker}{at}{on}", ""),
        (f"{e.taker} {get} {much} from {e.giver}{at}{on}", ""),
        (f"{e.giver} {give} {e.taker} {much}{at}", on),
        (f"{e.taker} {get} {much} from {e.giver}{on}", at),
    )[form]
    text = f"{front} {clause}.".strip()
    return text[0].upper() + text[1:]


def ask(e: Event, detail: str, form: int) -> str:
    """A question for a detail; the form says from whose side."""
    give, get = e.verbs
    side = (
        (f"does {e.giver} {give}", f"to {e.taker}")
        if form % 2
        else (f"does {e.taker} {get}", f"from {e.giver}")
    )
    if detail == "count":
        return f"How many {e.thing} {side[0]} {side[1]}?"
    word = {"place": "Where", "day": "When"}[detail]
    return f"{word} {side[0]} the {e.thing} {side[1]}?"


POOLS = {"giver": PEOPLE, "taker": PEOPLE, "count": COUNTS, "thing": THINGS, "place": PLACES, "day": DAYS}


def changed(rng: random.Random, e: Event, slots: tuple[str, ...], times: int = 1) -> Event:
    """The event with so many of these slots changed to something that is not in it."""
    for slot in rng.sample(slots, times):
        new = not e.sold if slot == "sold" else other(rng, POOLS[slot], e.giver, e.taker, getattr(e, slot))
        e = replace(e, **{slot: new})
    return e


def swapped(e: Event) -> Event:
    """Giver and taker exchanged."""
    return replace(e, giver=e.taker, taker=e.giver)
