"""RULER's 13 tasks at any length (arXiv 2404.06654): needles, variable chains, word counts, questions on documents.

niah_*       magic numbers or UUIDs for words, between repeated sentences, in plain text (--text) or among other needles
vt           variables that are assigned one another's value
cwe, fwe     the words that occur most, in a list with two frequencies and in one with a zeta distribution
qa_1, qa_2   SQuAD's and HotpotQA's questions, their paragraphs among others (files under --data)
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from focusllm.evaluation.benchmark import (
    Prompted,
    around,
    checked,
    entries,
    fill,
    largest,
    prompts,
    sentences_of,
    spread,
    usable,
)
from focusllm.evaluation.example import Example, LengthError, Setting
from focusllm.evaluation.metrics import library
from focusllm.evaluation.tasks.passkey import must_have

ABOUT = prompts("ruler")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(100 * i / 39) for i in range(40)]
NUM_HOPS = 4
NUM_COMMON = 10
ZETA_OF_2 = math.pi**2 / 6
FILES = {
    "qa_1": ("ruler/squad.json", "squad.json", "dev-v2.0.json", "dev-v1.1.json"),
    "qa_2": ("ruler/hotpotqa.json", "hotpotqa.json", "hotpot_dev_distractor_v1.json"),
}


class Case(NamedTuple):
    """What a prompt names, the answers, and the long text at any size."""

    values: dict[str, str]
    references: list[str]
    build: Callable[[int], str]


Make = Callable[[random.Random, Setting, int], Case]
"""Draws a case for (generator, setting, length)."""


class Question(NamedTuple):
    """A question on documents: its own ones, and others of the same article, which come before any others."""

    text: str
    answers: list[str]
    own: list[str]
    more: list[str]


class Ruler(Prompted):
    """A task of RULER.

    Args:
        single: the prompt asks for one value, not for several.
    """

    version = 2

    def __init__(self, name: str, make: Make, needs: str = "", single: bool = False):
        about = ABOUT[name.split("_")[0]]
        if single:
            about = about | {part: in_singular(about[part]) for part in ("prompt", "answer_prefix")}
        super().__init__(f"ruler-{name}", about, needs)
        self.make = make

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """Each drawn by itself."""
        length = must_have(self, length)
        for i in range(limit):
            draw = random.Random(int(setting.rng(self.name, length, i).integers(2**62)))
            case = self.make(draw, setting, length)
            parts = *around(self.about["prompt"], case.values), fill(self.about["answer_prefix"], case.values)
            room = setting.room(self.name, length, *parts, max_new_tokens=self.about["max_new_tokens"])
            context = largest(case.build, setting, room)
            if context is None:
                raise LengthError(
                    f"{self.name} at {length} tokens has no room for what is asked; use a greater length."
                )
            yield self.example(i, case.values, context, case.references)


@cache
def words() -> dict[str, list[str]]:
    """Nouns, adjectives and verbs."""
    lists = library("wonderwords").RandomWord()
    return {kind: sorted(set(lists.filter(include_categories=[kind]))) for kind in ("noun", "adjective", "verb")}


def drawn(draw: random.Random, kind: str) -> str:
    """A key or a value of a needle."""
    if kind == "words":
        return f"{draw.choice(words()['adjective'])}-{draw.choice(words()['noun'])}"
    if kind == "numbers":
        return str(draw.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def needles(haystack: str, keys: str, kind: str, num_keys: int, num_values: int, num_asked: int) -> Make:
    """Needles of some keys with some values each, in a haystack of "noise", "text" or "needles"."""

    def make(draw: random.Random, setting: Setting, length: int) -> Case:
        values = {drawn(draw, keys): [drawn(draw, kind) for _ in range(num_values)] for _ in range(num_keys)}
        lines = [NEEDLE.format(kind=kind, key=key, value=value) for key in values for value in values[key]]
        draw.shuffle(lines)
        asked = draw.sample(sorted(values), num_asked)
        query = ", and ".join(part for part in (", ".join(asked[:-1]), asked[-1]) if part)
        seed, depths = draw.getrandbits(62), sorted(draw.sample(DEPTHS, len(lines)))

        def build(size: int) -> str:
            if haystack == "text":
                sentences = sentences_of(setting.haystack.cut(0, size))
                return " ".join(spread(sentences, lines, [len(sentences) * depth // 100 for depth in depths]))
            again = random.Random(seed)
            places = sorted(again.choices(range(max(size, 1)), k=len(lines)))
            others = (NEEDLE.format(kind=kind, key=drawn(again, keys), value=drawn(again, kind)) for _ in range(size))
            return "\n".join(spread([NOISE] * size if haystack == "noise" else list(others), lines, places))

        named = kind[:-1] if num_values * num_asked == 1 else kind
        return Case({"kind": named, "query": query}, [value for key in asked for value in values[key]], build)

    return make


def in_singular(prompt: str) -> str:
    """For one value instead of several."""
    return prompt.replace("Some", "A").replace("are all", "is").replace("are", "is")


def solved(name: str, values: dict[str, str], answer: str) -> str:
    """A prompt with its answer, as an example in front of what is asked."""
    about = ABOUT[name]
    return fill(about["prompt"] + about["answer_prefix"], {"lead": "", **values}) + f" {answer}\n"


def chain(draw: random.Random, name_length: int) -> Case:
    """Variables that are assigned one another's value, between repeated sentences."""
    names: dict[str, None] = {}
    while len(names) <= NUM_HOPS:
        names["".join(draw.choices(string.ascii_uppercase, k=name_length))] = None
    first, *others = names
    value, seed = str(draw.randrange(10_000, 99_999)), draw.getrandbits(62)
    steps = [f"VAR {name} = VAR {last} " for name, last in zip(others, names, strict=False)]

    def build(size: int) -> str:
        places = sorted(random.Random(seed).sample(range(max(size, NUM_HOPS + 1)), k=NUM_HOPS + 1))
        places = [min(place, size) for place in places]  # of fewer sentences than steps, in order at the end
        return "\n".join(spread([NOISE] * size, [f"VAR {first} = {value}", *steps], places))

    return Case({"query": value, "count": str(NUM_HOPS + 1)}, list(names), build)


