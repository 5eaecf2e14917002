"""What makes weights of the products of queries and keys, besides the softmax: a layer's own, as the model calls it.

Letters: B rows, H query heads, T new tokens, S earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """What makes weights of the products of queries and keys: a layer's own, in one pass."""

    scale: float
    """Factor of the products."""
    softcap: float | None = None
    """Scores are bent so that they stay below this: cap * tanh(score / cap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[H], a score a head that belongs to no token: a share of the attention that goes nowhere (GPT-OSS)."""
    window: int | None = None
    """A query sees keys at so many positions, its own the last; None: where the pass is no longer, or the layer's
    attention is full."""
    positions: Tensor | None = None
    """Of the new tokens, [B, T], or [1, T] for all rows."""

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but the scale, in this pass."""
        return self.softcap is None and self.sinks is None and self.window is None

    def at(self, positions: Tensor) -> Scoring:
        """The same for other new tokens."""
        return replace(self, positions=positions)

    def capped(self, scores: Tensor) -> Tensor:
        """Scores as they go into the softmax."""
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap


def within(window: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys are in the window of a query: positions [B, T], and [S] or [B, S], to a mask [T, S] or [B, T, S]
    (True: visible, as far as the window is concerned; what is later is the caller's to hide).
    """
    near = keys[..., None, :] > queries[..., None] - window
    return near[0] if len(near) == 1 else near


def with_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Logarithms of softmax sums [B, H, T], the sinks [H] included."""
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
