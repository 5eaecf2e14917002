"""A forward pass of a stock model that attends as we say: what a pass knows, and how attention gets to know it.

transformers calls the attention function that is registered here, by a name that a model's settings have while a pass
is under way, and at no other time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from focusllm.method.scoring import Scoring

ATTENTION_NAME = "focusllm"
FIRST_POSITIONS = 4
"""What stands at so many first positions has the hugest numbers of all, which the rest of a text depends on."""

LayerAttention = Callable[[int, Tensor, Tensor, Tensor, Scoring], Tensor]
"""(layer index, query [B, H, T, D], key and value [B, K, T, D], how they are scored) -> [B, H, T, D]: what a pass
attends to."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass is to do other than the model does by itself."""

    attention: LayerAttention
    candidates: slice
    positions: Tensor
    """[B, T], or [1, T] for all rows."""
    last: int | None
    """The last of them, if layers have windows."""

    @cached_property
    def num_first(self) -> int:
        """How many tokens, from the left of each row, stand at the first positions."""
        leading = (self.positions < FIRST_POSITIONS).all(0).cumprod(0)
        return int(leading.sum())


_pass: ContextVar[Pass | None] = ContextVar("focusllm_pass", default=None)
one_pass_at_a_time = threading.RLock()


class PassEnded(Exception):
    """Raised by a `LayerAttention` that needs nothing more of a pass without logits."""


NO_TOKENS = slice(0, 0)


def candidate_tokens() -> slice:
    """Which tokens of the pass under way are candidates, along the sequence; none outside a pass."""
    current = _pass.get()
    return current.candidates if current is not None else NO_TOKENS


def in_pass() -> bool:
    """Whether a pass is under way in this thread."""
    return _pass.get() is not None


def first_tokens(input: Tensor) -> int:
    """How many tokens, from the left of each row of a layer's input, stand at the first positions of a text.

    Args:
        input: [B, T, ...]; of other tokens than the pass under way has (what the head is given, say) none do. Where
            rows are not told apart, [B * T, ...] in any order, all may.
    """
    current = _pass.get()
    if current is None or (input.dim() == 3 and input.shape[1] != current.positions.shape[1]):
        return 0
    return current.num_first if input.dim() == 3 or not current.num_first else input.shape[-2]


@contextmanager
def entered(model: nn.Module, this: Pass) -> Iterator[None]:
    """Route the model's attention to ours for one pass. Passes of several threads take turns."""
    config: Any = model.config
    with one_pass_at_a_time:
        before, token = config._attn_implementation, _pass.set(this)
        config._attn_implementation = ATTENTION_NAME
        try:
            yield
        finally:
            config._attn_implementation = before
            _pass.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls inside a pass (its AttentionInterface).

    No mask function is registered under this name, so transformers builds none: the masks are ours.
    """
    this = _pass.get()
    if this is None:
        raise RuntimeError("attention 'focusllm' is for passes of focusllm only; call focusllm.method.base.run.")
    if attention_mask is not None:  # Doge makes one from its values
        raise ValueError("a layer has a mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    limits = sliding_window is not None and this.last is not None and this.last >= sliding_window
    how = Scoring(scale, softcap, s_aux, sliding_window if limits else None, this.positions)
    out = this.attention(module.layer_idx, query, key, value, how)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None  # in one piece, as transformers' own functions give it


AttentionInterface.register(ATTENTION_NAME, _attention)
