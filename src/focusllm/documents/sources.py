"""What a document is made of: a text, a file, or the files of a folder or a pattern, before it is tokens.

Many small files are one text, in which a line with its name heads each; so they share chunks, and `pieces` says which
file, and where in it, a part of the text is.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from focusllm.documents.extracted import Extracted, part_at
from focusllm.documents.folders import find_files, is_pattern
from focusllm.documents.readers import DOCUMENT_SUFFIXES, read_file
from focusllm.errors import DocumentError
from focusllm.files import digest_of

STDIN = "-"
SHOWN_REMARKS = 5


@dataclass(frozen=True)
class File:
    """A file in the text of a document; all in characters of that text."""

    name: str
    start: int
    """Where the line with its name begins."""
    text_start: int
    """Where its own text begins: offset 0 of its citations."""
    text_end: int
    parts: tuple[tuple[int, str], ...] = ()
    """(first character in the file's own text, label) of its pages, chapters or slides."""
    path: str | None = None
    """None: it has no place on this machine, or the user has named it."""


@dataclass(frozen=True)
class Piece:
    """A part of a file: characters of the file's own text, half-open."""

    file: File
    start: int
    end: int
    share: float
    """Of the span that it was cut from, the lines with names included."""

    @property
    def part(self) -> str | None:
        """The pages, chapters or slides that it lies in."""
        first, last = (part_at(self.file.parts, at) for at in (self.start, max(self.start, self.end - 1)))
        named = [label for label in dict.fromkeys((first, last)) if label]
        return " to ".join(named) or None


@dataclass(frozen=True)
class Source:
    """A text that can be read as a document."""

    name: str
    text: str
    files: tuple[File, ...]
    remarks: tuple[str, ...] = ()
    """What the user should know, as sentences."""
    path: str | None = None
    is_set: bool = False
    """Whether it is of a folder or a pattern: its files have names of their own then."""
    digest: str | None = None
    """Of the file's bytes as they were before it was read; None: it is not of one file."""

    @property
    def whole(self) -> File:
        """The file, folder or pattern that it is of."""
        return File(self.name, 0, 0, len(self.text), path=self.path)

    def named(self, name: str | None) -> Source:
        """The same by another name."""
        if name is None or name == self.name:
            return self
        files = self.files if self.is_set else tuple(replace(file, name=name, path=None) for file in self.files)
        return replace(self, name=name, files=files)


def of_text(text: str, name: str = "text") -> Source:
    """A text itself."""
    return Source(name, text, (File(name, 0, 0, len(text)),))


def of_extracted(found: Extracted, name: str) -> Source:
    """What was read of a file that has no place on this machine."""
    remarks = tuple(f"{name}: {remark}." for remark in found.remarks)
    return Source(name, found.text, (File(name, 0, 0, len(found.text), found.parts),), remarks)


def open_source(path: str | Path, encoding: str | None = None) -> Source:
    """A file, the files in a folder, those that a pattern names (`src/**/*.py`), or standard input (`-`).

    Args:
        encoding: of text files; None: found out.

    Raises:
        DocumentError: there is no such file, or nothing in it that can be read.
    """
    if str(path) != STDIN and (os.path.isdir(path) or is_pattern(path)):
        return _open_set(path, encoding)
    digest = digest_of(Path(path)) if os.path.isfile(path) and os.access(path, os.R_OK) else None
    found = read_file(path, encoding)
    name = "stdin" if str(path) == STDIN else _printable(Path(path).name)
    place = None if str(path) == STDIN else os.path.abspath(path)
    file = File(name, 0, 0, len(found.text), found.parts, place)
    remarks = tuple(f"{name}: {remark}." for remark in found.remarks)
    return Source(name, found.text, (file,), remarks, place, digest=digest)


def _open_set(path: str | Path, encoding: str | None) -> Source:
    folder, names = find_files(path)
    texts: list[str] = []
    files: list[File] = []
    remarks: list[str] = []
    left_out: list[str] = []
    position = 0
    for name in names:
        path_of, shown = folder / name, _printable(name)
        try:
            if not path_of.is_file():
                raise DocumentError(f"{shown} is no file")
            if not path_of.stat().st_size:
                continue
            found = read_file(path_of, encoding)
        except (DocumentError, OSError) as error:
            left_out.append(str(error).split("; ")[0].rstrip(".").replace(str(path_of), shown))
            continue
        remarks += [f"{shown}: {remark}." for remark in found.remarks]
        text_start = position + len(heading := f"=== {shown} ===\n")
        text_end = text_start + len(found.text)
        files.append(File(shown, position, text_start, text_end, found.parts, os.path.abspath(path_of)))
        texts += [heading, found.text, "\n" if found.text.endswith("\n") else "\n\n"]
        position = text_end + len(texts[-1])
    if left_out:
        more = f", and {len(left_out) - SHOWN_REMARKS} more" if len(left_out) > SHOWN_REMARKS else ""
        remarks.append(f"Files left out: {'; '.join(left_out[:SHOWN_REMARKS])}{more}.")
    if not files:
        reason = f" ({'; '.join(left_out[:SHOWN_REMARKS])})" if left_out else ""
        raise DocumentError(f"{path} has no file with text{reason}; hidden and ignored files are not read.")
    pattern = is_pattern(path)
    name = str(path) if pattern else folder.resolve().name or str(folder)
    whole = None if pattern else os.path.realpath(folder)
    return Source(_printable(name), "".join(texts), tuple(files), tuple(remarks), whole, is_set=True)


def names_a_file(text: str) -> bool:
    """Whether a string names a file or a folder, or looks as if it should; else it is a text."""
    if len(text) > 1000 or "\n" in text:
        return False
    return os.path.exists(text) or Path(text).suffix.lower() in DOCUMENT_SUFFIXES


def pieces(files: Sequence[File], start: int, end: int) -> Iterator[Piece]:
    """The parts of files that the characters from `start` to `end` of their document are; what stands between two
    files belongs to the first, the line with its name to a file.
    """
    first = bisect_right(files, start, key=lambda file: file.start) - 1
    stop = max(first + 1, bisect_left(files, end, key=lambda file: file.start))
    for number in range(first, stop):
        file = files[number]
        length = file.text_end - file.text_start
        begin, stop_at = (min(max(at - file.text_start, 0), length) for at in (start, end))
        behind = files[number + 1].start if number + 1 < stop else end
        share = (behind - max(start, file.start)) / (end - start) if stop > first + 1 else 1.0
        yield Piece(file, begin, stop_at, share)


def short_names(files: Sequence[File]) -> list[str]:
    """The files' names, with as many of the folders above as tell files of one name apart."""
    places: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for file in files:
        places[file.name].add(_parts(file))
    found = []
    for file in files:
        parts, count = _parts(file), len(Path(file.name).parts)
        others = places[file.name] - {parts}
        while count < len(parts) and any(path[-count:] == parts[-count:] for path in others):
            count += 1
        found.append(_printable(str(Path(*parts[-count:]))) if others else file.name)
    return found


def _parts(file: File) -> tuple[str, ...]:
    return Path(file.path or file.name).parts


def _printable(name: str) -> str:
    """A file's name in one line, whatever its bytes are."""
    return "".join(char if char.isprintable() else "?" for char in name)
