"""What was read of a file: its text, where its pages, chapters or slides begin in it, and what the user should know."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Parts = Sequence[tuple[int, str]]
"""(first character, label such as `page 3`) of each page, chapter, slide or sheet, in order of their places."""


@dataclass(frozen=True)
class Extracted:
    """The text of a file and what belongs to it. Parts are empty for formats that have none."""

    text: str
    parts: tuple[tuple[int, str], ...] = ()
    remarks: tuple[str, ...] = ()
    """Sentences for the user, without a full stop or the file's name: "pages 2 and 3 have no text (scans?)"."""

    def part_at(self, offset: int) -> str:
        """The label of the part that a character lies in; empty if it lies in none."""
        return part_at(self.parts, offset)


def part_at(parts: Parts, offset: int) -> str:
    """The label of the part that the character `offset` lies in; empty before the first part and without parts."""
    index = bisect_right(parts, offset, key=lambda part: part[0])
    return parts[index - 1][1] if index else ""


def joined(pieces: Iterable[tuple[str, str]], remarks: Iterable[str] = (), between: str = "\n\n") -> Extracted:
    """Pieces of text as one. Whatever an extractor gave becomes Unicode text: halves of characters that stand side by
    side are joined, lone ones become U+FFFD, NUL characters are left out.

    Args:
        pieces: (label, text) in reading order. A piece without a label belongs to the part before it; one without
            text is left out.
    """
    texts: list[str] = []
    parts: list[tuple[int, str]] = []
    length = num_nul = num_halves = 0
    for label, piece in pieces:
        text = piece.replace("\0", "")
        num_nul += len(piece) - len(text)
        try:
            text.encode()
        except UnicodeEncodeError:
            num_before = text.count("\ufffd")
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            num_halves += text.count("\ufffd") - num_before
        if not text.strip():
            continue
        if texts:
            length += len(between)
        if label:
            parts.append((length, label))
        texts.append(text)
        length += len(text)
    said = list(remarks)
    if num_nul:
        said.append(f"{counted(num_nul, 'NUL byte')} left out")
    if num_halves:
        said.append(f"{counted(num_halves, 'half of a character', 'halves of characters')} replaced by U+FFFD")
    return Extracted(between.join(texts), tuple(parts), tuple(said))


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(numbers: Sequence[int], one: str) -> str:
    """Numbers in rising order with their noun, neighbours as ranges: `pages 2, 3 and 7 to 40`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [word for run in runs for word in (map(str, run) if len(run) < 4 else [f"{run[0]} to {run[-1]}"])]
    if len(words) == 1:
        return f"{one if len(numbers) == 1 else one + 's'} {words[0]}"
    return f"{one}s {', '.join(words[:-1])} and {words[-1]}"
