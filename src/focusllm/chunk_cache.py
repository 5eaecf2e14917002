"""Encoded chunks by their token ids: a chunk that several texts share is read once (evaluation, training)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from focusllm.chunking import cut
from focusllm.chunks import ChunkBlock, filled
from focusllm.config import FocusConfig
from focusllm.focus import encode_chunks
from focusllm.kv import KV
from focusllm.store import Packed, Packing


class ChunkCache:
    """Keys and values of chunks, up to a number of bytes.

    Every chunk is read alone, so that its numbers do not depend, in their last bits, on which others were known.

    Args:
        model: the base model.
        most_bytes: kept chunks take no more. Those that were not used for longest go first, but never for others
            of the same text: of a text that is too long its beginning stays.
        last_only: keep the chunks of the last text only, and, where its blocks hold them as computed, there: they take
            no memory of their own.
    """

    def __init__(self, model: nn.Module, most_bytes: int, last_only: bool = False):
        self.model, self.most_bytes, self.last_only = model, most_bytes, last_only
        self.nbytes = 0
        self.num_asked = self.num_read = 0
        """Chunks that were asked for, and those of them that had to be read."""
        self._known: dict[tuple[int, ...], KV] = {}  # the last used at the end

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all chunks."""
        self._known.clear()
        self.nbytes = 0

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
        bounds = cut(len(token_ids), config)
        pieces = [tuple(token_ids[start:stop]) for start, stop in bounds]
        wanted = set(pieces)
        if self.last_only:
            for piece in set(self._known) - wanted:
                self.nbytes -= self._known.pop(piece).nbytes
        self._touch(wanted)
        full = [piece for piece in pieces if len(piece) == config.chunk_length]
        return [self._block(group, wanted, config.kv_dtype) for group in (full, pieces[len(full) :]) if group]

    def _touch(self, wanted: set[tuple[int, ...]]) -> None:
        for piece in wanted & set(self._known):
            self._known[piece] = self._known.pop(piece)

    def _block(self, pieces: list[tuple[int, ...]], wanted: set[tuple[int, ...]], kv_dtype: str) -> ChunkBlock:
        ids = torch.tensor(pieces, device=next(self.model.parameters()).device)
        store: KV | Packed | None = None
        if kv_dtype != "same":
            store = Packed.empty(Packing.of(self.model, kv_dtype), len(pieces), ids.shape[1], None)
        for row, piece in enumerate(pieces):
            store = filled(store, row, self._encoded(piece, wanted), len(pieces))
            if self.last_only and isinstance(store, KV):
                self.nbytes += 0 if piece in self._known else store.rows(row, row + 1).nbytes
                self._known[piece] = store.rows(row, row + 1)
        assert store is not None
        return ChunkBlock(ids, store)

    def _encoded(self, piece: tuple[int, ...], wanted: set[tuple[int, ...]]) -> KV:
        kv = self._known.get(piece)
        self.num_asked += 1
        if kv is None:
            self.num_read += 1
            kv = encode_chunks(self.model, torch.tensor([piece], device=next(self.model.parameters()).device))
            self._keep(piece, kv, wanted)
        return kv

    def _keep(self, piece: tuple[int, ...], kv: KV, wanted: set[tuple[int, ...]]) -> None:
        while self.nbytes + kv.nbytes > self.most_bytes:
            oldest = next(iter(self._known), None)
            if oldest is None or oldest in wanted:
                return
            self.nbytes -= self._known.pop(oldest).nbytes
        self._known[piece] = kv
        self.nbytes += kv.nbytes
