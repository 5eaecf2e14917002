"""Chunks as a model reads them, kept by what they are: the same tokens are read once, whichever documents they are in.

Every chunk is read alone. So its numbers are the same, to the last bit, whichever chunks were read with it: what an
edited document answers is what it would answer if it were new.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from weakref import WeakValueDictionary

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from focusllm.config import FocusConfig
from focusllm.library.chunk_folder import KEYS, ROWS, ChunkFolder, KeptFile
from focusllm.memory import chunk_file, lookup
from focusllm.memory.chunk_file import ChunkFile
from focusllm.memory.chunks import ChunkBlock, Notify, add_model
from focusllm.memory.lookup import Heads, LookupKeys
from focusllm.memory.store import Packing
from focusllm.method.opened import read_behind, read_start


def reader_key(model: nn.Module, config: FocusConfig, start_ids: Sequence[int], numbers: str = "") -> str:
    """All that a chunk's keys and values depend on besides its tokens: the base model's settings and weights, their
    type, the bits that are kept, and the shared start. Candidate projections are not among it.

    Args:
        numbers: how they are computed where that is not plain arithmetic in the model's type (weights in 8 bits, say).
    """
    digest = xxhash.xxh3_128(repr((str(model.dtype), config.kv_dtype, list(start_ids), numbers)).encode())
    add_model(digest, model)
    return digest.hexdigest()


class ChunkStore:
    """A model's chunks in a folder.

    Args:
        model: the base model. reader: its `reader_key`. start_ids: what chunks are read behind.
        heads: those that choose chunks. keeps: whether what is read is written.
    """

    def __init__(
        self,
        folder: ChunkFolder,
        model: nn.Module,
        config: FocusConfig,
        reader: str,
        start_ids: Sequence[int],
        heads: Heads,
        notify: Notify,
        keeps: bool = True,
    ):
        self.folder, self.model, self.reader, self.heads, self.notify = folder, model, reader, heads, notify
        self.start = read_start(model, start_ids)
        self._start_ids, self._keeps = tuple(start_ids), keeps
        self._packing, self._longest = Packing.of(model, config.kv_dtype), config.chunk_length
        self._in_use: WeakValueDictionary[str, ChunkBlock] = WeakValueDictionary()

    def key(self, token_ids: Sequence[int]) -> str:
        """What a chunk is known by."""
        return sha256(f"{self.reader} {','.join(map(str, token_ids))}".encode()).hexdigest()

    def row_bytes(self, num_tokens: int) -> int:
        """What a chunk's keys and values take."""
        return self._packing.row_bytes(num_tokens)

    def block(self, token_ids: Sequence[int], key: str) -> tuple[ChunkBlock, bool]:
        """A chunk that can be asked, and whether it was read for that: its look-up keys were not there, or of others.

        Raises:
            DocumentError: the disk is full, or cannot be written to.
        """
        kept = self.kept(token_ids, key)
        if kept is not None:
            return kept, False
        ids, rows, found = self._empty(token_ids, key)
        block, is_new = ChunkBlock(ids, rows, notify=self.notify, start=self.start), not rows.path.is_file()
        if is_new:
            kv = read_behind(self.model, self._start_ids, ids)
            if self._keeps:
                rows.write(0, kv, ids)
            kv = self._packing.unpack(self._packing.pack(kv))  # as it will come from the file
        else:
            kv = block.rows(self.model, 0, 1)
        found.write(0, kv)
        if self._keeps:
            with suppress(OSError, SafetensorError):  # they are made of the rows the next time
                found.save(self.folder.path(key, KEYS), key)
        self._in_use[key] = block = replace(block, lookup=found)
        return block, is_new

    def kept(self, token_ids: Sequence[int], key: str) -> ChunkBlock | None:
        """A chunk whose look-up keys are there; the model is not needed for it. None: they are not, or of others."""
        path, known = self.folder.path(key, KEYS), self._in_use.get(key)
        if known is not None and (path.exists() or not self._keeps):  # documents in memory share it
            return known
        ids, rows, empty = self._empty(token_ids, key)
        found = LookupKeys.load(path, key, empty)
        if found is None:
            return None
        self._in_use[key] = block = ChunkBlock(ids, rows, notify=self.notify, start=self.start, lookup=found)
        return block

    def _empty(self, token_ids: Sequence[int], key: str) -> tuple[Tensor, ChunkFile, LookupKeys]:
        """A chunk's tokens [1, C], its file, and room for its look-up keys."""
        ids = torch.tensor([list(token_ids)], device=next(self.model.parameters()).device)
        rows = ChunkFile(self._packing, ids.shape[1], self.folder.path(key, ROWS), key)
        return ids, rows, LookupKeys.of(self.model, self.heads, 1, ids.shape[1], self._longest, self.start)


def is_whole(file: KeptFile) -> bool:
    """Whether a file holds what was written into it."""
    return chunk_file.is_whole(file.path, file.key) if file.is_rows else lookup.is_whole(file.path, file.key)
