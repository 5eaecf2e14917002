"""Encoded chunks by their token ids: what texts share is read once.

ChunkCache    as many chunks as there is room for, each of its own (training, where memories are drawn anew and anew)
SharedChunks  the same for texts that are asked, by any number of requests at once (serving)
LastText      the text that was asked for last, where it is used (evaluation, where questions share a document)

Every chunk is read alone, so that its numbers do not depend, in their last bits, on which others were known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from focusllm.config import FocusConfig
from focusllm.memory.chunking import cut
from focusllm.memory.chunks import ChunkBlock, filled, first_blocks, lookup_of
from focusllm.memory.lookup import Heads
from focusllm.memory.store import Packed, Packing
from focusllm.method.kv import KV
from focusllm.method.opened import Start, read_behind, read_start

Piece = tuple[int, ...]
"""A chunk's token ids."""


class ChunkCache:
    """Keys and values of chunks, up to a number of bytes.

    Args:
        model: the base model.
        most_bytes: kept chunks take no more. Those that were not used for longest go first, but never for others
            of the same text: of a text that is too long its beginning stays.
    """

    def __init__(self, model: nn.Module, most_bytes: int):
        self.model, self.most_bytes = model, most_bytes
        self.nbytes = 0
        self._known: dict[Piece, KV] = {}  # the last used at the end

    def __len__(self) -> int:
        return len(self._known)

    def chunk(self, token_ids: Sequence[int]) -> KV:
        """One chunk's keys and values [1, K, C, D] a layer."""
        piece = tuple(token_ids)
        self._touch({piece})
        return self._encoded(piece, {piece})

    def blocks(self, token_ids: Sequence[int], config: FocusConfig) -> list[ChunkBlock]:
        """A text cut into chunks and encoded: one block of the full chunks, one of the shorter last chunk.

        Args:
            config: says how it is cut, and in how many bits the blocks hold keys and values.
        """
        pieces = _pieces(token_ids, config)
        wanted = set(pieces)
        self._touch(wanted)
        return _blocks(self.model, pieces, config, lambda piece: self._encoded(piece, wanted))

    def _touch(self, wanted: set[Piece]) -> None:
        for piece in wanted & set(self._known):
            self._known[piece] = self._known.pop(piece)

    def _encoded(self, piece: Piece, wanted: set[Piece]) -> KV:
        kv = self._known.get(piece)
        if kv is None:
            kv = _read(self.model, piece)
            self._keep(piece, kv, wanted)
        return kv

    def _keep(self, piece: Piece, kv: KV, wanted: set[Piece]) -> None:
        while self.nbytes + kv.nbytes > self.most_bytes:
            oldest = next(iter(self._known), None)
            if oldest is None or oldest in wanted:
                return
            self.nbytes -= self._known.pop(oldest).nbytes
        self._known[piece] = kv
        self.nbytes += kv.nbytes


class SharedChunks:
    """Chunks that can be asked, each a block of its own that any number of requests share.

    Args:
        model: the base model. config: in how many bits they are kept.
        heads: those that choose among them; None: they are to be condensed.
        most_bytes: those that are kept for later requests take no more; the ones that were not used for longest go
            first. What a request holds stays as long as the request does.
    """

    def __init__(self, model: nn.Module, config: FocusConfig, heads: Heads | None, most_bytes: int):
        self.model, self.config, self.heads, self.most_bytes = model, config, heads, most_bytes
        self.nbytes = 0
        self._known: dict[tuple[Piece, Piece], ChunkBlock] = {}  # by start and chunk; the last used at the end

    def __len__(self) -> int:
        return len(self._known)

    def count_known(self, pieces: Sequence[Sequence[int]], start_ids: Sequence[int] = ()) -> int:
        """How many of these chunks need not be read."""
        return sum((tuple(start_ids), tuple(piece)) in self._known for piece in pieces)

    def block(self, piece: Sequence[int], start: Start | None = None) -> tuple[ChunkBlock, bool]:
        """One chunk, read behind a start; and whether it was read for that."""
        key = start.token_ids if start is not None else (), tuple(piece)
        block = self._known.pop(key, None)
        is_new = block is None
        if block is None:
            block = _block(self.model, [key[1]], self.config.kv_dtype, lambda piece: _read(self.model, piece, key[0]))
            block = replace(block, start=start)
            block = replace(block, lookup=lookup_of(self.model, self.heads, block, self.config.chunk_length))
            self.nbytes += _nbytes(block)
        self._known[key] = block
        self.make_room(self.most_bytes)
        return block, is_new

    def make_room(self, most_bytes: int) -> None:
        """Forget chunks until those that are left take no more."""
        while self.nbytes > most_bytes:
            oldest = next(iter(self._known))
            self.nbytes -= _nbytes(self._known.pop(oldest))


