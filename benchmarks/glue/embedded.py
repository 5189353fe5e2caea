"""Sentiment sentences and sentence pairs in the layout of GLUE, made on the spot and without any download.

Every sentence belongs to one split by a checksum of its normalised text, so no sentence of one split can
turn up in another. The fourth share, "reserve", is kept for pre-training the embedded model.
"""

import random
import re
import zlib
from collections.abc import Iterator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GOOD = _words(
    "superb charming funny clever moving brilliant fresh warm gripping lovely smart honest tender bright "
    "touching elegant lively rich witty delightful"
)
BAD = _words(
    "dull boring weak clumsy silly bland stale cold awful messy lazy shallow noisy hollow tired dreary flat "
    "tedious sloppy lifeless"
)
PARTS = _words("plot acting script music pacing ending dialogue cast story humor camera direction")
KINDS = _words("film movie drama comedy thriller picture sequel")
SOFT = _words("really truly rather quite very simply")

SHARES = {"test": (0, 20), "validation": (20, 35), "train": (35, 75), "reserve": (75, 100)}


def normalise(text: str) -> str:
    """Lower case, letters and digits only, single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def split_of(sentence: str) -> str:
    """The split a sentence belongs to."""
    place = zlib.crc32(normalise(sentence).encode()) % 100
    return next(name for name, (low, high) in SHARES.items() if low <= place < high)


def quality(rng: random.Random, good: bool) -> str:
    """Words that say good or bad, a third of the time through a negation."""
    if rng.random() < 0.35:
        word = rng.choice(BAD if good else GOOD)
        return rng.choice([f"not {word}", f"never {word}", f"anything but {word}", f"far from {word}"])
    word = rng.choice(GOOD if good else BAD)
    return f"{rng.choice(SOFT)} {word}" if rng.random() < 0.4 else word


def _single(rng: random.Random, good: bool) -> str:
    part, kind = rng.choice(PARTS), rng.choice(KINDS)
    return rng.choice(
        [
            f"the {part} is {quality(rng, good)}",
            f"the {part} of this {kind} is {quality(rng, good)}",
            f"this {kind} is {quality(rng, good)}",
            f"i found the {part} {quality(rng, good)}",
        ]
    )


def _mixed(rng: random.Random, good: bool) -> str:
    """Two clauses that disagree; the main clause decides."""
    one, two = rng.sample(PARTS, 2)
    kind = rng.choice(KINDS)
    yes, no = quality(rng, good), quality(rng, not good)
    plain = rng.choice(BAD if good else GOOD)
    return rng.choice(
        [
            f"though the {one} is {no} , the {two} is {yes}",
            f"the {one} is {no} , but the {two} is {yes}",
            f"the {two} is {yes} even though the {one} is {no}",
            f"despite its {plain} {one} , the {kind} is {yes}",
            f"the {one} may be {no} , yet the {kind} is {yes}",
            f"the {kind} is {yes} , whatever one says about the {plain} {one}",
        ]
    )


def _expected(rng: random.Random, good: bool) -> str:
    """Hopes and fears next to what came of them."""
    kind, part = rng.choice(KINDS), rng.choice(PARTS)
    yes, no = rng.choice(GOOD if good else BAD), rng.choice(BAD if good else GOOD)
    return rng.choice(
        [
            f"i expected a {no} {kind} and got a {yes} one",
            f"the {kind} could have been {no} , yet it turns out {yes}",
            f"what looks like a {no} {kind} is in truth {yes}",
            f"nobody will call this {kind} {no} after such {yes} {part}",
            f"the trailer is {no} and the {kind} itself is {yes}",
            f"less {no} than i {'feared' if good else 'hoped'} , the {kind} has {yes} {part}",
        ]
    )


def _agreeing(rng: random.Random, good: bool) -> str:
    one, two = rng.sample(PARTS, 2)
    kind, word = rng.choice(KINDS), rng.choice(GOOD if good else BAD)
    return rng.choice(
        [
            f"the {one} is {quality(rng, good)} and the {two} is {quality(rng, good)}",
            f"a {word} {kind} , and the {one} is {quality(rng, good)}",
            f"the {kind} is {quality(rng, good)} because the {one} is {quality(rng, good)}",
        ]
    )


def reviews(split: str, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Sentences of one split with their label, without end, repeats included."""
    if split not in SHARES:
        raise ValueError(f"no split {split!r}; there are {', '.join(SHARES)}")
    rng = random.Random(f"sst2 {split} {seed}")
    while True:
        good = rng.random() < 0.5
        make = rng.choices((_single, _mixed, _expected, _agreeing), (2, 4, 3, 2))[0]
        sentence = make(rng, good)
        if split_of(sentence) == split:
            yield sentence, int(good)


# Words of one group mean nearly the same.
WHO = (
    ("man", "guy"),
    ("woman", "lady"),
    ("boy", "lad"),
    ("girl",),
    ("child", "kid"),
    ("dog", "hound"),
    ("chef", "cook"),
)
ACTS = (
    (("carrying", "holding"), (("box", "crate"), ("stone", "rock"), ("bag", "sack"), ("lamp",))),
    (("painting", "drawing"), (("house", "home"), ("boat", "ship"), ("horse",), ("tree",))),
    (("watching", "looking at"), (("bird",), ("picture", "photo"), ("car", "auto"), ("cat", "kitten"))),
    (("cleaning", "washing"), (("plate", "dish"), ("window",), ("floor",), ("jacket", "coat"))),
    (("fixing", "repairing"), (("bike", "bicycle"), ("radio",), ("chair", "seat"), ("roof",))),
    (("throwing", "tossing"), (("ball",), ("hat", "cap"), ("stick",), ("rope", "cord"))),
)
PLACES = (
    ("in the garden", "in the yard"),
    ("in the street", "on the road"),
    ("at school",),
    ("near the lake",),
)
LOOKS = (("small", "little"), ("big", "large"), ("old",), ("young",))

