"""Chunks as they are kept: read once, shared by any number of requests, brought back a few rows at a time."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from focusllm.config import FocusConfig
from focusllm.errors import DocumentError
from focusllm.machine import computes_on_cpu
from focusllm.memory.chunk_file import ChunkFile
from focusllm.memory.chunking import cut
from focusllm.memory.lookup import ROWS_AT_ONCE, Heads, LookupKeys
from focusllm.memory.store import DamagedRow, MissingRow, Packed, Packing, RowFile, RowStore
from focusllm.method.adapter import injected
from focusllm.method.base import layout
from focusllm.method.kv import KV, lasting
from focusllm.method.opened import Start, read_behind
from focusllm.method.packed import kept_as

CPU_TOKENS_AT_ONCE = 2048
"""Most tokens of a pass on a CPU: what lies between the products then stays in its caches. In bfloat16 two chunks of
1024 at once take 0.89 of the time of eight (benchmarks/reading_batches.py)."""

UNIMPORTANT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Settings of a model that its keys and values do not depend on."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Notify = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all) while a long read goes on."""


@dataclass(frozen=True)
class Place:
    """Where encoded chunks are put."""

    kind: str = "device"
    """device, host (memory beside a GPU) or disk."""
    folder: Path | None = None
    """disk: where the files go."""
    name: str | None = None
    """disk: what the files are of (`document_key`): their names begin with it, their headers have it. None: temporary
    files."""


@dataclass(frozen=True, eq=False)
class ChunkBlock:
    """Chunks of equal length, encoded: `token_ids` [R, C] and where their keys and values lie."""

    token_ids: Tensor
    kv: RowStore
    first: int = 0
    """Which row of `kv` is the first one of this block."""
    notify: Notify = lambda _: None
    start: Start | None = None
    """What the chunks were read behind."""
    lookup: LookupKeys | None = None
    """By what they are chosen, if they are to be."""

    @property
    def start_ids(self) -> tuple[int, ...]:
        """The tokens that the chunks were read behind."""
        return self.start.token_ids if self.start is not None else ()

    @property
    def lookup_layers(self) -> frozenset[int]:
        """The layers of the heads by which they are chosen."""
        return frozenset(self.lookup.heads.layers) if self.lookup is not None else frozenset()

    @property
    def num_chunks(self) -> int:
        """R."""
        return len(self.token_ids)

    @property
    def length(self) -> int:
        """C."""
        return self.kv.length

    @property
    def resident(self) -> KV | None:
        """All rows as views, if they lie where and as they are computed with."""
        return self.kv.rows(self.first, self.first + self.num_chunks) if isinstance(self.kv, KV) else None

    def part(self, start: int, stop: int) -> ChunkBlock:
        """Some of the chunks; nothing is copied."""
        lookup = self.lookup.rows(start, stop) if self.lookup is not None else None
        return replace(self, token_ids=self.token_ids[start:stop], first=self.first + start, lookup=lookup)

    def rows(self, model: nn.Module, start: int, stop: int) -> KV:
        """Keys and values of some chunks [n, K, C, D] a layer; what is damaged on disk is read anew, and said."""
        stop = min(stop, self.num_chunks)
        try:
            return self.kv.rows(self.first + start, self.first + stop)
        except DamagedRow as error:
            if stop - start > 1:  # find out which
                parts = [self.rows(model, i, i + 1) for i in range(start, stop)]
                return _joined(parts)
            assert isinstance(self.kv, RowFile | ChunkFile)
            if not isinstance(error, MissingRow):
                self.notify(f"Chunk {self.first + start} was damaged on disk ({error}); it is read again.")
            encoded = read_behind(model, self.start_ids, self.token_ids[start:stop])
            try:
                self.kv.write(self.first + start, encoded, self.token_ids[start:stop])
            except DocumentError as full:  # what was asked for is there all the same
                self.notify(str(full))
            return self.kv.packing.unpack(self.kv.packing.pack(encoded))  # as if from the file, whatever it holds

    def batches(self, model: nn.Module, at_once: int) -> Iterator[tuple[int, KV]]:
        """All chunks, so many at a time: (the first one's index, `rows`). While one batch is worked on, the next is
        read from the disk.
        """
        bounds = [(first, min(first + at_once, self.num_chunks)) for first in range(0, self.num_chunks, at_once)]
        if not isinstance(self.kv, RowFile):
            yield from ((first, self.rows(model, first, stop)) for first, stop in bounds)
            return
        records = _ahead(self._records, bounds)
        for first, stop in bounds:
            raw = next(records)
            kv = self.rows(model, first, stop) if raw is None else self.kv.unpack(raw)
            del raw  # not needed while the batch is worked on
            yield first, kv
            del kv

    def _records(self, bounds: tuple[int, int]) -> Tensor | None:
        """Chunks as they are in the file; None: something is damaged."""
        assert isinstance(self.kv, RowFile)
        try:
            return self.kv.read(self.first + bounds[0], self.first + bounds[1])
        except DamagedRow:
            return None


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) of every item, in order, each worked out by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[Result]] = deque()
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _joined(parts: Sequence[KV]) -> KV:
    whole = parts[0].empty_like(len(parts), parts[0].length)
    for i, part in enumerate(parts):
        whole.write(i, 0, part)
    return whole


