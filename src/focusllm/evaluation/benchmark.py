"""Published benchmarks: rows of their files or hub data sets, put into their own prompts (`prompts.toml`).

A row that cannot be used is named with its place, left out and counted; the others go on.
"""

from __future__ import annotations

import gzip
import logging
import re
import tomllib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from focusllm.errors import DocumentError, FocusError, first_line
from focusllm.evaluation import metrics
from focusllm.evaluation.example import Example, Setting, Task
from focusllm.json_text import parse_json
from focusllm.training.config import Source
from focusllm.training.corpus import dataset_rows

T = TypeVar("T")
Warn = Callable[[str], None]
logger = logging.getLogger(__name__)


@cache
def prompts(family: str) -> dict[str, Any]:
    """A family's part of `prompts.toml`: by task, the prompt, the greatest answer length, the metric and more."""
    table: dict[str, Any] = tomllib.loads((files("focusllm.evaluation") / "prompts.toml").read_text("utf-8"))[family]
    return table


def around(prompt: str, values: dict[str, Any]) -> tuple[str, str]:
    """What stands in front of the long text and behind it, with the values in their places."""
    before, _, after = prompt.partition("{context}")
    return fill(before, values), fill(after, values)


def fill(prompt: str, values: dict[str, Any]) -> str:
    """The values in the places that are named after them; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda place: str(values.get(place[1], place[0])), prompt)


class Prompted(Task):
    """A task with a prompt of `prompts.toml`."""

    def __init__(self, name: str, about: dict[str, Any], needs: str = "files"):
        self.name, self.about, self.needs = name, about, needs
        self.version = about.get("version", self.version)
        self.metric = about["metric"]
        self._score: metrics.Metric = getattr(metrics, self.metric)

    def example(self, key: object, values: dict[str, Any], context: str, references: list[Any], **more: Any) -> Example:
        """An example from what the prompt names, the long text, and the accepted answers."""
        before, after = around(self.about["prompt"], values)
        return Example(
            id=str(key),
            before=before,
            context=context,
            after=after,
            references=tuple(map(str, references)),
            max_new_tokens=self.about["max_new_tokens"],
            stop=tuple(self.about.get("stop", ())),
            never_empty=self.about.get("never_empty", False),
            chat=self.about.get("chat", True),
            answer_prefix=fill(self.about.get("answer_prefix", ""), values),
            **more,
        )

    def score(self, prediction: str, example: Example) -> float:
        """As the original scores."""
        return self._score(prediction, example.references, example.choices)


class Benchmark(Prompted):
    """A task whose examples are rows of a file.

    Args:
        paths: of the file under the data folder, the likeliest first.
        hub: the data set that has the same rows.
    """

    has_own_lengths = True
    fields: dict[str, type | tuple[type, ...]] = {}  # noqa: RUF012
    """What a row must have."""

    def __init__(self, name: str, about: dict[str, Any], paths: tuple[str, ...], hub: Source):
        super().__init__(name, about)
        self.paths, self.hub = paths, hub

    @abstractmethod
    def read(self, key: str, row: dict[str, Any]) -> Iterator[Example]:
        """The examples of a row.

        Raises:
            LookupError, TypeError, ValueError: a row that is not as it should be.
        """

    def examples(self, length: int | None, limit: int, setting: Setting, warn: Warn | None = None) -> Iterator[Example]:
        """As in the file, in its order."""
        yield from islice(usable(self.rows(setting), self._scorable, warn or setting.warn), limit)

    def _scorable(self, key: str, row: Any) -> list[Example]:
        """The examples of a row, whose answers the metric can take."""
        found = list(self.read(key, checked(row, self.fields)))
        for example in found:
            if not example.references:
                raise ValueError("it has no answer")
            self.score("A 1 1", example)
        return found

    def rows(self, setting: Setting) -> Iterator[tuple[str, str, Any]]:
        """(key, place, row), from the file if it is there, else from the hub if that may be asked."""
        path = setting.file_unless_hub(*self.paths)
        if path is None:
            for number, row in enumerate(dataset_rows(self.hub), 1):
                yield str(number), f"row {number} of {self.hub.path[3:]}", row
        else:
            yield from entries(path)


def usable(
    rows: Iterable[tuple[str, str, Any]], read: Callable[[str, Any], Iterable[T]], warn: Warn = logger.warning
) -> Iterator[T]:
    """What `read` makes of (key, row); rows of which it can make nothing are named, left out and counted.

    Raises:
        DocumentError: it can make nothing of any row.
    """
    good = left_out = 0
    try:
        for key, place, row in rows:
            try:
                found = list(read(key, row))
            except FocusError:  # a package that is missing, say: not the row's fault
                raise
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                left_out += 1
                warn(f"{place} is left out: {first_line(error)}.")
            else:
                good += 1
                yield from found
    finally:
        if left_out:
            warn(f"{left_out} of {left_out + good} rows up to here are left out.")
    if left_out and not good:
        raise DocumentError(f"no row can be used, up to {place}; take the benchmark's own file.")


def entries(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(key, place, row) of the lines of a file, or of the members of the list in a `.json` file; no blank lines.

    Raises:
        DocumentError: it cannot be read, or is a `.json` file that is not JSON.
    """
    try:
        if path.suffix == ".json":
            rows = parse_json(path.read_bytes())
            for number, row in enumerate(rows["data"] if isinstance(rows, dict) else rows, 1):
                yield str(number), f"{path}, entry {number}", row
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield str(number), f"{path}, line {number}", line
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise DocumentError(f"{path} cannot be read ({first_line(error)}); take the benchmark's own file.") from error


def checked(row: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """A row, or the line that it is, with all its fields.

    Raises:
        ValueError: it is not JSON, or lacks a field, or one has another type.
    """
    if isinstance(row, bytes):
        try:
            row = parse_json(row)
        except ValueError as error:
            raise ValueError(f"it is not JSON ({first_line(error)})") from error
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    missing = [name for name in fields if name not in row]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    wrong = [name for name, kind in fields.items() if not isinstance(row[name], kind)]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} are of another type than in the benchmark")
    return row


def largest(build: Callable[[int], str], setting: Setting, room: int) -> str | None:
    """The text of the greatest size that has at most `room` tokens, to about one in two hundred; None: not even 0."""
    size, smaller = 64, -1
    for _ in range(8):
        text = build(size)
        taken = setting.num_tokens(text)
        if taken <= room and (taken >= 0.995 * room or size <= smaller + 1):
            return text
        smaller = max(smaller, size) if taken <= room else smaller
        size = max(smaller, size * room // max(taken, 1), 0)
    while size >= 0 and setting.num_tokens(text := build(size)) > room:
        size -= max(1, size // 100)
    return text if size >= 0 else None


def spread(parts: Sequence[str], lines: Sequence[str], places: Sequence[int]) -> list[str]:
    """The parts, with the lines, in order, in front of the parts at these places (in order too)."""
    out = list(parts)
    for line, place in zip(reversed(lines), reversed(places), strict=True):
        out.insert(place, line)
    return out


def sentences_of(text: str) -> list[str]:
    """Sentences, as far as their ends show, with single spaces."""
    return re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
