"""Where sentences begin: what a citation points at. Lines count as sentences where a text has lines of its own."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

LONGEST = 600
"""Characters: what has no end by then is cut at a space."""
TITLES = (
    "Mr",
    "Mrs",
    "Ms",
    "Dr",
    "St",
    "Prof",
    "Rev",
    "Col",
    "Gen",
    "Capt",
    "Lt",
    "No",
    "vs",
    "Sr",
    "Jr",
    "cf",
    "[A-Z]",
)
"""What a full stop behind it does not end."""
END = re.compile(
    "".join(rf"(?<!\b{title})" for title in TITLES) + r"[.!?\u2026][\"'\u2019\u201d)\]]*\s+(?=[^a-z\s])"
    r"|[\u3002\uff01\uff1f][\u300d\u300f\u201d]*\s*|\n\s*\n\s*"
)
LINE = re.compile(r"\n\s*")
WRAPPED, FULL_LINE = 0.3, 40
"""A text is taken to be wrapped, its lines no units, if such a share of its lines goes on with a small letter,
unindented, behind a line of so many characters."""


def sentence_starts(text: str) -> np.ndarray:
    """The first character of every sentence [n], ascending; 0 is the first of them."""
    breaks, lines = [match.end() for match in END.finditer(text)], list(LINE.finditer(text))
    befores = [0, *(line.end() for line in lines)]
    goes_on = sum(
        line.group() == "\n" and text[line.end() : line.end() + 1].islower() and line.start() - before >= FULL_LINE
        for line, before in zip(lines, befores, strict=False)
    )
    if goes_on <= WRAPPED * len(lines):
        breaks += [line.end() for line in lines]
    starts = [0]
    for at in sorted({*breaks, len(text)}):
        while at - starts[-1] > LONGEST:
            space = text.rfind(" ", starts[-1] + 1, starts[-1] + LONGEST)
            starts.append(space + 1 if space > 0 else starts[-1] + LONGEST)
        if starts[-1] < at < len(text):
            starts.append(at)
    return np.array(starts, np.int64)


def sentences_in(text: str) -> list[tuple[int, int, int]]:
    """(first character, behind the last, where the next one begins) of every sentence that is no white space."""
    starts = [*sentence_starts(text).tolist(), len(text)]
    bounds = [(start, start + len(text[start:behind].rstrip()), behind) for start, behind in pairwise(starts)]
    return [found for found in bounds if found[1] > found[0]]
