"""StreamingLLM (arXiv 2309.17453): the first tokens and a sliding window stay in the cache, all between is dropped.

Positions are those inside the cache (section 3.2): the sinks at 0, 1, ..., the window behind them; keys that stay are
moved when older ones leave. Text is read a block at a time: in a block every token sees the sinks and the `window`
last tokens, itself included, at their true distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focusllm.evaluation.example import LossExample
from focusllm.evaluation.method import Method, Prompt, Step, sum_of_losses
from focusllm.llm import FocusLLM
from focusllm.method.base import layout
from focusllm.method.focus import local_pass, mover
from focusllm.method.kv import KV, Segment, concat


class Streaming(Method):
    """`sinks` tokens and a window of the local budget."""

    name = "streaming"
    defaults = {"sinks": 4}  # noqa: RUF012
    least = {"sinks": 0}  # noqa: RUF012

    def __init__(self, llm: FocusLLM, **options: Any):
        super().__init__(llm, **options)
        self.sinks: int = self.options["sinks"]
        self.block = min(256, self.budget)

    @property
    def sees(self) -> str:
        """Sinks and window."""
        return f"the first {self.sinks} and the last {self.budget:,} tokens"

    def fits(self, num_tokens: int) -> str | None:
        """Always: the cache does not grow."""
        return None

    def start(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Step]:
        """Stream the prompt, then one token at a time."""
        stream = Stream(self)
        logits = stream.read(prompt.ids, 1)
        return logits[-1], lambda token: stream.advance([token], 1)[-1]

    @torch.no_grad()
    def loss(self, example: LossExample) -> tuple[float, int]:
        """Stream the text; every label is predicted from sinks and window."""
        ids = example.text_ids
        logits = Stream(self).read(ids[:-1], example.labels)
        return sum_of_losses(logits, self.tensor(ids)[0, -example.labels :]), example.labels


class Stream:
    """The cache of one text."""

    def __init__(self, method: Streaming):
        self.method = method
        self.kv: KV | None = None

    def read(self, ids: Sequence[int], keep: int) -> Tensor:
        """Logits [keep, V] of the last tokens.

        What is read reaches one window further with each layer, so text before that is skipped, the sinks excepted.
        """
        method, base = self.method, self.method.base
        first, reach = method.sinks, (len(layout(base).layers) + 1) * method.budget + keep
        skipped = max(0, len(ids) - first - reach) // method.block * method.block
        parts = [ids[:first], *(ids[i : i + method.block] for i in range(first + skipped, len(ids), method.block))]
        logits, left = list[Tensor](), len(ids) - skipped
        for part in parts:
            if part:
                wanted = min(len(part), max(1, keep - (left - len(part))))
                logits.append(self.advance(part, wanted))
                left -= len(part)
        return torch.cat(logits)[-keep:]

    def advance(self, ids: Sequence[int], keep: int) -> Tensor:
        """Read some tokens, at most a block: logits [keep, V] of the last ones."""
        method, base = self.method, self.method.base
        held = self.kv.length if self.kv is not None else 0
        start = torch.tensor([held], device=base.device)
        segments = []
        if self.kv is not None:
            place, time = torch.arange(held), held + torch.arange(len(ids))
            seen = (place < method.sinks) | (time[:, None] - place < method.budget)
            segments = [Segment([self.kv], seen.to(base.device))]
        logits, new, _ = local_pass(base, method.tensor(ids), start, segments, keep)
        self.kv = self._dropped(concat([self.kv, new], 2) if self.kv is not None else new)
        return logits[0]

    def _dropped(self, kv: KV) -> KV:
        sinks, extra = self.method.sinks, kv.length - self.method.sinks - self.method.budget
        if extra <= 0:
            return kv
        window = kv.tokens(sinks + extra)
        move = mover(self.method.base, torch.tensor([[-extra]], device=self.method.base.device))
        moved = KV([move(i, keys) for i, keys in enumerate(window.keys)], window.values)
        return concat([kv.tokens(0, sinks), moved], 2)


METHOD = Streaming
