"""What made-up tasks are made of: words, names, numbers, and the sentences that they are put into.

Functions of a random generator alone. None of the sentences is one that the method is evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

Rng = np.random.Generator
T = TypeVar("T")


def pick(rng: Rng, choices: tuple[T, ...]) -> T:
    """One of several."""
    return choices[int(rng.integers(len(choices)))]


def _digits(rng: Rng, shortest: int = 3, longest: int = 9) -> str:
    length = int(rng.integers(shortest, longest + 1))
    alphabet = rng.choice(10, size=int(rng.integers(2, 11)), replace=False)  # few digits: many repeated ones
    return "".join(str(digit) for digit in rng.choice(alphabet, size=length))


def _letters(rng: Rng, alphabet: str, shortest: int, longest: int) -> str:
    return "".join(rng.choice(list(alphabet), size=int(rng.integers(shortest, longest + 1))))


def _hex(rng: Rng) -> str:
    return _letters(rng, "0123456789abcdef", 6, 32)


def _grouped(rng: Rng) -> str:
    groups = int(rng.integers(2, 6))
    return pick(rng, (":", "-", "/")).join(_letters(rng, "0123456789abcdef", 3, 12) for _ in range(groups))


def _code(rng: Rng) -> str:
    return f"{_letters(rng, 'ABCDEFGHJKLMNPRSTUVWXYZ', 2, 3)}-{_digits(rng, 3, 5)}"


def _word(rng: Rng) -> str:
    return pick(rng, WORDS)


def _words(rng: Rng) -> str:
    return f"{pick(rng, WORDS)} {pick(rng, WORDS)}"


def name(rng: Rng) -> str:
    """Of a person."""
    return f"{pick(rng, FIRST_NAMES)} {pick(rng, LAST_NAMES)}"


def date(rng: Rng) -> str:
    """A day, its month in words."""
    return f"{int(rng.integers(1, 29))} {pick(rng, MONTHS)} {int(rng.integers(1700, 2040))}"


def subject(rng: Rng) -> str:
    """A person, or something that has a name."""
    if rng.random() < 0.5:
        return name(rng)
    return f"the {pick(rng, WORDS)} {pick(rng, THINGS)}"


IDENTIFIERS: tuple[Callable[[Rng], str], ...] = (_hex, _grouped, _code, _digits, _words, name)
ATTRIBUTES: dict[str, tuple[tuple[str, ...], Callable[[Rng], str]]] = {
    "number": (
        ("access code", "locker number", "telephone extension", "serial number", "combination", "account number",
         "ticket number", "room number", "PIN", "badge number"),
        _digits,
    ),
    "code": (("licence plate", "part number", "booking reference", "flight number", "call sign"), _code),
    "word": (("password", "code word", "nickname", "emblem", "favourite word", "secret sign"), _word),
    "words": (("motto", "hiding place", "working title", "signal phrase"), _words),
    "person": (("guardian", "successor", "oldest friend", "teacher", "creditor"), name),
    "date": (("date of birth", "day of departure", "founding date", "deadline"), date),
}  # fmt: skip
STATEMENTS = (
    "The {a} of {s} is {v}.",
    "Note: for {s}, the {a} is {v}.",
    "{v} is the {a} of {s}.",
    "It should be recorded that the {a} of {s} is {v}.",
    "As for {s}, everyone agreed that the {a} was {v}.",
    "[{s} | {a}: {v}]",
    "The {a} belonging to {s} turned out to be {v}.",
    "They wrote it down at once: {a} of {s}, {v}.",
    "Nobody doubted any longer that {v} was the {a} of {s}.",
    "Asked about {s}, the clerk gave {v} as the {a}.",
    "{s}: {a} {v}.",
    "When {s} was mentioned, somebody remembered the {a}, {v}.",
)
HIDING_PLACES = (
    "behind the stove", "under the stairs", "inside the old piano", "beneath a loose plank", "in the hollow tree",
    "under the altar", "behind the mirror", "in a barrel of flour", "on top of the wardrobe", "in the wine cellar",
    "between two mattresses", "at the bottom of the well", "under the third step", "behind the loose brick",
    "in a hatbox", "among the beehives", "inside a hollow book", "under the doghouse", "in the bell tower",
)  # fmt: skip
BELONGINGS = (
    "ring", "letter", "map", "violin", "purse", "compass", "box", "necklace", "notebook", "vase", "watch", "sword",
    "painting", "saddle", "telescope", "coat", "crown", "flute", "ladder", "manuscript", "mask", "parcel", "trophy",
)  # fmt: skip
COINS = ("crowns", "ducats", "florins", "guineas", "pounds", "shillings", "silver dollars", "thalers", "francs")
TOWNS = (
    "Aberdeen", "Antwerp", "Bergen", "Bologna", "Bruges", "Cadiz", "Cork", "Dresden", "Ghent", "Girona", "Graz",
    "Lisbon", "Lucerne", "Malmo", "Odessa", "Porto", "Quebec", "Riga", "Salzburg", "Seville", "Tampere", "Turin",
    "Utrecht", "Valencia", "Verona", "Vilnius", "Warsaw", "York", "Zagreb",
)  # fmt: skip
MATERIALS = ("oak", "brass", "copper", "ivory", "leather", "marble", "pewter", "silk", "slate", "walnut", "wax", "wool")
TRADES = (
    "baker", "barber", "beekeeper", "blacksmith", "carpenter", "cartographer", "chemist", "clockmaker", "cooper",
    "dentist", "ferryman", "glassblower", "harpist", "jeweller", "locksmith", "mason", "midwife", "miller", "notary",
    "potter", "printer", "saddler", "shepherd", "surveyor", "tailor", "tanner", "weaver",
)  # fmt: skip
EVENTS: tuple[tuple[tuple[str, ...], tuple[str, ...], str, Callable[[Rng], str]], ...] = (
    (
        ("{s} hid the {t} {v}.", "Before leaving, {s} had hidden the {t} {v}.", "It was {v} that {s} hid the {t}."),
        ("Where did {s} hide the {t}?", "Where is the {t} that {s} hid?", "In what place was the {t} hidden by {s}?"),
        "The {t} is",
        lambda rng: pick(rng, HIDING_PLACES),
    ),
    (
        ("{s} lent the {t} to {v}.", "{v} has had the {t} of {s} since the spring.", "The {t} of {s} went to {v}."),
        ("Who has the {t} of {s}?", "To whom did the {t} of {s} go?", "Who was given the {t} by {s}?"),
        "The one who has it is",
        name,
    ),
    (
        ("{s} paid {v} for the {t}.", "The {t} cost {s} no less than {v}.", "For the {t}, {s} was asked {v}."),
        ("What did {s} pay for the {t}?", "How much did the {t} cost {s}?", "What was the price of the {t} for {s}?"),
        "The price is",
        lambda rng: f"{int(rng.integers(3, 900))} {pick(rng, COINS)}",
    ),
    (
        ("{s} left for {v} with the {t}.", "With the {t} under one arm, {s} went to {v}.", "{s} took the {t} to {v}."),
        ("Where did {s} go with the {t}?", "To which town did {s} take the {t}?", "Where did {s} travel?"),
        "The town is",
        lambda rng: pick(rng, TOWNS),
    ),
    (
        ("{s} found the {t} on {v}.", "On {v}, {s} came across the {t}.", "The {t} was found by {s} on {v}."),
        ("When did {s} find the {t}?", "On which day was the {t} found by {s}?", "What was the date of {s}'s find?"),
        "The day is",
        date,
    ),
    (
        ("{s} made the {t} out of {v}.", "The {t} which {s} built is of {v}.", "{s} wanted {v} for the {t}."),
        ("What is the {t} of {s} made of?", "Which material did {s} use for the {t}?", "What did {s} build it of?"),
        "The material is",
        lambda rng: pick(rng, MATERIALS),
    ),
    (
        ("{s} works as a {v} and owns the {t}.", "The {v} {s} owns the {t}.", "{s}, a {v}, never parted with the {t}."),
        (
            "What is the occupation of {s}?",
            "What does {s} do for a living?",
            "Which trade does the owner of the {t} have?",
        ),
        "The occupation is",
        lambda rng: pick(rng, TRADES),
    ),
)
"""What people do with a thing: statements, questions, the answer's beginning, what is asked for."""
QUESTIONS = (
    "What is the {a} of {s}?",
    "Tell me the {a} of {s}.",
    "Which {a} belongs to {s}?",
    "The text mentions {s}. What is the {a}?",
    "According to the text, what is the {a} of {s}?",
    "Give the {a} of {s}, nothing else.",
    "Can you find the {a} of {s}?",
    "I need to know the {a} of {s}.",
    "Do you know which {a} {s} has?",
    "Look for {s} and say what the {a} is.",
)
LEADS = (
    "The {a} of {s} is",
    "Answer:",
    "For {s}, the {a} is",
    "It says that the {a} of {s} is",
)
TABLES = (
    ("Register:", "{k} = {v}", "{k} ="),
    ("List of entries", "{k} -> {v}", "{k} ->"),
    ("# settings", "{k}: {v}", "{k}:"),
    ("key,value", "{k},{v}", "{k},"),
    ("Entries in the ledger:", "- {k} was assigned {v}", "- {k} was assigned"),
    ("pairs = [", "    ('{k}', '{v}'),", "('{k}', '"),
    ("name | entry", "{k} | {v}", "{k} |"),
)
LOOKUPS = (
    "What belongs to {k}?",
    "Look up {k} in the table.",
    "Which entry stands beside {k}?",
    "What was written for {k}?",
    "Find the entry of {k} and repeat it.",
    "What is the value of {k}?",
    "{k} is listed somewhere. What comes with it?",
)
FIRST_NAMES = (
    "Ada", "Abel", "Agnes", "Albert", "Amara", "Anton", "Beatrix", "Bruno", "Carla", "Cedric", "Chidi", "Clara",
    "Dario", "Delia", "Edgar", "Elena", "Emil", "Esther", "Felix", "Fiona", "Gustav", "Hanna", "Hugo", "Ines", "Ivan",
    "Jasper", "Jonas", "Kira", "Lars", "Leila", "Lorenz", "Magda", "Marcus", "Mina", "Nadia", "Nils", "Olga", "Oscar",
    "Paula", "Petra", "Quentin", "Ravi", "Rosa", "Samir", "Selma", "Simon", "Tara", "Theo", "Ursula", "Viktor",
    "Wanda", "Xenia", "Yusuf", "Zora",
)  # fmt: skip
LAST_NAMES = (
    "Abbott", "Almeida", "Ashford", "Bergman", "Blackwood", "Castellan", "Crane", "Delacroix", "Drummond", "Eriksen",
    "Falk", "Farrow", "Galloway", "Grimshaw", "Hartley", "Holloway", "Iverson", "Jansen", "Kestrel", "Kowalski",
    "Lindqvist", "Lockwood", "Marlowe", "Mbeki", "Moreau", "Novak", "Okafor", "Oyelaran", "Pemberton", "Quill",
    "Ravenscroft", "Rossi", "Sandoval", "Sinclair", "Tanaka", "Thorne", "Ueda", "Vance", "Weller", "Yilmaz", "Zeller",
)  # fmt: skip
THINGS = (
    "archive", "bridge", "cabin", "clock", "committee", "engine", "expedition", "factory", "garden", "harbour", "house",
    "island", "laboratory", "library", "lighthouse", "machine", "museum", "observatory", "orchestra", "project",
    "railway", "regiment", "school", "ship", "station", "theatre", "tower", "vault", "village", "warehouse",
)  # fmt: skip
WORDS = (
    "amber", "anchor", "apple", "arrow", "badger", "barley", "basil", "beacon", "birch", "bronze", "candle", "canyon",
    "cedar", "cherry", "cinnamon", "clover", "cobalt", "copper", "coral", "cotton", "crimson", "crystal", "dagger",
    "desert", "dolphin", "dragon", "eagle", "ebony", "ember", "falcon", "feather", "fern", "flint", "forest", "fox",
    "ginger", "glacier", "golden", "granite", "hammer", "harvest", "hazel", "heron", "honey", "indigo", "iron", "ivory",
    "jade", "jasmine", "juniper", "kettle", "lantern", "lavender", "lemon", "lily", "lotus", "magnet", "maple",
    "marble", "meadow", "mercury", "mint", "mirror", "monsoon", "needle", "nettle", "nickel", "oak", "olive", "onyx",
    "opal", "orchid", "otter", "owl", "paper", "pearl", "pebble", "pepper", "pine", "plum", "poppy", "quartz", "rabbit",
    "raven", "reed", "river", "rocket", "rose", "ruby", "saffron", "salt", "scarlet", "shadow", "silver", "sparrow",
    "spiral", "stone", "storm", "sugar", "summer", "thistle", "thunder", "tiger", "timber", "topaz", "tulip", "turtle",
    "velvet", "violet", "walnut", "whisper", "willow", "winter", "wolf", "yellow", "zephyr",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