@lasting
def encode(
    model: nn.Module,
    token_ids: Sequence[int],
    config: FocusConfig,
    progress: Progress | None = None,
    place: Place | None = None,
    notify: Notify = lambda _: None,
    start: Start | None = None,
    heads: Heads | None = None,
) -> list[ChunkBlock]:
    """Cut a text into chunks and read them in batches of `config.chunks_per_batch`, on a CPU in smaller ones.

    Args:
        place: where the keys and values go; None: the device. Chunks that a named file holds already are not read.
        notify: called with a sentence about what is read again though there was a file.
        start: what every chunk is read behind.
        heads: those whose keys are kept apart, for chunks that are to be chosen.

    Returns:
        One block with the full chunks and one with the shorter last chunk, as far as there are such.

    Raises:
        DocumentError: the disk is full; what a named file has stays.
    """
    device = next(model.parameters()).device
    place = place or Place()
    start_ids = start.token_ids if start is not None else ()
    bounds = cut(len(token_ids), config)
    full = [pair for pair in bounds if pair[1] - pair[0] == config.chunk_length]
    at_once = max(1, tokens_at_once(config, device) // config.chunk_length)
    blocks: list[ChunkBlock] = []
    replaced = ""
    for group in (full, bounds[len(full) :]):
        if not group:
            continue
        ids = torch.tensor([list(token_ids[start:stop]) for start, stop in group], device=device)
        store: KV | Packed | RowFile | None = _store(model, ids, config, place)
        block: ChunkBlock | None = None
        lookup, is_known = _lookup(model, heads, start, config.chunk_length, ids, store, place)
        if isinstance(store, RowFile) and store.replaced and not replaced:
            replaced = store.replaced
            notify(f"{store.path} was of {replaced}; the text is read again.")
        for first in range(0, len(group), at_once):
            batch, encoded = ids[first : first + at_once], None
            if not isinstance(store, RowFile):
                encoded = read_behind(model, start_ids, batch)
                store = filled(store, first, encoded, len(group))
            elif not all(store.has(first + i, row) for i, row in enumerate(batch.tolist())):
                encoded = read_behind(model, start_ids, batch)
                store.write(first, encoded, batch)
            block = block or ChunkBlock(ids, store, notify=notify, start=start, lookup=lookup)
            if lookup is not None and not is_known:
                lookup.write(first, block.rows(model, first, first + len(batch)) if encoded is None else encoded)
            if progress is not None:
                progress(group[first + len(batch) - 1][1], len(token_ids))
        assert block is not None
        blocks.append(block)
        if lookup is not None and not is_known and (kept := _lookup_path(store)) is not None:
            with suppress(
                OSError, SafetensorError
            ):  # a disk that is full or cannot be written to: they are made anew the next time
                lookup.save(kept, place.name or "")
    return blocks


def _lookup(
    model: nn.Module,
    heads: Heads | None,
    start: Start | None,
    longest: int,
    ids: Tensor,
    store: KV | Packed | RowFile | None,
    place: Place,
) -> tuple[LookupKeys | None, bool]:
    """Look-up keys for some chunks, and whether they were kept beside the rows."""
    if heads is None:
        return None, False
    empty, kept = LookupKeys.of(model, heads, ids.shape[0], ids.shape[1], longest, start), _lookup_path(store)
    found = LookupKeys.load(kept, place.name or "", empty) if kept is not None else None
    return found or empty, found is not None


def _lookup_path(store: KV | Packed | RowFile | None) -> Path | None:
    return store.path.with_suffix(".keys") if isinstance(store, RowFile) and store.path is not None else None


def count_alike(blocks: Sequence[ChunkBlock]) -> Counter[int]:
    """How many chunks of which length there are."""
    found: Counter[int] = Counter()
    for block in blocks:
        found[block.length] += block.num_chunks
    return found


def first_blocks(blocks: Sequence[ChunkBlock], num_chunks: int) -> list[ChunkBlock]:
    """The first chunks of some blocks; nothing is copied."""
    found = []
    for block in blocks:
        if num_chunks > 0:
            found.append(block.part(0, min(num_chunks, block.num_chunks)))
        num_chunks -= block.num_chunks
    return found


def tokens_at_once(config: FocusConfig, device: torch.device) -> int:
    """Most tokens of one pass over chunks, or over what stands behind them; a longer row is read all the same."""
    allowed = config.chunks_per_batch * config.chunk_length
    return min(allowed, CPU_TOKENS_AT_ONCE) if computes_on_cpu(device) else allowed


def document_key(model: nn.Module, token_ids: Sequence[int], config: FocusConfig, start_ids: Sequence[int] = ()) -> str:
    """A name for a text as a model reads it: other weights or settings of the model, another type, length of chunks,
    start or token give another. Whatever chunks' keys and values depend on has to be in here: nothing else tells files
    apart.
    """
    rounded = ["int8 weights"] if kept_as(model) == "int8" else []
    how = (model.dtype, config.chunk_length, config.overlap, config.kv_dtype, *rounded)
    digest = xxhash.xxh3_128("".join(f"{part} " for part in how).encode())
    if start_ids:
        digest.update(f"behind {','.join(map(str, start_ids))} ".encode())
    digest.update(",".join(map(str, token_ids)).encode())
    add_model(digest, model)
    return digest.hexdigest()


def add_model(digest: xxhash.xxh3_128, model: nn.Module) -> None:
    """Add a base model's settings and weights, those of candidate projections left out, to a digest."""
    base_config: Any = model.config
    settings = {name: value for name, value in base_config.to_diff_dict().items() if name not in UNIMPORTANT}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    rotaries = layout(model).rotaries
    for rotary in rotaries:
        digest.update(f" {rotary.attention_scaling}".encode())
    ours = {id(p) for wrapper in injected(model).values() for p in wrapper.own_parameters().values()}
    theirs = (p for p in model.parameters() if id(p) not in ours)
    for tensor in (*(rotary.inv_freq for rotary in rotaries), *theirs):
        digest.update(tensor.detach().flatten().cpu().view(torch.uint8).numpy().data)


def lookup_of(model: nn.Module, heads: Heads | None, block: ChunkBlock, longest: int) -> LookupKeys | None:
    """The look-up keys of chunks that were read already; None: there are no heads to choose by."""
    if heads is None:
        return None
    keys = LookupKeys.of(model, heads, block.num_chunks, block.length, longest, block.start)
    for first, kv in block.batches(model, ROWS_AT_ONCE):
        keys.write(first, kv)
    return keys


def _store(model: nn.Module, ids: Tensor, config: FocusConfig, place: Place) -> Packed | RowFile | None:
    """Where rows are put; None: as computed, on the device, which the first rows tell how."""
    packing, (num_rows, length) = Packing.of(model, config.kv_dtype), ids.shape
    if place.kind == "disk":
        assert place.folder is not None
        path = place.folder / f"{place.name}-{length}.rows" if place.name else None
        return RowFile(packing, num_rows, length, path, place.folder, place.name or "")
    if place.kind == "device" and config.kv_dtype == "same":
        return None
    return Packed.empty(packing, num_rows, length, torch.device("cpu") if place.kind == "host" else None)


def filled(store: KV | Packed | None, first: int, encoded: KV, num_rows: int) -> KV | Packed:
    """A store with some rows put in, made of them if there is none."""
    if isinstance(store, Packed):
        store.write(first, encoded)
        return store
    store = store or encoded.empty_like(num_rows, encoded.length)
    store.write(first, 0, encoded)
    return store