def variables(draw: random.Random, setting: Setting, length: int) -> Case:
    """A chain, with a solved one of 500 tokens in front."""
    shown, case = chain(draw, 3), chain(draw, 5)
    room = 500 - setting.num_tokens(ABOUT["vt"]["prompt"] + ABOUT["vt"]["answer_prefix"])
    context = largest(shown.build, setting, room) or shown.build(0)
    lead = solved("vt", {**shown.values, "context": context}, " ".join(shown.references))
    return case._replace(values={**case.values, "lead": f"{lead}\n"})


def numbered(items: Iterable[str]) -> str:
    """1. so 2. and so on."""
    return " ".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def common_words(draw: random.Random, setting: Setting, length: int) -> Case:
    """Ten words that occur often among others, with a solved list in front; short lists below 4,096 tokens."""
    known = sorted({word for kind in words().values() for word in kind})
    (often, seldom), shown = ((30, 3), (40, 10, 3)) if length >= 4096 else ((6, 1), (20, 3, 1))

    def mixed(pool: Iterable[str], size: int, often: int, seldom: int, seed: int) -> str:
        drawn = list(islice(pool, size))
        everything = drawn[:NUM_COMMON] * often + drawn[NUM_COMMON:] * seldom
        random.Random(seed).shuffle(everything)
        return numbered(everything)

    examples, pool, seed = draw.sample(known, shown[0]), draw.sample(known, len(known)), draw.getrandbits(62)

    def build(size: int) -> str:
        # the original's longer list of words is not in the package: beyond the known ones come pairs of them
        endless = (word for source in (pool, map("-".join, pairs(pool))) for word in source)
        return mixed(endless, NUM_COMMON + size, often, seldom, seed)

    context = mixed(examples, *shown, seed)
    lead = solved("cwe", {"context": context}, numbered(examples[:NUM_COMMON]))
    return Case({"lead": lead}, pool[:NUM_COMMON], build)


