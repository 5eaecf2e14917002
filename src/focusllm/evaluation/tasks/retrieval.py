"""Looking things up in long data, made up, after InfiniteBench (arXiv 2402.13718) and Lost in the Middle (2307.03172).

number-string        ten digits in repeated sentences (InfiniteBench's Retrieve.Number)
key-value            a value in a JSON object of UUIDs (Retrieve.KV)
lost-in-the-middle-N the same from the original's file kv-retrieval-N_keys.jsonl (or .jsonl.gz) under --data
math-find            a number by its rank in a list (Math.Find)
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from focusllm.evaluation.benchmark import checked, entries, usable
from focusllm.evaluation.example import Example, LengthError, Setting, Task
from focusllm.evaluation.tasks.passkey import GARBAGE, depth_of, must_have

EXTRACT = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
FOLDERS = ("lost_in_the_middle", "kv_retrieval_data", "bench/lost_in_the_middle")
PAIR_TOKENS = 48
"""A UUID and a few words."""
LEAST_NUMBERS = 3
RANKS = {"largest": -1, "second largest": -2, "third largest": -3, "smallest": 0, "second smallest": 1, "median": None}


class NumberString(Task):
    """Right when the digits occur in the answer."""

    name = "number-string"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """The same text but for the digits and their place."""
        length = must_have(self, length)
        intro = (
            "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about it.\n\n"
        )
        question = "\nWhat is the sequence of digits? The sequence of digits is"
        line = "The sequence of digits is {0}. Remember it. {0} is the sequence of digits.\n"
        room = setting.room(self.name, length, intro, line.format("0" * 10), question, max_new_tokens=16)
        repeats = room // setting.num_tokens(GARBAGE)
        for i in range(limit):
            digits = setting.rng(self.name, length, i).integers(0, 10, size=5)
            number, depth = "".join(str(digit) * 2 for digit in digits), depth_of(i, limit)
            before = round(depth * repeats)
            text = GARBAGE * before + line.format(number) + GARBAGE * (repeats - before)
            meta = {"depth": round(depth, 2)}
            yield Example(str(i), intro, text, question, (number,), max_new_tokens=16, meta=meta)


class KeyValue(Task):
    """Right when the value occurs in the answer."""

    name = "key-value"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """Each time other pairs."""
        length = must_have(self, length)
        room = setting.room(self.name, length, EXTRACT, _asked(str(uuid.UUID(int=0))), max_new_tokens=PAIR_TOKENS)
        for i in range(limit):
            rng = setting.rng(self.name, length, i)
            pairs = _Pairs(rng)
            count = setting.count_fitting(partial(_pair_line, pairs), room)
            yield pair_example(str(i), pairs.first(max(count, 1)), depth_of(i, limit))


class LostInTheMiddle(Task):
    """Right when the value occurs in the answer.

    Args:
        count: pairs in a row, which the file is named after.
    """

    needs, has_own_lengths, version = "data", True, 3

    def __init__(self, count: int):
        self.name = f"lost-in-the-middle-{count}"
        file = f"kv-retrieval-{count}_keys.jsonl"
        self.paths = [f"{folder}/{file}{end}" for folder in FOLDERS for end in ("", ".gz")]

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """The file's rows, the asked key going from the first to the last."""
        rows = usable(entries(setting.file(*self.paths)), lambda _, row: [_pairs_of(row)], setting.warn)
        for i, (pairs, asked) in zip(range(limit), rows, strict=False):
            depth = depth_of(i, limit)
            others = [pair for pair in pairs if pair != asked]
            place = round(depth * len(others))  # as in the original, the row's pair is moved
            moved = [*others[:place], asked, *others[place:]]
            yield pair_example(str(i), moved, depth, max_new_tokens=100)  # as in the original's command


class MathFind(Task):
    """Right when the first number of the answer is the one that is asked for. The list has bounds of its own, so that
    however long it is, the greatest number cannot be known without it; equal numbers have one rank.
    """

    name, version = "math-find", 2

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """Each time another list; the kinds of question take turns."""
        length = must_have(self, length)
        for i in range(limit):
            rng, kind = setting.rng(self.name, length, i), tuple(RANKS)[i % len(RANKS)]
            before = f"What is the {kind} number in the following list?\n\n"
            after = f"\n\nYou should answer with only one number, no other words. The {kind} number of the list is:"
            room = setting.room(self.name, length, before, after, max_new_tokens=8)
            least, most = int(rng.integers(100_000, 400_000)), int(rng.integers(600_000, 900_000))
            numbers = rng.integers(least, most, size=max(room, 32))
            numbers = numbers[: setting.count_fitting(partial(_number, numbers), room)]
            ranked = np.unique(numbers)
            if len(ranked) < LEAST_NUMBERS:
                raise LengthError(
                    f"{self.name} at {length} tokens has room for {len(ranked)} numbers; use a length that has for "
                    f"{LEAST_NUMBERS}."
                )
            rank = RANKS[kind]
            answer = np.sort(numbers)[len(numbers) // 2] if rank is None else ranked[rank]
            text = f"[{', '.join(map(str, numbers))}]"
            yield Example(str(i), before, text, after, (str(answer),), max_new_tokens=8, meta={"dataset": kind})

    def score(self, prediction: str, example: Example) -> float:
        """Exact."""
        found = re.search(r"\d+", prediction)
        return float(found is not None and int(found[0]) == int(example.references[0]))


class _Pairs:
    """Random keys and values, made when they are asked for."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.made = rng, list[tuple[str, str]]()

    def __getitem__(self, index: int) -> tuple[str, str]:
        while len(self.made) <= index:
            key, value = (str(uuid.UUID(bytes=self.rng.bytes(16), version=4)) for _ in range(2))
            self.made.append((key, value))
        return self.made[index]

    def first(self, count: int) -> list[tuple[str, str]]:
        return [self[index] for index in range(count)]


def pair_example(name: str, pairs: list[tuple[str, str]], depth: float, max_new_tokens: int = PAIR_TOKENS) -> Example:
    """The prompt of Lost in the Middle, without a chat template, as there for base models; the asked key at a depth."""
    key, value = pairs[round(depth * (len(pairs) - 1))]
    data = "{" + ",\n ".join(f'"{k}": "{v}"' for k, v in pairs) + "}"
    meta = {"depth": round(depth, 2), "num_keys": len(pairs)}
    return Example(name, EXTRACT, data, _asked(key), (value,), max_new_tokens=max_new_tokens, chat=False, meta=meta)


def _pair_line(pairs: _Pairs, index: int) -> str:
    return '"{}": "{}",\n '.format(*pairs[index])


def _pairs_of(row: Any) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """Keys and values of a line of the original's file, and the pair of them that is asked for.

    Raises:
        ValueError: it is not among them.
    """
    found = checked(row, {"ordered_kv_records": list, "key": str, "value": str})
    pairs = [(str(key), str(value)) for key, value in found["ordered_kv_records"]]
    asked = found["key"], found["value"]
    if asked not in pairs:
        raise ValueError("its key and value are not among its pairs")
    return pairs, asked


def _number(numbers: np.ndarray, index: int) -> str:
    return f"{numbers[index]}, "


def _asked(key: str) -> str:
    return f'\n\nKey: "{key}"\nCorresponding value:'


TASKS: tuple[Task, ...] = (NumberString(), KeyValue(), *map(LostInTheMiddle, (75, 140, 300)), MathFind())
