"""What tasks give and methods take: one question on one long text, or one text whose loss is measured. No torch."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from focusllm.documents.text import TOKENS_OF_A_CHARACTER, encode_ids, encode_text, frame_ids
from focusllm.errors import ConfigError, DocumentError
from focusllm.training.config import Source
from focusllm.training.corpus import documents

logger = logging.getLogger(__name__)

PRESETS = {
    "pg19": Source("hf:emozilla/pg19-test", split="test"),
    "proof-pile": Source("hf:hoskinson-center/proof-pile/test/proofpile_test.jsonl.gz"),
    "codeparrot": Source("hf:codeparrot/codeparrot-clean-valid", column="content"),
}
"""Texts of the paper's perplexity tables (section 4.2), as data sets on the hub."""
HAYSTACK_CHARACTERS = 2**25
"""Made-up tasks need no more text than a few times the greatest length."""


class LengthError(ConfigError):
    """A task that cannot be made at a length; at others it can."""


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
    never_empty: bool = False
    """Whether the first token may neither end the answer nor be a stop string; stop strings in front are left out."""
    chat: bool = True
    """Whether the prompt goes into the model's chat template."""
    answer_prefix: str = ""
    """How the answer begins, which the model goes on from: behind the chat template's last token, or behind `after`."""
    choices: tuple[str, ...] = ()
    """Classes or options, where the metric needs them."""
    meta: dict[str, Any] = field(default_factory=dict)
    """More about it, as JSON takes it. Reports look at `depth` (0 to 1), and `document`, which questions may share."""


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
        text: plain text for haystacks and perplexity: a file, a folder, `hf:owner/name`, or one of `PRESETS`.
        hub: whether data sets may be loaded from the hub.
        lengths: all that are measured, for tasks that take the same labels at each.
    """

    tokenizer: Any
    seed: int = 0
    data: Path | None = None
    text: str | None = None
    hub: bool = False
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.notes: dict[str, None] = {}
        """What is to be known about the data, as results keep it; the runner empties it."""
        self._said: set[str] = set()

    def warn(self, message: str) -> None:
        """Note something about the data, and say it if it was not said before."""
        self.notes[message] = None
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

    def rng(self, *parts: object) -> np.random.Generator:
        """A generator of its own for (task, length, example, ...), the same in every run and on every machine."""
        return np.random.default_rng([self.seed, *"/".join(map(str, parts)).encode()])

    def num_tokens(self, text: str) -> int:
        """Length of a text in tokens."""
        return len(encode_ids(self.tokenizer, text))

    def room(self, task: str, length: int, *parts: str, max_new_tokens: int) -> int:
        """Tokens that are left for the long text: a length counts the other parts, chat template and answer too.

        Raises:
            LengthError: none are left.
        """
        frame = sum(map(len, frame_ids(self.tokenizer)))
        needed = frame + sum(map(self.num_tokens, parts)) + max_new_tokens
        if length <= needed:
            raise LengthError(f"{task} at {length} tokens has no room for its text; use a length above {needed}.")
        return length - needed

    @cached_property
    def haystack(self) -> Haystack:
        """The plain text, its first `HAYSTACK_CHARACTERS` if it is longer, tokenised once.

        Raises:
            DocumentError: no text is given or found.
        """
        parts, length = [], 0
        for text in self.texts():
            parts.append(text[: HAYSTACK_CHARACTERS - length])
            length += len(parts[-1])
            if length == HAYSTACK_CHARACTERS:
                break
        return Haystack(self.tokenizer, "\n\n".join(parts))

    def texts(self) -> Iterator[str]:
        """The documents of the plain text, in order; read from the source as far as they are asked for, and kept.

        Raises:
            DocumentError: no text is given or found.
        """
        if self.text is None:
            raise DocumentError("this task needs plain text, and none is given; name a file or folder with --text.")
        yield from self._read
        for text, _ in self._unread:
            if isinstance(text, str) and text.strip():
                self._read.append(text)
                yield text
        if not self._read:
            raise DocumentError(f"{self.text} has no text; name a file, a folder or a data set that has with --text.")

    @cached_property
    def _read(self) -> list[str]:
        return []

    @cached_property
    def _unread(self) -> Iterator[tuple[str | list[int], str]]:
        assert self.text is not None
        return documents(PRESETS.get(self.text) or Source(self.text), self.tokenizer)

    @cached_property
    def _token_ids(self) -> dict[int, np.ndarray]:
        return {}

    def documents(self, least_tokens: int) -> Iterator[tuple[int, np.ndarray]]:
        """Number and token ids of the documents that are long enough; each is tokenised once.

        Raises:
            DocumentError: no text is given. LengthError: no document is so long.
        """
        found = False
        for number, text in enumerate(self.texts()):
            if len(text) * TOKENS_OF_A_CHARACTER < least_tokens:
                continue
            if number not in self._token_ids:
                self._token_ids[number] = np.asarray(encode_ids(self.tokenizer, text), dtype=np.int32)
            if len(self._token_ids[number]) >= least_tokens:
                found = True
                yield number, self._token_ids[number]
        if not found:
            raise LengthError(f"no document of {self.text} has {least_tokens:,} tokens; use a shorter length.")

    def count_fitting(self, items: Callable[[int], str], room: int) -> int:
        """How many of the items 0, 1, ... (alike in length) fit into a room of tokens, joined."""
        each = self.num_tokens("".join(map(items, range(32)))) / 32
        count = int(room / each)
        while count > 0 and (taken := self.num_tokens("".join(map(items, range(count))))) > room:
            count -= max(1, int((taken - room) / each))
        return count

    def file(self, *names: str) -> Path:
        """A benchmark's file under the data folder: the first of these relative paths that exists.

        Raises:
            DocumentError: none does, or no data folder is given.
        """
        if self.data is None:
            raise DocumentError(f"this task needs {names[0]}, and no data folder is given; name it with --data.")
        for name in names:
            if os.path.exists(self.data / name):
                return self.data / name
        raise DocumentError(f"the data folder {self.data} has no {' or '.join(names)}; put the benchmark's file there.")

    def file_unless_hub(self, *names: str) -> Path | None:
        """`file`; None: there is none, and the hub may be asked instead.

        Raises:
            DocumentError: there is none, and the hub may not be asked.
        """
        try:
            return self.file(*names)
        except DocumentError:
            if self.hub:
                return None
            raise


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
        parts = []
        while stop > self.num_tokens:
            parts.append(self._between(start, self.num_tokens))
            start, stop = 0, stop - self.num_tokens
        return "\n\n".join([*parts, self._between(start, stop)])

    def _between(self, start: int, stop: int) -> str:
        return self.text[self._ends[start - 1] if start else 0 : self._ends[stop - 1]]

    def with_inserts(self, start: int, length: int, inserts: Sequence[tuple[float, str]]) -> str:
        """`length` tokens with lines put in at depths from 0 (the beginning) to 1 (the end), given in order."""
        parts, at = [], 0
        for depth, line in inserts:
            place = round(depth * length)
            parts += [self.cut(start + at, place - at), f"\n{line}\n"]
            at = place
        return "".join([*parts, self.cut(start + at, length - at)])


class Task(ABC):
    """What is asked, and how an answer is scored."""

    name: str
    """As the user types it."""
    version: int = 1
    """Raised when prompts, data or scoring change: results of different versions are not compared."""
    needs: str = ""
    """"" (made up), "text" (plain text under --text), "data" (benchmark files under --data), "files" (the same, or the
    hub), or "text and files"."""
    has_own_lengths: bool = False
    """Whether the examples are as long as they are; --lengths does not apply then."""
    metric: str = "accuracy"
    """What the mean score is called in tables; `perplexity` for losses."""

    @abstractmethod
    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example] | Iterator[LossExample]:
        """At most `limit` examples, the same ones in the same order in every run.

        Args:
            length: in tokens, of all that a window must hold: prompt, chat template and answer (see `Setting.room`);
                None for tasks with own lengths.
        """

    def score(self, prediction: str, example: Example) -> float:
        """0 to 1; here: whether an accepted answer occurs in the prediction."""
        return float(any(reference.lower() in prediction.lower() for reference in example.references))
