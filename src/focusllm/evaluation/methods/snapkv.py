"""SnapKV (arXiv 2404.14469): the whole prompt is read; then every head keeps what the prompt's end attends to.

A key-value head scores an earlier token by the attention that the last `window` tokens pay it, a mean over them and the
query heads that share the head (as kvpress does for models with such heads), smoothed over neighbours. As many are kept
as make up the local budget with the window, at their true positions; what is read or generated afterwards is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from focusllm.evaluation.example import LossExample
from focusllm.evaluation.method import Prompt, Step, sum_of_losses
from focusllm.evaluation.methods.full import Full
from focusllm.method.attention import attend
from focusllm.method.base import layout, run
from focusllm.method.focus import local_pass
from focusllm.method.kv import KV, Segment, concat
from focusllm.method.scoring import Scoring

NEIGHBOURS = 5
"""Scores are means over so many tokens, as in the authors' code, so that what is kept are pieces of text."""


class SnapKV(Full):
    """Full attention while the prompt is read, the local budget from then on."""

    name = "snapkv"
    defaults = {"window": 64}  # noqa: RUF012
    least = {"window": 1}  # noqa: RUF012

    @property
    def sees(self) -> str:
        """What is kept."""
        return f"{self.budget:,} tokens a head and layer, chosen after all of the text was read"

    def fits(self, num_tokens: int) -> str | None:
        """On models whose layers all have full attention: what a head keeps is not where a window is."""
        if layout(self.base).window is not None:
            return "the base model has layers with a sliding window"
        return super().fits(num_tokens)

    def start(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Step]:
        """Read and compress the prompt, then one token at a time."""
        cache = Compressed(self)
        return cache.read(prompt.ids)[-1], lambda token: cache.advance([token], 1)[-1]

    @torch.no_grad()
    def loss(self, example: LossExample) -> tuple[float, int]:
        """What is before the labels is compressed, the labels are not."""
        ids, cache = self.tensor(example.text_ids)[0], Compressed(self)
        before, labels = ids[: -example.labels].tolist(), ids[-example.labels :]
        logits = [cache.read(before)]
        if len(labels) > 1:
            logits.append(cache.advance(labels[:-1].tolist(), 0))
        return sum_of_losses(torch.cat(logits), labels), len(labels)


class Compressed:
    """The cache of one text."""

    def __init__(self, method: SnapKV):
        self.method, self.kept, self.length = method, KV([], []), 0

    def advance(self, ids: Sequence[int], keep: int) -> Tensor:
        """Read tokens, all of which stay: logits [keep, V] of the last ones; 0: of all."""
        base, segments = self.method.base, [Segment([self.kept])] if self.length else []
        start = torch.tensor([self.length], device=base.device)
        logits, new, _ = local_pass(base, self.method.tensor(ids), start, segments, keep)
        self.kept, self.length = concat([self.kept, new], 2) if self.length else new, self.length + len(ids)
        return logits[0]

    def read(self, ids: Sequence[int]) -> Tensor:
        """Read a text, of which the budget stays: logits [1, V] of its last token."""
        budget, base = self.method.budget, self.method.base
        window = min(self.method.options["window"], budget)
        if len(ids) <= budget:
            return self.advance(ids, 1)
        self.advance(ids[:-window], 1)
        earlier, kept = self.kept, KV([], [])

        def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
            best = scores(query, earlier.keys[layer], key, how).topk(budget - window).indices[..., None]
            for held, old, new in ((kept.keys, earlier.keys, key), (kept.values, earlier.values, value)):
                held.append(torch.cat([old[layer].gather(2, best.expand(-1, -1, -1, new.shape[3])), new], 2))
            return attend(query, key, value, [Segment([earlier]).layer(layer)], None, how)[0]

        places = torch.arange(self.length, len(ids), device=base.device)[None]
        logits = run(base, self.method.tensor(ids[-window:]), places, attention, logits_to_keep=1)
        assert logits is not None
        self.kept, self.length = kept, len(ids)
        return logits[0]


def scores(query: Tensor, earlier: Tensor, key: Tensor, how: Scoring) -> Tensor:
    """What a window's queries [1, H, W, D] pay to earlier keys [1, K, S, D], beside its own [1, K, W, D]: [1, K, S]."""
    by_head = query.reshape(1, key.shape[1], -1, *query.shape[2:])
    own = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    products = how.capped(by_head @ torch.cat([earlier, key], 2)[:, :, None].mT * how.scale)
    products[..., earlier.shape[2] :].masked_fill_(~own, -torch.inf)
    paid = products.float().softmax(-1)[..., : earlier.shape[2]].mean((2, 3))
    return F.avg_pool1d(paid, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)


METHOD = SnapKV
