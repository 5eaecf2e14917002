"""Made-up facts and questions about them, by which a model's look-up heads are found: no text of anybody's.

Every fact has near-duplicates: the same sentence of somebody else, or of something else. Pure functions of a random
generator; no model, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Rng = np.random.Generator
Item = TypeVar("Item")

FIRST_NAMES = (
    "Adela",
    "Bram",
    "Corin",
    "Delia",
    "Edwin",
    "Fenna",
    "Gustav",
    "Hester",
    "Ivo",
    "Jorun",
    "Kasper",
    "Lenore",
)
LAST_NAMES = ("Ashdown", "Brindle", "Calloway", "Dunmore", "Everhart", "Fairweather", "Grimsby", "Hollis", "Ironside")
THINGS = (
    *("telescope", "violin", "ledger", "dagger", "necklace", "compass", "map", "crown", "lantern", "testament"),
    *("medal", "flute"),
)
PLACES = (
    *("under the third stair", "inside the clock case", "behind the oak panel", "in the blue teapot"),
    *("beneath the kitchen flagstone", "in the hollow of the elm", "at the bottom of the well", "in the church organ"),
    *("between two roof beams", "in a hatbox in the attic", "inside the stuffed owl", "in the boathouse locker"),
    *("under the beehive", "in the lining of a coat", "behind the bakery oven", "on the top shelf"),
)
WORDINGS = (
    ("{who} keeps the {thing} {place}.", "Where does {who} keep the {thing}?"),
    ("The {thing} of {who} lies {place}.", "Where does the {thing} of {who} lie?"),
    ("It was {who} who put the {thing} {place}.", "Where did {who} put the {thing}?"),
    ("Nobody but {who} knew that the {thing} had been left {place}.", "Where was the {thing} of {who}?"),
    ("{place}, that is where {who} stores the {thing}.", "How would one find the {thing} of {who}?"),
    ("Asked about the {thing}, {who} pointed to a spot {place}.", "Tell me the location of the {thing} of {who}."),
)


@dataclass(frozen=True)
class Needle:
    """A fact, and the question that it answers."""

    statement: str
    question: str
    answer: str


def needles(rng: Rng, count: int) -> list[Needle]:
    """So many facts, each about another person and thing; people, things, places and wordings come up again."""
    found: dict[tuple[str, str], Needle] = {}
    while len(found) < count:
        who = f"{_pick(rng, FIRST_NAMES)} {_pick(rng, LAST_NAMES)}"
        words = {"who": who, "thing": _pick(rng, THINGS), "place": _pick(rng, PLACES)}
        statement, question = _pick(rng, WORDINGS)
        said = statement.format(**words)
        needle = Needle(said[0].upper() + said[1:], question.format(**words), words["place"])
        found.setdefault((who, words["thing"]), needle)
    return list(found.values())


def _pick(rng: Rng, choices: Sequence[Item]) -> Item:
    return choices[int(rng.integers(len(choices)))]