def pairs(pool: list[str]) -> Iterator[tuple[str, str]]:
    """All pairs, one after the other."""
    return ((first, second) for first in pool for second in pool)


def frequent_words(draw: random.Random, setting: Setting, length: int) -> Case:
    """Made-up words; the k-th most frequent occurs in a share of k^-2 / zeta(2), and the first is dots."""
    vocabulary = ["..."]
    while len(vocabulary) < max(length // 50, NUM_COMMON):
        vocabulary.append("".join(draw.choices(string.ascii_lowercase, k=6)))
    seed = draw.getrandbits(62)

    def build(size: int) -> str:
        counts = (int(size / k**2 / ZETA_OF_2) for k in range(1, len(vocabulary) + 1))
        everything = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(seed).shuffle(everything)
        return " ".join(everything)

    return Case({}, vocabulary[1:4], build)


def squad(key: str, row: Any) -> Iterator[Question]:
    """The questions of an article that have answers."""
    paragraphs = checked(row, {"paragraphs": list})["paragraphs"]
    for paragraph in paragraphs:
        more = [other["context"] for other in paragraphs if other["context"] != paragraph["context"]]
        for asked in paragraph["qas"]:
            answers = [answer["text"] for answer in asked["answers"]]
            if answers and not asked.get("is_impossible"):
                yield Question(asked["question"], answers, [paragraph["context"]], more)


def hotpotqa(key: str, row: Any) -> Iterator[Question]:
    """A question with its ten paragraphs."""
    row = checked(row, {"question": str, "answer": str, "context": list})
    own = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
    yield Question(row["question"], [row["answer"]], own, [])


@cache
def questions(path: Path, read: Callable[[str, Any], Iterator[Question]]) -> tuple[list[Question], list[str]]:
    """All questions of a file, and all documents."""
    found = list(usable(entries(path), read))
    return found, sorted({text for question in found for text in (*question.own, *question.more)})


def documents(names: tuple[str, ...], read: Callable[[str, Any], Iterator[Question]]) -> Make:
    """A question, and its documents among others."""

    def make(draw: random.Random, setting: Setting, length: int) -> Case:
        found, everything = questions(setting.file(*names), read)
        asked, seed = draw.choice(found), draw.getrandbits(62)
        near, known = draw.sample(asked.more, len(asked.more)), {*asked.own, *asked.more}
        far = [text for text in draw.sample(everything, len(everything)) if text not in known]

        def build(size: int) -> str:
            texts = list(islice(cycle([*asked.own, *near, *far]), max(size, len(asked.own))))
            random.Random(seed).shuffle(texts)
            return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))

        return Case({"query": asked.text}, asked.answers, build)

    return make


NEEDLES = {
    "single_1": ("noise", "words", "numbers", 1, 1, 1),
    "single_2": ("text", "words", "numbers", 1, 1, 1),
    "single_3": ("text", "words", "uuids", 1, 1, 1),
    "multikey_1": ("text", "words", "numbers", 4, 1, 1),
    "multikey_2": ("needles", "words", "numbers", 1, 1, 1),
    "multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
    "multivalue": ("text", "words", "numbers", 1, 4, 1),
    "multiquery": ("text", "words", "numbers", 4, 1, 4),
}
TASKS = (
    *(
        Ruler(f"niah_{name}", needles(*row), "text" if row[0] == "text" else "", single=row[4] * row[5] == 1)
        for name, row in NEEDLES.items()
    ),
    Ruler("vt", variables),
    Ruler("cwe", common_words),
    Ruler("fwe", frequent_words),
    *(Ruler(name, documents(FILES[name], read), "data") for name, read in (("qa_1", squad), ("qa_2", hotpotqa))),
)
