"""Retrieval: passages of the text that share words with the question (BM25), in their order, in the base's window
(`to=base`, the default) or in the local budget (`to=local`).

Neighbouring passages share half of their tokens, so that what is no longer than that is whole in one of them. Searched
with the question (what stands behind the text); for losses with the last tokens of the given text, as many as the local
budget holds, or half of it if all is to fit there. Words are those of bm25s, and single Chinese, Japanese and Korean
characters. Where no passage has any of them, the first are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from focusllm.documents.words import WordIndex
from focusllm.errors import ConfigError
from focusllm.evaluation.example import LossExample
from focusllm.evaluation.method import Prompt, ShortenedMethod


class Retrieval(ShortenedMethod):
    """Passages of `passage` tokens, the best first, as many as fit."""

    name = "retrieval"
    version = 2
    defaults = {"passage": 128, **ShortenedMethod.defaults}  # noqa: RUF012
    least = {"passage": 2}  # noqa: RUF012

    @property
    def sees(self) -> str:
        """Passages."""
        return f"passages of {self.options['passage']} tokens, {self.size:,} with question, template and answer"

    def choose(self, prompt: Prompt, room: int) -> list[int]:
        """The prompt with the best passages in the place of its long text."""
        own = len(prompt.ids) - len(prompt.context)
        if own > room:
            raise ConfigError(
                f"question and template take {own} tokens, but {max(room, 0)} are left beside the answer."
            )
        context = self._best(prompt.context, prompt.query, room - own)
        return [*prompt.start, *prompt.before, *context, *prompt.after, *prompt.end]

    def choose_text(self, example: LossExample) -> Sequence[int]:
        """The best passages, then the end of the text."""
        near = max(self.budget if self.options["to"] == "base" else self.budget // 2, example.labels + 1)
        far, local = list(example.text_ids[:-near]), list(example.text_ids[-near:])
        if self.size < len(local):
            raise ConfigError(f"{example.labels} labels leave no room for passages in {self.size} tokens.")
        query = self.decode(local[: -example.labels])
        return [*self._best(far, query, self.size + 1 - len(local)), *local]

    def _best(self, ids: list[int], query: str, room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        size = self.options["passage"]
        passages = [range(start, min(start + size, len(ids))) for start in range(0, len(ids), size // 2)]
        texts = [self.decode(ids[passage.start : passage.stop]) for passage in passages]
        chosen: set[int] = set()
        for index in np.argsort(-WordIndex(texts).scores(query), kind="stable"):
            new = [place for place in passages[index] if place not in chosen]
            if len(chosen) + len(new) <= room:
                chosen.update(new)
        return [ids[place] for place in sorted(chosen)]


METHOD = Retrieval
