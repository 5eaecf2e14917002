"""Encoded chunks by their token ids: what texts share is read once.

ChunkCache    as many chunks as there is room for, each of its own (training, where memories are drawn anew and anew)
LastText      the text that was asked for last, where it is used (evaluation, where questions share a document)

Every chunk is read alone, so that its numbers do not depend, in their last bits, on which others were known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from focusllm.chunking import cut
from focusllm.chunks import ChunkBlock, filled, first_blocks
from focusllm.config import FocusConfig
from focusllm.focus import encode_chunks
from focusllm.kv import KV
from focusllm.store import Packed, Packing


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
        self._known: dict[tuple[int, ...], KV] = {}  # the last used at the end

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
        bounds = cut(len(token_ids), config)
        pieces = [tuple(token_ids[start:stop]) for start, stop in bounds]
        wanted = set(pieces)
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
        assert store is not None
        return ChunkBlock(ids, store)

    def _encoded(self, piece: tuple[int, ...], wanted: set[tuple[int, ...]]) -> KV:
        kv = self._known.get(piece)
        if kv is None:
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


class LastText:
    """The chunks of the last text, which a beginning of it shares; any other text takes their place.

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
        self._pieces: list[tuple[int, ...]] = []
        self._blocks: list[ChunkBlock] = []
        self._kv_dtype = ""

    def blocks(self, token_ids: Sequence[int], config: FocusConfig) -> list[ChunkBlock]:
        """A text cut into chunks and encoded: one block of the full chunks, one of the shorter last chunk."""
        pieces = [tuple(token_ids[start:stop]) for start, stop in cut(len(token_ids), config)]
        self.num_asked += len(pieces)
        if config.kv_dtype != self._kv_dtype or pieces != self._pieces[: len(pieces)]:
            self.clear()  # first, so that there are never two
            full = [piece for piece in pieces if len(piece) == config.chunk_length]
            groups = [group for group in (full, pieces[len(full) :]) if group]
            self._blocks = [self._read(group, config.kv_dtype) for group in groups]
            self._pieces, self._kv_dtype = pieces, config.kv_dtype
        return first_blocks(self._blocks, len(pieces))

    def _read(self, pieces: list[tuple[int, ...]], kv_dtype: str) -> ChunkBlock:
        ids = torch.tensor(pieces, device=next(self.model.parameters()).device)
        store: KV | Packed | None = None
        if kv_dtype != "same":
            store = Packed.empty(Packing.of(self.model, kv_dtype), len(pieces), ids.shape[1], None)
        repeated = {piece for piece, count in Counter(pieces).items() if count > 1}
        known: dict[tuple[int, ...], KV] = {}
        for row, piece in enumerate(pieces):
            kv = known.get(piece)
            if kv is None:
                kv = encode_chunks(self.model, ids[row : row + 1])
                self.num_read += 1
            if piece in repeated:
                known[piece] = kv
            store = filled(store, row, kv, len(pieces))
        assert store is not None
        return ChunkBlock(ids, store)
