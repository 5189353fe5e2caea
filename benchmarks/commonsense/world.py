"""A small world with known facts: what things are and are for, which is larger, what follows on what."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHE = _words("Mia Anna Sara Lily Nora Ella Rosa Ivy Emma Zoe Lucy Maya Jane Kate")
HE = _words("Leo Ben Tom Max Sam Jack Omar Paul Noah Adam Hugo Finn Dan Luke")
NAMES = SHE + HE

KINDS = {  # as many words of each kind: no word is likelier to be right than another
    "animal": _words("dog cat horse cow sheep pig"),
    "fruit": _words("apple pear lemon plum cherry grape"),
    "tool": _words("hammer saw spade knife needle drill"),
    "garment": _words("hat scarf coat shirt sock glove"),
    "vehicle": _words("car bus train boat bike truck"),
    "piece of furniture": _words("chair table bed sofa shelf desk"),
    "musical instrument": _words("piano guitar violin drum flute trumpet"),
    "place": _words("school park library kitchen station museum"),
}
MATERIALS = {
    "wood": _words("plank board barrel"),
    "metal": _words("key needle coin"),
    "glass": _words("window mirror lens"),
    "paper": _words("newspaper letter stamp"),
    "wool": _words("scarf mitten sweater"),
}
USES = {
    "hammer": "drive a nail",
    "saw": "cut wood",
    "knife": "cut bread",
    "brush": "paint a wall",
    "lamp": "light a room",
    "cup": "drink tea",
    "pen": "write a letter",
    "spade": "dig a hole",
    "needle": "sew a shirt",
    "key": "open a door",
    "oven": "bake a cake",
    "umbrella": "stay dry",
    "bus": "ride to school",
    "soap": "wash hands",
    "phone": "call a friend",
    "rope": "tie a boat",
    "bed": "sleep",
}
FOUND = {  # where a thing is most likely
    "library": "book",
    "kitchen": "oven",
    "station": "train",
    "farm": "cow",
    "sea": "whale",
    "sky": "cloud",
    "forest": "wolf",
    "bedroom": "bed",
    "museum": "painting",
    "garage": "car",
}
HELPS = {  # what helps when
    "it rains and one wants to stay dry": "umbrella",
    "the room is dark at night": "lamp",
    "the hands are dirty": "soap",
    "the door is shut and does not open": "key",
    "a shirt has a hole": "needle",
    "a friend is far away": "phone",
    "one is tired at night": "bed",
    "a boat must not float away": "rope",
    "the bread is still in one piece": "knife",
    "a tree needs a hole in the earth": "spade",
    "a nail sticks out of the wall": "hammer",
}
EFFECTS = {
    "it rains": "the street gets wet",
    "the ice gets warm": "it melts",
    "the glass falls": "it breaks",
    "the sun comes up": "the sky gets light",
    "the baby is tired": "it sleeps",
    "the dog is hungry": "it eats",
    "the fire burns": "the room gets warm",
    "the plant gets no water": "it dries out",
    "the lamp is off": "the room is dark",
    "the wind blows": "the leaves move",
    "the boy runs far": "he gets tired",
    "the girl reads much": "she learns a lot",
}
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "up": "down", "wet": "dry", "open": "shut",
    "full": "empty", "loud": "quiet", "light": "dark", "early": "late", "rich": "poor",
}  # fmt: skip
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

SCALES = {  # from little to much; neighbours are never compared
    ("bigger", "smaller"): _words("ant bee mouse frog duck cat sheep horse car bus train museum"),
    ("heavier", "lighter"): _words("feather leaf pen apple book chair bed piano car bus train ship"),
}
LEGS = {"snake": 0, "worm": 0, "hen": 2, "duck": 2, "dog": 4, "cat": 4, "cow": 4, "horse": 4, "bee": 6,
        "fly": 6, "ant": 6, "spider": 8}  # fmt: skip


def above(scale: tuple[str, ...], thing: str) -> tuple[str, ...]:
    """What is clearly more than `thing` on this scale."""
    return scale[scale.index(thing) + 2 :]


def below(scale: tuple[str, ...], thing: str) -> tuple[str, ...]:
    """What is clearly less than `thing` on this scale."""
    return scale[: max(scale.index(thing) - 1, 0)]


def a(word: str) -> str:
    """`a plum`, `an oak`, `soap`"""
    return word if word == "soap" else f"an {word}" if word[0] in "aeiou" else f"a {word}"


# Two people and what one does to the other: before it, what the other will want then, how the first one is.
BEFORE, NEXT, LIKE = range(3)
ASKED = (
    "What does {x} need to do before this?",
    "What will {y} want to do next?",
    "How would you describe {x}?",
)
EVENTS = (
    ("{x} made a big dinner for {y}.", ("buy food at the market", "eat the dinner", "a good cook")),
    ("{x} ran a race and came in before {y}.", ("put on running shoes", "run faster next time", "fast")),
    ("{x} read a story to {y} at night.", ("open the book", "sleep after the story", "a good reader")),
    ("{x} fixed the old bike of {y}.", ("find the tools", "ride the bike again", "good with tools")),
    ("{x} made {y} laugh.", ("think of something funny", "laugh some more", "funny")),
    ("{x} took {y} to the station.", ("start the car", "get on the train", "a safe driver")),
    ("{x} showed {y} how the new song goes.", ("learn the song", "sing the song", "musical")),
    ("{x} painted the room of {y}.", ("buy some paint", "look at the new walls", "good with a brush")),
    ("{x} gave a young tree to {y}.", ("dig up the tree", "plant the tree", "fond of gardens")),
    ("{x} wrote a long letter to {y}.", ("take a pen and paper", "read the letter", "good with words")),
    ("{x} saw {y} fall and helped.", ("see the fall", "get up again", "kind")),
    ("{x} ate the last cake of {y}.", ("take the cake", "bake a new cake", "greedy")),
)

# What one does, in order; the first two steps are never an ending.
COURSES = {
    "Baking a cake": (
        "mixes milk and eggs", "adds the flour", "pours it all into a pan", "puts the pan into the oven",
        "takes the cake out and cuts it",
    ),
    "Washing the car": (
        "fills a pail with water", "puts soap into the water", "rubs the car with the soap",
        "washes the soap off", "dries the car with a towel",
    ),
    "Planting a tree": (
        "takes a spade", "digs a hole", "sets the tree into the hole", "fills the hole with earth",
        "gives the tree some water",
    ),
    "Sending a letter": (
        "takes a pen", "writes a letter", "folds the letter", "puts the letter into an envelope",
        "sends the envelope off",
    ),
    "Painting a wall": (
        "buys some paint", "opens the paint", "dips the brush into it", "paints the wall",
        "waits until the wall is dry",
    ),
    "Making tea": (
        "fills a pot with water", "heats the water", "pours the hot water over the tea", "lets the tea cool",
        "drinks the tea",
    ),
    "Taking the train": (
        "walks to the station", "buys a ticket", "gets on the train", "looks out of the train",
        "gets off at the last stop",
    ),
    "Catching a fish": (
        "puts a worm on the hook", "throws the hook into the lake", "feels a pull on the hook",
        "pulls a fish out of the lake", "walks home with the fish",
    ),
    "Going to bed": (
        "puts on night clothes", "lies down in bed", "falls asleep", "sleeps until morning",
        "gets up again",
    ),
    "Fixing a shirt": (
        "finds a hole in the shirt", "takes a needle", "sews up the hole", "cuts off the thread",
        "puts the shirt on",
    ),
}  # fmt: skip
ACTORS = {"man": "he", "boy": "he", "cook": "he", "father": "he",
          "woman": "she", "girl": "she", "lady": "she", "mother": "she"}  # fmt: skip
LOOKS = _words("young old tall small quiet happy")

# A blank that one word decides: the sentence, what makes it the first one, what makes it the second.
TWINS = (
    ("The {s} did not fit into the {h} because the _ was too {p}.", "large", "small"),
    ("The {s} fell through the hole in the {h} because the _ was too {p}.", "small", "old"),
    ("{x} gave {y} a {t} because _ had {p}.", "two of them", "none"),
    ("{x} sold the {t} to {y} because _ needed {p}.", "the money", "it badly"),
    ("{x} ran faster than {y} , so _ {p} the race.", "won", "lost"),
    ("{x} is older than {y} , so _ was born {p}.", "first", "last"),
    ("{x} could not look over {y} because _ was too {p}.", "small", "tall"),
    ("{x} asked {y} for help because _ {p} the answer.", "did not know", "knew"),
    ("{x} taught {y} to swim because _ {p} swim well.", "could", "could not"),
    ("{x} lent {y} a coat because _ was {p}.", "warm", "cold"),
    ("{x} carried {y} home because _ was {p}.", "strong", "hurt"),
    ("{x} paid {y} for the work because _ had {p} it.", "ordered", "done"),
)
SMALL = _words("ball book lamp drum cup hat kite puzzle")
HOLDERS = _words("box bag jar basket drawer")
THINGS = _words("book ball lamp hat kite pen cup scarf")
