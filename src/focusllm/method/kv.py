"""Keys and values as plain tensors, and the containers that the passes hand each other.

Letters: L layers, B batch (rows), H query heads, K key-value heads, T tokens, D head dimension.
Knows tensors only: no model, no tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def lasting(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function, without gradients, whose tensors outlive the call.

    Called within `torch.inference_mode()` it leaves that mode: what is made there cannot be changed in place, or used
    in training, after it.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


@dataclass
class KV:
    """Keys (rotated) and values of a run of tokens: per layer one tensor each, [B, K, T, D]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """T, in tokens."""
        return self.keys[0].shape[2]

    @property
    def num_rows(self) -> int:
        """B."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def map(self, function: Callable[[Tensor], Tensor]) -> KV:
        """The same function on every tensor."""
        return KV([function(key) for key in self.keys], [function(value) for value in self.values])

    def rows(self, start: int, stop: int) -> KV:
        """Rows start..stop, as views."""
        return self.map(lambda tensor: tensor[start:stop])

    def tokens(self, start: int, stop: int | None = None) -> KV:
        """Tokens start..stop of every row, as views."""
        return self.map(lambda tensor: tensor[:, :, start:stop])

    def empty_like(self, num_rows: int, length: int) -> KV:
        """Uninitialised tensors of the same layers, heads, type and device."""
        return self.map(lambda t: t.new_empty(num_rows, t.shape[1], length, t.shape[3]))

    def write(self, row: int, token: int, source: KV) -> None:
        """Copy `source` in place, its first row and token going to `row` and `token`."""
        for target, given in zip((*self.keys, *self.values), (*source.keys, *source.values), strict=True):
            target[row : row + given.shape[0], :, token : token + given.shape[2]] = given


def concat(parts: Sequence[KV], dim: int) -> KV:
    """Join along rows (dim 0) or tokens (dim 2)."""
    layers = range(len(parts[0].keys))
    return KV(
        [torch.cat([part.keys[i] for part in parts], dim) for i in layers],
        [torch.cat([part.values[i] for part in parts], dim) for i in layers],
    )


class GrowingKV:
    """Preallocated keys and values that tokens are appended to in place, all rows alike.

    `keys` and `values` are the whole room, [B, K, room, D] a layer; the first `length` tokens count, the rest is zero.
    The room grows by `STEP` tokens at a time: attention runs over all of it, so little of it may be idle, and copying
    once in `STEP` tokens costs little beside reading it for each.
    """

    STEP = 64

    def __init__(self, like: KV, num_rows: int, num_tokens: int = 0):
        room = self.room(num_tokens)
        self._kv = like.map(lambda t: t.new_zeros(num_rows, t.shape[1], room, t.shape[3]))
        self.length = 0

    @classmethod
    def room(cls, num_tokens: int) -> int:
        """How many tokens are made room for when there are so many."""
        return (num_tokens // cls.STEP + 1) * cls.STEP

    @property
    def keys(self) -> list[Tensor]:
        """Keys of the whole room."""
        return self._kv.keys

    @property
    def values(self) -> list[Tensor]:
        """Values of the whole room."""
        return self._kv.values

    @property
    def num_rows(self) -> int:
        """B."""
        return self._kv.num_rows

    @property
    def nbytes(self) -> int:
        """Bytes held, the idle room included."""
        return self._kv.nbytes

    def append(self, tokens: KV) -> None:
        """Append the same number of tokens to all rows."""
        if self.length + tokens.length > self._kv.length:
            self._grow(self.length + tokens.length)
        self._kv.write(0, self.length, tokens)
        self.length += tokens.length

    def fill_rows(self, row: int, tokens: KV, first: int = 0) -> None:
        """Write tokens of some rows from `first` on; they count when all rows are written and `length` is set."""
        self._kv.write(row, first, tokens)

    def filled(self) -> KV:
        """What counts, as views [B, K, length, D]."""
        return self._kv.tokens(0, self.length)

    def rows(self, start: int, stop: int) -> KV:
        """What counts of some rows, as views."""
        return self.filled().rows(start, stop)

    def copy(self) -> GrowingKV:
        """An independent copy."""
        twin = copy.copy(self)
        twin._kv = self._kv.map(torch.clone)
        return twin

    def move(self, move: Callable[[int, Tensor], Tensor]) -> None:
        """Put the same tokens at other positions: a function of (layer, keys), see `focus.mover`."""
        for layer, keys in enumerate(self._kv.keys):
            self._kv.keys[layer] = move(layer, keys)

    def _grow(self, num_tokens: int) -> None:
        """A layer after another: no more than one is held twice."""
        room = self.room(num_tokens)
        for tensors in (self._kv.keys, self._kv.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(*old.shape[:2], room, old.shape[3])
                tensors[layer][:, :, : self.length] = old[:, :, : self.length]


Block = tuple[Tensor, Tensor, int, Tensor | None]
"""Keys and values [rows, K, room, D]; how many of their tokens count (the room behind them holds finite numbers); and
which of these are seen [S], None: all."""


class LayerSegment(NamedTuple):
    """One layer of a `Segment`: blocks along the rows, and what that says of masks and positions."""

    blocks: Sequence[Block]
    mask: Tensor | None = None
    positions: Sequence[Tensor] | None = None


@dataclass
class Segment:
    """A run of earlier tokens that a pass attends to: blocks that lie one after another along the batch.

    Block sizes along the batch add up to B; their lengths may differ, and a block may be empty (no tokens).
    `mask` ([T, S] or [B, T, S], True where a query sees a key) needs a single block; without it all is visible.
    `shown` says of each block which of its tokens [S] are seen at all (None: all are); the others are only scored.
    `positions` says of each block where its keys are [S], for layers with a window; without it the segments of a pass
    lie one behind another from position 0, and the new tokens behind them.
    """

    blocks: Sequence[KV | GrowingKV]
    mask: Tensor | None = None
    shown: Sequence[Tensor | None] | None = None
    positions: Sequence[Tensor] | None = None

    def layer(self, index: int) -> LayerSegment:
        """Keys, values, length and what is shown of one layer, block by block; the mask; the positions."""
        shown = self.shown or [None] * len(self.blocks)
        blocks = zip(self.blocks, shown, strict=True)
        held = [(kv.keys[index], kv.values[index], kv.length, seen) for kv, seen in blocks]
        return LayerSegment(held, self.mask, self.positions)


def hidden_from_first(candidates: Segment, num_tokens: int) -> Segment:
    """A local pass that begins with a sink, at position 0: it does not see the candidates, which are behind it."""
    (block,) = candidates.blocks
    device = block.keys[0].device
    mask = torch.ones(num_tokens, block.length, dtype=torch.bool, device=device)
    mask[0] = False
    return replace(candidates, mask=mask, positions=[torch.arange(1, block.length + 1, device=device)])


def behind_sink(candidates: Segment, local: Segment) -> tuple[Segment, Segment]:
    """A local pass that goes on: where candidates and kept local tokens are if the first of these is a sink.

    That one is at position 0, the candidates behind it, and behind those the others.
    """
    at_slots, at_tokens = [], []
    for kv, kept in zip(candidates.blocks, local.blocks, strict=True):
        places = torch.arange(1, kv.length + kept.length, device=kv.keys[0].device)
        at_slots.append(places[: kv.length])
        at_tokens.append(F.pad(places[kv.length :], (1, 0)))
    return replace(candidates, positions=at_slots), replace(local, positions=at_tokens)
