"""What tasks give and methods take: one question on one long text, or one text whose loss is measured. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from focusllm.errors import ConfigError, DocumentError
from focusllm.readers import read_text
from focusllm.text import encode_ids, encode_text


@dataclass(frozen=True)
class Example:
    """A question on a long text. The prompt is `before + context + after`, in the chat template if `chat`."""

    id: str
    """Unique inside a task and length, and the same in every run."""
    before: str
    """Instruction in front of the long text; may be empty."""
    context: str
    """The long text."""
    after: str
    """Question or instruction behind it."""
    references: tuple[str, ...]
    """Accepted answers."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Strings at which the answer ends (what comes before the first of them counts)."""
    chat: bool = True
    """Whether the prompt goes into the model's chat template."""
    choices: tuple[str, ...] = ()
    """Classes or options, where the metric needs them."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What reports group by (depth, dataset, ...), as JSON takes it."""


@dataclass(frozen=True)
class LossExample:
    """A text whose last tokens' loss is measured."""

    id: str
    text_ids: tuple[int, ...]
    labels: int
    """How many tokens at the end are labels; the others are given."""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Setting:
    """What a task may draw on.

    Args:
        tokenizer: counts tokens; lengths are in its tokens.
        seed: of everything that is drawn.
        data: folder with the benchmarks' files, in the originals' formats.
        text: file or folder of plain text, for haystacks and perplexity.
        hub: whether data sets may be loaded from the hub.
    """

    tokenizer: Any
    seed: int = 0
    data: Path | None = None
    text: Path | None = None
    hub: bool = False

    def rng(self, *parts: object) -> np.random.Generator:
        """A generator of its own for (task, length, example, ...), the same in every run and on every machine."""
        return np.random.default_rng([self.seed, *"/".join(map(str, parts)).encode()])

    def num_tokens(self, text: str) -> int:
        """Length of a text in tokens."""
        return len(encode_ids(self.tokenizer, text))

    @cached_property
    def haystack(self) -> Haystack:
        """The plain text, tokenised once.

        Raises:
            DocumentError: no text is given or found.
        """
        return Haystack(self.tokenizer, "\n\n".join(read_text(path) for path in self.text_files()))

    def text_files(self) -> list[Path]:
        """The files of `text`, in order.

        Raises:
            DocumentError: no text is given or found.
        """
        if self.text is None:
            raise DocumentError("this task needs plain text, and none is given; name a file or folder with --text.")
        files = sorted(self.text.rglob("*.txt")) if self.text.is_dir() else [self.text]
        if not files:
            raise DocumentError(f"the folder {self.text} has no .txt files; name one that has with --text.")
        return files

    def file(self, *names: str) -> Path:
        """A benchmark's file under the data folder: the first of these relative paths that exists.

        Raises:
            DocumentError: none does, or no data folder is given.
        """
        if self.data is None:
            raise DocumentError(f"this task needs {names[0]}, and no data folder is given; name it with --data.")
        for name in names:
            if (self.data / name).exists():
                return self.data / name
        raise DocumentError(f"the data folder {self.data} has no {' or '.join(names)}; put the benchmark's file there.")


class Haystack:
    """A long text that can be cut at any token without tokenising it again."""

    def __init__(self, tokenizer: Any, text: str):
        self.text = text
        self._ends = [stop for _, stop in encode_text(tokenizer, text).spans]

    @property
    def num_tokens(self) -> int:
        """Length in tokens."""
        return len(self._ends)

    def cut(self, start: int, length: int) -> str:
        """`length` tokens from token `start` on, going round at the end of the text."""
        if length <= 0:
            return ""
        start %= self.num_tokens
        stop = start + length
        if stop > self.num_tokens:
            return self.cut(start, self.num_tokens - start) + "\n\n" + self.cut(0, stop - self.num_tokens)
        return self.text[self._ends[start - 1] if start else 0 : self._ends[stop - 1]]


class Task(ABC):
    """What is asked, and how an answer is scored."""

    name: str
    """As the user types it."""
    version: int = 1
    """Raised when prompts, data or scoring change: results of different versions are not compared."""
    needs: str = ""
    """"" (made up), "text" (plain text under --text) or "files" (benchmark files under --data, or the hub)."""
    has_own_lengths: bool = False
    """Whether the examples are as long as they are; --lengths does not apply then."""
    metric: str = "accuracy"
    """What the mean score is called in tables; `perplexity` for losses."""

    @abstractmethod
    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example] | Iterator[LossExample]:
        """At most `limit` examples, the same ones in the same order in every run.

        Args:
            length: of the prompt, in tokens, without chat template and answer; None for tasks with own lengths.
        """

    def score(self, prediction: str, example: Example) -> float:
        """0 to 1; here: whether an accepted answer occurs in the prediction."""
        return float(any(reference.lower() in prediction.lower() for reference in example.references))


def check_room(task: str, length: int, needed: int) -> int:
    """Tokens that are left for the long text when `needed` are taken by the rest.

    Raises:
        ConfigError: none are.
    """
    if length <= needed:
        raise ConfigError(f"{task} at {length} tokens has no room for its text; use a length above {needed}.")
    return length - needed
