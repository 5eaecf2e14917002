"""What a request knows: its far context, shared, and what is its own, changed as it is decoded."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from focusllm.decoding.refresh import HotRows
from focusllm.memory.chunks import ChunkBlock
from focusllm.memory.lookup import Heads
from focusllm.method.kv import KV, GrowingKV, lasting


@dataclass(frozen=True)
class OpenSpan:
    """Tokens of a chunk that are open: half-open, counted from the chunk's first."""

    chunk: int
    first: int
    stop: int

    @property
    def length(self) -> int:
        """In tokens."""
        return self.stop - self.first


@dataclass(frozen=True, eq=False)
class Opened:
    """What of the far context is open: a copy, keys moved to where they are seen."""

    spans: list[OpenSpan]
    """In the order of the text."""
    far: KV
    """The shared start and the pieces [1, K, T, D] a layer, at consecutive positions."""
    looked_at: int
    """How long the local context was when the chunks were looked up."""


@dataclass(frozen=True, eq=False)
class Watched:
    """What one token paid to what it saw, by the layers of the look-up heads."""

    spans: list[OpenSpan]
    opened: Tensor
    """To the tokens of the pieces, one behind another."""
    local: Tensor
    """To the tokens that the local context began with; those that became chunks got nothing."""


@dataclass(eq=False)
class Request:
    """All that one request knows.

    Args:
        blocks: the far context, in order; empty: the base model alone.
        local_ids: the local context; generated tokens are appended.
        prompt_length: most tokens of the dynamic prompt; None: as configured.
        heads: by which chunks are chosen that the local context may become; None: as the other chunks are.
        word_scores: what the question's words are worth in each chunk of the blocks [R], where there is a text to count
            words in; chunks are chosen by both.
    """

    blocks: list[ChunkBlock]
    local_ids: list[int]
    prompt_length: int | None = None
    heads: Heads | None = None
    word_scores: Tensor | None = None

    tails: list[GrowingKV] = field(default_factory=list)
    """Per block, what its rows hold behind the chunk: ordinary prompt and generated tokens."""
    hot: list[HotRows] = field(default_factory=list)
    """The rows that are read at every token, where those are not all of them, or were brought from elsewhere."""
    candidates: KV | None = None
    """The present candidate set [1, K, R, D] a layer, keys at their slots; changed in place."""
    local_kv: GrowingKV | None = None
    """The local context's keys and values [1, K, T, D] a layer (cached decoding only)."""
    plain_kv: DynamicCache | None = None
    """The base model's own cache, while there is no far context."""
    opened: Opened | None = None
    """What of the far context is open, where chunks are opened instead of condensed."""
    num_generated: int = 0
    """Tokens that were appended since it began."""
    question_ids: list[int] = field(default_factory=list)
    """What opened chunks are chosen by beside the newest tokens, where a question was asked (`prompt_length`)."""
    watched: list[Watched] = field(default_factory=list)
    """Where chunks are opened: what each token paid from which the next one was decoded."""
    row_ids: list[int] = field(default_factory=list)
    """What rows that are up to date have read behind their chunk: dynamic prompt and generated tokens. The last one was
    the candidate; the next step makes it an ordinary token."""
    paid: Tensor | None = None
    """Attention paid to each chunk's candidate, or that it would have got if it were seen [R]: summed over the tokens
    decoded so far."""
    paid_local: Tensor | None = None
    """The same of each token that the local context began with [T]; those that became chunks get no more."""
    local_start: tuple[int, int] = (0, 0)
    """The first token that the local context still has of those: its index now, and at the beginning."""

    @property
    def num_chunks(self) -> int:
        """R."""
        return sum(block.num_chunks for block in self.blocks)

    @property
    def refreshed_slots(self) -> list[int]:
        """The slots of the rows that are read at every token, in the order in which they are read."""
        return [slot for rows in self.hot for slot in rows.slots] if self.hot else list(range(self.num_chunks))

    @property
    def nbytes(self) -> int:
        """Bytes that are this request's own: the chunks are not counted."""
        own = [*self.tails, *self.hot, self.local_kv, self.candidates, self.opened.far if self.opened else None]
        return sum(part.nbytes for part in own if part is not None)

    @lasting
    def fork(self) -> Request:
        """An independent request in the same state; the chunks are shared."""
        twin = copy.copy(self)
        twin.blocks, twin.local_ids = list(self.blocks), list(self.local_ids)
        twin.row_ids, twin.watched = list(self.row_ids), list(self.watched)
        # Beside hot rows tails are read, never written.
        twin.tails = list(self.tails) if self.hot else [tail.copy() for tail in self.tails]
        twin.hot = [rows.copy() for rows in self.hot]
        twin.candidates = self.candidates.map(torch.clone) if self.candidates is not None else None
        twin.local_kv = self.local_kv.copy() if self.local_kv is not None else None
        twin.plain_kv = copy.deepcopy(self.plain_kv)
        twin.paid = self.paid.clone() if self.paid is not None else None
        twin.paid_local = self.paid_local.clone() if self.paid_local is not None else None
        return twin

    def count_attention(self, chunks: Tensor, local: Tensor) -> None:
        """Add what a token paid to every chunk [R], and to the local context's tokens [T]."""
        self.paid = chunks if self.paid is None else self.paid + chunks
        self.paid_local = local if self.paid_local is None else added(self.paid_local, local, self.local_start)


def added(total: Tensor, local: Tensor, start: tuple[int, int]) -> Tensor:
    """The attention to the first local tokens with what those that are still there got (see `Request.local_start`)."""
    (place, first), total = start, total.clone()
    count = max(0, min(len(local) - place, len(total) - first))
    total[first : first + count] += local[place : place + count]
    return total
