"""BABILong (arXiv 2406.10149): the facts of a bAbI question (qa1 to qa10) between the sentences of books.

Files: bAbI's `qa*_test.txt` (v1.2, "en") under --data; the books are the plain text under --text. With --hub instead
the texts of the authors' data set, which are made of other books and as long as its sizes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice

from focusllm.evaluation.benchmark import (
    Prompted,
    Warn,
    around,
    entries,
    largest,
    prompts,
    sentences_of,
    spread,
    usable,
)
from focusllm.evaluation.example import Example, LengthError, Setting
from focusllm.evaluation.tasks.passkey import must_have
from focusllm.training.config import Source
from focusllm.training.corpus import dataset_rows

FILES = (
    "qa1_single-supporting-fact", "qa2_two-supporting-facts", "qa3_three-supporting-facts", "qa4_two-arg-relations",
    "qa5_three-arg-relations", "qa6_yes-no-questions", "qa7_counting", "qa8_lists-sets", "qa9_simple-negation",
    "qa10_indefinite-knowledge",
)  # fmt: skip
HUB_SIZES = {"0k": 0, **{f"{2**i}k": 2 ** (10 + i) for i in range(10)}, "1M": 2**20, "10M": 10 * 2**20}
"""Subsets of the data set on the hub, and the tokens that their texts have at most."""
LEAST_TOKENS = 10
"""Shorter sentences of the books are left out."""


class Story:
    """Reads the lines of a bAbI file: facts add up until the next story begins; a question has its answer behind it.

    Lines are numbered, from 1 in every story. Behind one that cannot be read a fact may be missing, so the rest of that
    story cannot be asked about.
    """

    facts: tuple[str, ...] = ()
    last: int | None = 0
    """Number of the line before, in its story; None: it could not be read."""

    def read(self, key: str, line: bytes) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
        """(key, facts, question, answer) if the line is a question.

        Raises:
            ValueError: it has no number, or not the next one.
        """
        last, self.last = self.last, None
        number, _, text = line.decode().strip().partition(" ")
        if int(number) == 1:
            self.facts, last = (), 0
        if last is None or int(number) != last + 1:
            raise ValueError("facts in front of it are missing")
        self.last = int(number)
        question, *answer = re.split(r"[\t|]", text)
        if answer:
            yield key, self.facts, question.strip(), answer[0]
        else:
            self.facts += (text,)


class Babilong(Prompted):
    """A task of BABILong."""

    version = 2

    def examples(self, length: int | None, limit: int, setting: Setting, warn: Warn | None = None) -> Iterator[Example]:
        """Questions in a drawn order; those whose facts alone are too long are passed over."""
        length, given = must_have(self, length), 0
        path = setting.file_unless_hub(
            *(f"{folder}{self.about['file']}" for folder in ("babilong/", "babi/", "en/", ""))
        )
        if path is None:
            for example in islice(self._from_hub(length, setting), limit):
                given += 1
                yield example
            if not given:
                raise LengthError(
                    f"{self.name} at {length} tokens: no text on the hub is so short; use another length."
                )
            return
        questions = list(usable(entries(path), Story().read, warn or setting.warn))
        for index in setting.rng(self.name).permutation(len(questions)):
            key, facts, question, answer = questions[index]
            before, after = around(self.about["prompt"], {"question": question})
            room = setting.room(self.name, length, before, after, max_new_tokens=self.about["max_new_tokens"])
            hide = partial(self.hide, facts, setting, int(setting.rng(self.name, length, key).integers(2**62)))
            if given == limit:
                break
            context = largest(hide, setting, room)
            if context is None:
                continue
            given += 1
            yield self._asked(key, question, context, answer)
        if not given:
            raise LengthError(f"{self.name} at {length} tokens has no room for its facts; use a greater length.")

    def _from_hub(self, length: int, setting: Setting) -> Iterator[Example]:
        """The data set's own texts of the greatest size that is no longer, as far as they fit in these tokens."""
        size = next(name for name, least in reversed(HUB_SIZES.items()) if length >= least)
        split = self.name.removeprefix("babilong-")
        for number, row in enumerate(dataset_rows(Source("hf:RMT-team/babilong", subset=size, split=split)), 1):
            before, after = around(self.about["prompt"], {"question": row["question"]})
            room = setting.room(self.name, length, before, after, max_new_tokens=self.about["max_new_tokens"])
            if setting.num_tokens(row["input"]) <= room:
                yield self._asked(str(number), row["question"], row["input"], row["target"])

    def _asked(self, key: str, question: str, context: str, answer: str) -> Example:
        labels = tuple(label for label in self.about["labels"] if label.lower() not in question.lower())
        return self.example(key, {"question": question}, context, [answer], choices=labels)

    @staticmethod
    def hide(facts: tuple[str, ...], setting: Setting, seed: int, size: int) -> str:
        """The facts, in order, at random places between the sentences of about `size` tokens of the books."""
        draw = random.Random(seed)
        text = setting.haystack.cut(draw.randrange(setting.haystack.num_tokens), size)
        sentences = [part for part in sentences_of(text)[1:] if setting.num_tokens(f" {part}") >= LEAST_TOKENS]
        places = sorted(draw.choices(range(len(sentences) + 1), k=len(facts)))
        return " ".join(spread(sentences, facts, places))


TASKS = tuple(
    Babilong(f"babilong-{name}", {**about, "file": f"{file}_test.txt"}, "text and files")
    for (name, about), file in zip(prompts("babilong").items(), FILES, strict=True)
)
