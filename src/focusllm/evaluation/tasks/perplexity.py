"""Perplexity of plain text (--text: a file, a folder, hf:owner/name, or the presets pg19, proof-pile, codeparrot).

perplexity           the last 256 tokens of a text of the given length (FocusLLM, arXiv 2408.11745, section 4.2). Texts
                     end at the end of a document and every 4096 tokens before it, so all lengths have the same labels
sliding-perplexity   a window of the given length that slides by 256 tokens from the beginning of each document, each
                     time with the 256 new ones as labels (Press et al., arXiv 2108.12409, appendix B)

Documents that are shorter than the length are left out. No token is put in front of a text.
"""

from __future__ import annotations

from collections.abc import Iterator

from focusllm.errors import ConfigError
from focusllm.evaluation.example import LossExample, Setting, Task

LABELS = 256
APART = 4096


class Perplexity(Task):
    """Texts that end where their document ends, and earlier; a few documents give many texts."""

    name, needs, metric = "perplexity", "text", "perplexity"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[LossExample]:
        """Document by document, then the next earlier end of each."""
        if length is None or length <= LABELS:
            raise ConfigError(f"{self.name} at length {length} has no text before its labels; use one above {LABELS}.")
        found = []
        for number, ids in setting.documents(length):
            found.append((number, ids))
            if len(found) == limit:
                break
        for back in range(0, max(len(ids) for _, ids in found) - length + 1, APART):
            for number, ids in found:
                end = len(ids) - back
                if end >= length and limit > 0:
                    yield LossExample(f"{number}-{end}", tuple(ids[end - length : end].tolist()), LABELS)
                    limit -= 1


class SlidingPerplexity(Perplexity):
    """Every token is a label once, those of the first window excepted."""

    name = "sliding-perplexity"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[LossExample]:
        """Window by window, document by document."""
        if length is None or length <= LABELS:
            raise ConfigError(f"{self.name} at length {length} has no text before its labels; use one above {LABELS}.")
        for number, ids in setting.documents(length):
            for end in range(length, len(ids) + 1, LABELS):
                if limit == 0:
                    return
                yield LossExample(f"{number}-{end}", tuple(ids[end - length : end].tolist()), LABELS)
                limit -= 1


TASKS: tuple[Task, ...] = (Perplexity(), SlidingPerplexity())
