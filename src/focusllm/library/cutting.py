"""Where a text is cut: at ends of paragraphs that its own content names, so that an edit moves no cut far from it.

A span that is too long for a chunk is cut at the one of its paragraphs' ends with the lowest hash of the text around
it, and both parts in the same way. No cut depends on a count from the beginning: the parts beside an edit are divided
as they were, and only the chunk that the edit lies in is another, rarely one of its neighbours too. The order of cuts
is that of a treap (Seidel and Aragon, 1996), which has one shape however it came about.

    |------------------------------ text ------------------------------|
    |-------------------- 17 -----------------|--------- 88 -----------|     the lowest hash, then the next ones
    |------ 23 ------|---------- 41 ----------|
                               an edit here is nobody else's affair

Knows characters and a function that says what fits. Knows neither tokens nor models.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import xxhash

ENDS = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # of paragraphs
    re.compile(r"\n"),  # of lines
    re.compile(r"""[.!?]["')\]\u2019\u201d]*\s+|[\u3002\uff01\uff1f\uff1b]"""),  # of sentences
    re.compile(r"\s+"),  # of words
    re.compile(r".", re.DOTALL),
)
"""Where a text may be cut, the best places first."""
AROUND = 32
"""Characters on either side of a place that its hash is of."""


def cut(text: str, fits: Callable[[str], bool], least: int, most: int) -> list[int]:
    """Where the pieces of a text end.

    Args:
        fits: whether a piece is short enough; asked of pieces of at most `most` characters. One character always is.
        least: characters that a piece has at least; halved until it is a third of what is cut.

    Returns:
        The ends in ascending order, in characters; the last one is the text's own.
    """
    places = _Places(text)
    ends, spans = list[int](), [(0, len(text))]
    while spans:
        start, stop = spans.pop()
        if stop - start <= 1 or (stop - start <= most and fits(text[start:stop])):
            ends.append(stop)
            continue
        margin = least
        while margin > max(1, (stop - start) // 3):  # by halves, so that it rarely depends on an edit's length
            margin //= 2
        at = places.best(start + margin, stop - margin)
        spans += [(at, stop), (start, at)]  # the first part is cut first
    return ends if text else []


class _Places:
    """Where a text may be cut, each kind of place looked for when it is needed."""

    def __init__(self, text: str):
        self._text = text
        self._known: dict[int, tuple[list[int], list[int]]] = {}  # by kind: places, ascending, and their hashes

    def best(self, first: int, last: int) -> int:
        """The place from first to last that a span is cut at."""
        for kind in range(len(ENDS)):
            at, hashes = self._of(kind)
            low, high = bisect_left(at, first), bisect_right(at, last)
            if low < high:
                return at[min(range(low, high), key=hashes.__getitem__)]
        raise ValueError((first, last))

    def _of(self, kind: int) -> tuple[list[int], list[int]]:
        if kind not in self._known:
            at = [match.end() for match in ENDS[kind].finditer(self._text)]
            around = (self._text[max(0, end - AROUND) : end + AROUND] for end in at)
            self._known[kind] = at, [xxhash.xxh3_64_intdigest(piece.encode()) for piece in around]
        return self._known[kind]
