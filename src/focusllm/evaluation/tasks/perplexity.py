"""Perplexity of plain text (--text: a file, a folder, hf:owner/name, or the presets pg19, proof-pile, codeparrot).

perplexity           the last 256 tokens of a text of the given length (FocusLLM, arXiv 2408.11745, section 4.2). Texts
                     end at the end of a document and every 4096 tokens before it
sliding-perplexity   a window of the given length that slides by 256 tokens, each time with the 256 new ones as labels,
                     until the end of the document (Press et al., arXiv 2108.12409, appendix B)

All lengths of a run have the same labels, those of its greatest length that a document has: texts of that length begin
at a document's beginning and later, shorter ones are their ends. No token is put in front of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest

from focusllm.evaluation.example import LengthError, LossExample, Setting, Task

LABELS = 256
APART = 4096


class Perplexity(Task):
    """A few documents give many texts."""

    name, needs, metric, version = "perplexity", "text", "perplexity", 2

    def ends(self, num_tokens: int, length: int) -> Sequence[int]:
        """Where the texts of a document of so many tokens end, in the order in which they are taken."""
        return range(num_tokens, length - 1, -APART)

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[LossExample]:
        """The first text of every document, then the second."""
        if length is None or length <= LABELS:
            raise LengthError(f"{self.name} at length {length} has no text before its labels; use one above {LABELS}.")
        longest = greatest(length, setting)
        found = dict(islice(setting.documents(longest), limit))
        of_each = [[(number, end) for end in self.ends(len(ids), longest)] for number, ids in found.items()]
        in_turn = filter(None, chain.from_iterable(zip_longest(*of_each)))
        for number, end in islice(in_turn, limit):
            yield LossExample(f"{number}-{end}", tuple(found[number][end - length : end].tolist()), LABELS)


class SlidingPerplexity(Perplexity):
    """Every token behind the first of the longest windows is a label once."""

    name = "sliding-perplexity"

    def ends(self, num_tokens: int, length: int) -> Sequence[int]:
        """From the beginning."""
        return range(length, num_tokens + 1, LABELS)


def greatest(length: int, setting: Setting) -> int:
    """The greatest length of the run that a document has, or this one.

    Raises:
        DocumentError: no text is given.
    """
    for longer in sorted((other for other in setting.lengths if other > length), reverse=True):
        try:
            next(setting.documents(longer))
        except LengthError:
            continue
        return longer
    return length


TASKS: tuple[Task, ...] = (Perplexity(), SlidingPerplexity())
