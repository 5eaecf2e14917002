"""One sentence hidden in a long text, at depths from the beginning to the end.

passkey         a number of five digits in repeated sentences, continued without a chat template: the sentences of
                Mohtashami and Jaggi (arXiv 2305.16300), laid out as in InfiniteBench, the task in front of all
passkey-paper   the same as FocusLLM's authors ask for it (section 4.4, their eval_passkey.py): a number below 50,000,
                the task behind the text, beside the question; the answer is as many tokens as the number has
needle          a made-up fact in plain text (--text), asked for in the chat template (needle in a haystack)

With N examples, depths are N evenly spaced ones, and from N = 10 on ten again and again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from focusllm.errors import ConfigError
from focusllm.evaluation.benchmark import largest
from focusllm.evaluation.example import Example, LengthError, Setting, Task

INTRO = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there.\n"  # noqa: E501
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
LEAD = "What is the pass key? The pass key is"
BELOW = 50_000
"""Numbers of `passkey-paper`."""
DEPTHS = 10
ROLES = (
    "harbour master",
    "night watchman",
    "town clerk",
    "librarian",
    "clockmaker",
    "postmistress",
    "gardener",
    "cook",
)
PLACES = (
    *("Lisbon", "Tromso", "Valparaiso", "Zanzibar", "Kyoto", "Tbilisi", "Galway", "Cusco", "Riga", "Hobart", "Oaxaca"),
    *("Bergen", "Samarkand", "Dakar", "Ljubljana", "Nuuk", "Quito", "Tartu", "Windhoek", "Yerevan", "Aleppo", "Cork"),
)


class Passkey(Task):
    """Right when the first five digits of the answer are the number."""

    name = "passkey"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """The same text but for the number and its place."""
        length = must_have(self, length)
        sample = needle_line("00000")
        room = setting.room(self.name, length, INTRO, sample, LEAD, max_new_tokens=8)
        repeats = room // setting.num_tokens(GARBAGE)
        for i in range(limit):
            key = "".join(map(str, setting.rng(self.name, length, i).integers(0, 10, size=5)))
            before = round(depth_of(i, limit) * repeats)
            text = GARBAGE * before + needle_line(key) + GARBAGE * (repeats - before)
            meta = {"depth": round(depth_of(i, limit), 2)}
            yield Example(str(i), INTRO, text, LEAD, (key,), max_new_tokens=8, chat=False, meta=meta)

    def score(self, prediction: str, example: Example) -> float:
        """Exact."""
        return float(prediction.strip()[:5] == example.references[0])


class PaperPasskey(Task):
    """Right when the answer is the number. Other than there depths are evenly spaced, not drawn."""

    name = "passkey-paper"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """Repeated sentences, cut at any character."""
        length, garbage, after = must_have(self, length), GARBAGE.replace("\n", " "), f"\n{INTRO}{LEAD}"
        for i in range(limit):
            key, depth = str(setting.rng(self.name, length, i).integers(1, BELOW)), depth_of(i, limit)
            count = setting.num_tokens(f" {key}")
            room = setting.room(self.name, length, after, max_new_tokens=count)

            def text(size: int, key: str = key, depth: float = depth) -> str:
                endless, before = garbage * (size // len(garbage) + 1), round(depth * size)
                return f"{endless[:before]}\n{needle_line(key)}{endless[: size - before]}"

            context = largest(text, setting, room)
            if context is None:
                raise LengthError(f"{self.name} at {length} tokens has no room for its line; use a greater length.")
            meta = {"depth": round(depth, 2)}
            yield Example(str(i), "", context, after, (key,), max_new_tokens=count, chat=False, meta=meta)

    def score(self, prediction: str, example: Example) -> float:
        """Exact."""
        return float(prediction.strip() == example.references[0])


class Needle(Task):
    """Right when the number occurs in the answer."""

    name, needs = "needle", "text"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """Each time another fact in another part of the text."""
        length = must_have(self, length)
        for i in range(limit):
            rng, depth = setting.rng(self.name, length, i), depth_of(i, limit)
            sentence, question, number = fact(rng, int(rng.integers(len(ROLES) * len(PLACES))))
            room = setting.room(self.name, length, f"\n{sentence}\n", question, max_new_tokens=24)
            start = int(rng.integers(setting.haystack.num_tokens))
            text = setting.haystack.with_inserts(start, room - 8, [(depth, sentence)])  # 8: where cuts tokenise anew
            yield Example(str(i), "", text, question, (number,), max_new_tokens=24, meta={"depth": round(depth, 2)})


def needle_line(key: str) -> str:
    """The passkey's sentence."""
    return f"The pass key is {key}. Remember it. {key} is the pass key.\n"


def fact(rng: np.random.Generator, index: int) -> tuple[str, str, str]:
    """A sentence that no text has, the question for it, and the answer; another subject for another index."""
    subject = f"{ROLES[index % len(ROLES)]} of {PLACES[index // len(ROLES) % len(PLACES)]}"
    number = str(rng.integers(1_000_000, 10_000_000))
    question = f"\n\nWhich number did the {subject} write down? Answer with the number only."
    return f"That evening the {subject} wrote down the number {number}.", question, number


def depth_of(index: int, limit: int) -> float:
    """0 to 1."""
    cells = min(limit, DEPTHS)
    return index % cells / (cells - 1) if cells > 1 else 0.5


def must_have(task: Task, length: int | None) -> int:
    """The length of a made-up text.

    Raises:
        ConfigError: none is given.
    """
    if length is None:
        raise ConfigError(f"{task.name} is made up at a length, and none is given; name some with --lengths.")
    return length


TASKS: tuple[Task, ...] = (Passkey(), PaperPasskey(), Needle())