def _nbytes(block: ChunkBlock) -> int:
    return block.kv.nbytes + (block.lookup.nbytes if block.lookup is not None else 0)


class LastText:
    """The chunks of the last text, whose beginnings share its full ones; any other text takes their place.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.num_asked = self.num_read = 0
        """Chunks that were asked for, and those of them that had to be read: not those that repeat in a text."""
        self.clear()

    def clear(self) -> None:
        """Keep nothing."""
        self._full, self._shorter = _Kept(), _Kept()

    def blocks(
        self,
        token_ids: Sequence[int],
        config: FocusConfig,
        start_ids: Sequence[int] = (),
        heads: Heads | None = None,
    ) -> list[ChunkBlock]:
        """A text cut into chunks and encoded: one block of the full chunks, one of the shorter last chunk.

        Args:
            start_ids, heads: what they are read behind and chosen by, if they are to be opened.
        """
        pieces, found = _pieces(token_ids, config), list[ChunkBlock]()
        self.num_asked += len(pieces)
        full = [piece for piece in pieces if len(piece) == config.chunk_length]
        how = (config.kv_dtype, tuple(start_ids), heads)
        for kept, wanted in ((self._full, full), (self._shorter, pieces[len(full) :])):
            if how != kept.how or wanted != kept.pieces[: len(wanted)]:
                kept.pieces, kept.blocks = [], []  # first, so that there are never two
                kept.blocks = self._read(wanted, config, start_ids, heads)
                kept.pieces, kept.how = wanted, how
            found += first_blocks(kept.blocks, len(wanted))
        return found

    def _read(
        self, pieces: list[Piece], config: FocusConfig, start_ids: Sequence[int], heads: Heads | None
    ) -> list[ChunkBlock]:
        repeated = {piece for piece, count in Counter(pieces).items() if count > 1}
        known: dict[Piece, KV] = {}

        def encoded(piece: Piece) -> KV:
            if piece in known:
                return known[piece]
            self.num_read += 1
            kv = _read(self.model, piece, start_ids)
            if piece in repeated:
                known[piece] = kv
            return kv

        start = read_start(self.model, start_ids)
        found = _blocks(self.model, pieces, config, encoded)
        found = [replace(block, start=start) for block in found]
        return [replace(block, lookup=lookup_of(self.model, heads, block, config.chunk_length)) for block in found]


@dataclass
class _Kept:
    """Chunks of one length, and their block."""

    pieces: list[Piece] = field(default_factory=list)
    blocks: list[ChunkBlock] = field(default_factory=list)
    how: tuple[str, tuple[int, ...], Heads | None] = ("", (), None)


def _pieces(token_ids: Sequence[int], config: FocusConfig) -> list[Piece]:
    return [tuple(token_ids[start:stop]) for start, stop in cut(len(token_ids), config)]


def _read(model: nn.Module, piece: Piece, start_ids: Sequence[int] = ()) -> KV:
    return read_behind(model, start_ids, torch.tensor([piece], device=next(model.parameters()).device))


def _blocks(
    model: nn.Module, pieces: list[Piece], config: FocusConfig, encoded: Callable[[Piece], KV]
) -> list[ChunkBlock]:
    """One block of the full chunks, one of the shorter last chunk, as far as there are such."""
    full = [piece for piece in pieces if len(piece) == config.chunk_length]
    return [_block(model, group, config.kv_dtype, encoded) for group in (full, pieces[len(full) :]) if group]


def _block(model: nn.Module, pieces: list[Piece], kv_dtype: str, encoded: Callable[[Piece], KV]) -> ChunkBlock:
    ids = torch.tensor(pieces, device=next(model.parameters()).device)
    store: KV | Packed | None = None
    if kv_dtype != "same":
        store = Packed.empty(Packing.of(model, kv_dtype), len(pieces), ids.shape[1], None)
    for row, piece in enumerate(pieces):
        store = filled(store, row, encoded(piece), len(pieces))
    assert store is not None
    return ChunkBlock(ids, store)
