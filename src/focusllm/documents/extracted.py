"""What was read of a file: its text, where its pages, chapters or slides begin in it, and what the user should know."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
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