# What each change takes off the rating of 5.
COST = {
    "synonym": 0.2,
    "detail": 0.6,
    "look": 0.8,
    "place": 1.0,
    "who": 1.6,
    "object": 1.8,
    "not": 2.4,
    "act": 2.6,
}

Scene = dict[str, tuple[str, ...] | None]


def _scene(rng: random.Random) -> Scene:
    act, objects = rng.choice(ACTS)
    return {
        "look": rng.choice(LOOKS) if rng.random() < 0.5 else None,
        "who": rng.choice(WHO),
        "act": act,
        "object": rng.choice(objects),
        "place": rng.choice(PLACES) if rng.random() < 0.6 else None,
    }


def _say(scene: Scene, forms: dict[str, int], negated: bool = False) -> str:
    """A scene as a sentence; forms picks the synonym of each slot."""

    def word(slot: str) -> str:
        group = scene[slot]
        return group[forms.get(slot, 0) % len(group)] if group else ""

    subject = f"{word('look')} {word('who')}".strip()
    article = "An" if subject[0] in "aeiou" else "A"
    thing = word("object")
    end = f" {word('place')}" if scene["place"] else ""
    verb = "is not" if negated else "is"
    return f"{article} {subject} {verb} {word('act')} {'an' if thing[0] in 'aeiou' else 'a'} {thing}{end}."


def _other(rng: random.Random, options: tuple, now: object) -> tuple:
    return rng.choice([x for x in options if x != now])


def _changed(rng: random.Random, scene: Scene, forms: dict[str, int], count: int) -> tuple[str, float]:
    """The scene again with so many changes, and what is left of the rating."""
    second, again = dict(scene), dict(forms)
    score, negated = 5.0, False
    for change in rng.sample(["synonym", "look", "place", "who", "object", "not", "act"], count):
        cost = COST[change]
        if change == "synonym":
            slot = rng.choice([s for s, group in scene.items() if group and len(group) > 1])
            again[slot] = 1 - again[slot]
        elif change == "not":
            negated = True
        elif change == "look":
            second["look"] = _other(rng, LOOKS, scene["look"])
        elif change == "place" and scene["place"] and rng.random() < 0.5:
            second["place"], cost = None, COST["detail"]
        elif change == "place":
            second["place"] = _other(rng, PLACES, scene["place"])
        elif change == "who":
            second["who"] = _other(rng, WHO, scene["who"])
        elif change == "act":
            second["act"], objects = _other(rng, ACTS, next(a for a in ACTS if a[0] == scene["act"]))
            second["object"] = rng.choice(objects)
        elif second["act"] == scene["act"]:
            objects = next(found for act, found in ACTS if act == scene["act"])
            second["object"] = _other(rng, objects, scene["object"])
        else:
            cost = 0.0
        score -= cost
    return _say(second, again, negated), round(max(score, 0.2), 1)


def pairs(split: str, seed: int = 0) -> Iterator[tuple[str, str, float]]:
    """Sentence pairs of one split with their rating, without end, repeats included."""
    if split not in SHARES:
        raise ValueError(f"no split {split!r}; there are {', '.join(SHARES)}")
    rng = random.Random(f"stsb {split} {seed}")
    while True:
        scene = _scene(rng)
        forms = {slot: rng.randrange(2) for slot in scene}
        one = _say(scene, forms)
        if split_of(one) != split:
            continue
        count = rng.choice([0, 1, 1, 1, 2, 2, 3, 7])
        for _ in range(60):
            if count < 7:
                two, score = _changed(rng, scene, forms, count)
            else:
                stranger = _scene(rng)
                alike = stranger["who"] == scene["who"] or stranger["act"] == scene["act"]
                two, score = _say(stranger, forms), 0.2 if alike else 0.0
            if split_of(two) == split:
                yield one, two, score
                break


def sst2(split: str, n: int, seed: int = 0) -> list[dict]:
    """The first n distinct sentences of a split: sentence, label (0 negative, 1 positive), idx."""
    seen: set[str] = set()
    found: list[dict] = []
    for sentence, label in reviews(split, seed):
        if len(found) >= n:
            break
        key = normalise(sentence)
        if key not in seen:
            seen.add(key)
            found.append({"sentence": sentence, "label": label, "idx": len(found)})
    return found


def stsb(split: str, n: int, seed: int = 0) -> list[dict]:
    """The first n distinct pairs of a split: sentence1, sentence2, label (0.0 to 5.0), idx."""
    seen: set[tuple[str, str]] = set()
    found: list[dict] = []
    for one, two, score in pairs(split, seed):
        if len(found) >= n:
            break
        key = (normalise(one), normalise(two))
        if key not in seen:
            seen.add(key)
            found.append({"sentence1": one, "sentence2": two, "label": score, "idx": len(found)})
    return found
