"""Retrieval tasks that are made up: something is hidden in a long text, and asked for.

A task gives `inserts` (text to be put somewhere into the memory, in order), a `question`, the `lead` with which the
answer begins, and the `answer`. Pure functions of a random generator; no tokenizer, no files but bAbI's. The wordings
are deliberately not those of the tasks that the method is evaluated on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from focusllm.errors import DocumentError
from focusllm.files import open_text
from focusllm.json_text import parse_json

Rng = np.random.Generator
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """Something hidden, and the question about it."""

    inserts: list[str]
    """Texts for the memory: each is put somewhere, in this order."""
    question: str
    lead: str
    """The beginning of the answer that is given with the question, for texts without a chat template; may be empty."""
    answer: str


def fact(rng: Rng) -> Task:
    """One sentence that says a number, a word or a date of somebody or something."""
    subject = _subject(rng)
    kind = _pick(rng, tuple(ATTRIBUTES))
    attributes, value_of = ATTRIBUTES[kind]
    attribute, value = _pick(rng, attributes), value_of(rng)
    statement = _pick(rng, STATEMENTS).format(a=attribute, s=subject, v=value)
    question = _pick(rng, QUESTIONS).format(a=attribute, s=subject)
    lead = _pick(rng, LEADS).format(a=attribute, s=subject)
    return Task([statement], question, lead, value)


def table(rng: Rng, most_rows: int = 100) -> Task:
    """A table of identifiers, more often a short one than a long one; one of them is looked up."""
    rows = 3 + round((most_rows - 3) * rng.random() ** 2)
    make_key, make_value = _pick(rng, IDENTIFIERS), _pick(rng, IDENTIFIERS)
    keys = list(dict.fromkeys(make_key(rng) for _ in range(rows)))
    values = [make_value(rng) for _ in keys]
    title, line, lead = _pick(rng, TABLES)
    chosen = int(rng.integers(len(keys)))
    body = "\n".join(line.format(k=key, v=value) for key, value in zip(keys, values, strict=True))
    question = _pick(rng, LOOKUPS).format(k=keys[chosen])
    return Task([f"{title}\n{body}\n"], question, lead.format(k=keys[chosen]), values[chosen])


class Questions:
    """Questions from files, of which one in fifty is kept from training, of fewer the last; one alone is in both parts.

    Args:
        tasks: all of them.
        part: `train` or `held out`.
    """

    def __init__(self, tasks: list[Task], part: str):
        kept = {i for i in range(len(tasks)) if i % 50 == 49} or {len(tasks) - 1}
        chosen = {"train": [t for i, t in enumerate(tasks) if i not in kept], "held out": [tasks[i] for i in kept]}
        self.tasks = chosen[part] or tasks

    def __call__(self, rng: Rng) -> Task:
        """One of them."""
        return self.tasks[int(rng.integers(len(self.tasks)))]


def read_stories(paths: Sequence[str | Path]) -> list[Task]:
    """BAbI stories (Weston et al., arXiv 1502.05698): the facts before a question, to be hidden one by one.

    Raises:
        DocumentError: a file that cannot be read, is not in bAbI's format, or has no questions.
    """
    tasks: list[Task] = []
    for path in paths:
        facts: list[str] = []
        before = len(tasks)
        for number, line in enumerate(_text(path).splitlines(), 1):
            match = re.fullmatch(r"(\d+) (.*)", line)
            if match is None:
                raise DocumentError(f"{path}, line {number} does not begin with a number; give files in bAbI's format.")
            if match[1] == "1":
                facts = []
            question, *rest = re.split(r"[\t|]", match[2])  # some copies have bars for tabs
            if rest:
                tasks.append(Task(facts, question.strip(), "", rest[0].strip().replace(",", ", ")))
            else:
                facts = [*facts, question.strip()]
        if len(tasks) == before:
            raise DocumentError(f"{path} has no questions; give files in bAbI's format.")
    return tasks


def read_multihop(paths: Sequence[str | Path]) -> list[Task]:
    """HotpotQA and MuSiQue questions (JSON or JSON lines) with their paragraphs, up to four of them distractors.

    Raises:
        DocumentError: a file that cannot be read, is neither, or has no questions.
    """
    tasks: list[Task] = []
    for path in paths:
        text = _text(path)
        try:
            lines = (line for line in text.split("\n") if line.strip())
            rows = parse_json(text) if text.lstrip().startswith("[") else map(parse_json, lines)
            found = [_multihop(row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise DocumentError(f"{path} is not in HotpotQA's or MuSiQue's format ({error!r}).") from error
        if not found:
            raise DocumentError(f"{path} has no questions; give files in HotpotQA's or MuSiQue's format.")
        tasks += found
    return tasks


def _multihop(row: dict[str, Any]) -> Task:
    if "paragraphs" in row:
        given = [(p["is_supporting"], f"{p['title']}\n{p['paragraph_text']}") for p in row["paragraphs"]]
    else:
        needed = {title for title, _ in row["supporting_facts"]}
        given = [(title in needed, f"{title}\n{''.join(sentences)}") for title, sentences in row["context"]]
    distractors = [i for i, (need, _) in enumerate(given) if not need][4:]
    inserts = [text for i, (_, text) in enumerate(given) if i not in distractors]
    return Task(inserts, row["question"], "Answer:", row["answer"])


def _text(path: str | Path) -> str:
    try:
        with open_text(path) as file:
            return file.read()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read ({error.strerror or error}); check the path.") from error
    except ValueError as error:
        raise DocumentError(f"{path} cannot be read ({error}); give a file in UTF-8.") from error


# --- material ---------------------------------------------------------------------------------------------------------


def _pick(rng: Rng, choices: tuple[T, ...]) -> T:
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
    return _pick(rng, (":", "-", "/")).join(_letters(rng, "0123456789abcdef", 3, 12) for _ in range(groups))


def _code(rng: Rng) -> str:
    return f"{_letters(rng, 'ABCDEFGHJKLMNPRSTUVWXYZ', 2, 3)}-{_digits(rng, 3, 5)}"


def _word(rng: Rng) -> str:
    return _pick(rng, WORDS)


def _words(rng: Rng) -> str:
    return f"{_pick(rng, WORDS)} {_pick(rng, WORDS)}"


def _name(rng: Rng) -> str:
    return f"{_pick(rng, FIRST_NAMES)} {_pick(rng, LAST_NAMES)}"


def _date(rng: Rng) -> str:
    return f"{int(rng.integers(1, 29))} {_pick(rng, MONTHS)} {int(rng.integers(1700, 2040))}"


def _subject(rng: Rng) -> str:
    if rng.random() < 0.5:
        return _name(rng)
    return f"the {_pick(rng, WORDS)} {_pick(rng, THINGS)}"


IDENTIFIERS: tuple[Callable[[Rng], str], ...] = (_hex, _grouped, _code, _digits, _words, _name)
ATTRIBUTES: dict[str, tuple[tuple[str, ...], Callable[[Rng], str]]] = {
    "number": (
        ("access code", "locker number", "telephone extension", "serial number", "combination", "account number",
         "ticket number", "room number", "PIN", "badge number"),
        _digits,
    ),
    "code": (("licence plate", "part number", "booking reference", "flight number", "call sign"), _code),
    "word": (("password", "code word", "nickname", "emblem", "favourite word", "secret sign"), _word),
    "words": (("motto", "hiding place", "working title", "signal phrase"), _words),
    "person": (("guardian", "successor", "oldest friend", "teacher", "creditor"), _name),
    "date": (("date of birth", "day of departure", "founding date", "deadline"), _date),
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
)
QUESTIONS = (
    "What is the {a} of {s}?",
    "Tell me the {a} of {s}.",
    "Which {a} belongs to {s}?",
    "The text mentions {s}. What is the {a}?",
    "According to the text, what is the {a} of {s}?",
    "Give the {a} of {s}, nothing else.",
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
