"""What a text costs in memory, estimated before it is spent."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from focusllm.config import FocusConfig, Weights
from focusllm.errors import MemoryLimitError
from focusllm.machine import computes_on_cpu, forget_peak_resident, memory_limits, peak_resident, readable_bytes
from focusllm.memory.chunking import count_by_length, count_chunks
from focusllm.memory.chunks import ChunkBlock, count_alike, tokens_at_once
from focusllm.memory.lookup import Heads, LookupKeys, looking_bytes, middle_heads
from focusllm.memory.store import Packing
from focusllm.method.attention import SCORES_BY_FORMULA
from focusllm.method.base import layout
from focusllm.method.kv import GrowingKV
from focusllm.method.packed import chosen, packable_bytes, packed_bytes

REMEDIES: dict[str, Any] = {"kv_place": "disk", "kv_dtype": "int8", "chunks_per_batch": 1}
"""Settings that take less memory."""


@dataclass(frozen=True)
class Cost:
    """Bytes by what they are for, and the machine's free bytes."""

    weights: int
    """Base model and candidate projections, and the second copy of the weights where one is kept."""
    chunks: int
    """Keys and values of the chunks: the document, kept as long as it may be asked."""
    rows: int
    """What one request adds: prompt and generated tokens behind every chunk, candidates, local context."""
    scratch: int
    """Hidden states of the batch being read, and rows that are brought from where they are kept; gone afterwards."""
    free: int
    """Free memory of the device now."""
    runtime: int = 0
    """What Python and the libraries hold in this process; counted where no model is loaded yet, on a CPU."""
    loaded: bool = True
    """Whether the weights are in memory already."""

    @property
    def new(self) -> int:
        """What a loaded model still needs."""
        return self.chunks + self.rows + self.scratch

    @property
    def needed(self) -> int:
        """What must still be free."""
        return self.new if self.loaded else self.weights + self.new

    @property
    def total(self) -> int:
        """What it needs in all."""
        return self.runtime + self.weights + self.new

    def to_dict(self) -> dict[str, int]:
        """All fields and the total, as JSON takes them."""
        return {**asdict(self), "total": self.total}


def estimate(
    model: nn.Module,
    config: FocusConfig,
    num_tokens: int,
    num_new_tokens: int = 256,
    place: str = "device",
    weights: Weights = "auto",
    heads: Heads | None = None,
) -> Cost:
    """The memory that reading `num_tokens` tokens and answering one question takes.

    The model may be on the meta device (nothing loaded); then the libraries' own memory is counted as well.

    Args:
        place: where the chunks' keys and values are kept; on the device they count as memory, elsewhere they do not.
        weights: for a model on the meta device, what copies of its weights loading it is to make.
        heads: by which opened chunks are chosen; None: those of some middle layers.
    """
    found, base_config = layout(model), model.config
    dtype = next(model.parameters()).dtype
    per_token = found.kv_bytes_per_token * dtype.itemsize
    num_chunks = count_chunks(num_tokens, config)
    chunks = stored_bytes(model, config, num_tokens)
    brought = config.budget if config.is_opened else min(num_chunks, config.chunks_per_batch) * config.chunk_length
    in_place = place == "device" and config.kv_dtype == "same"
    bringing = 0 if in_place else brought * per_token
    if place == "disk":  # as they are in the file: these rows, and the next ones
        bringing += (1 if config.is_opened else 2) * Packing.of(model, config.kv_dtype).row_bytes(brought)
    alike = count_by_length(num_tokens, config)
    prompt = config.most_prompt_tokens
    at_once = tokens_at_once(config, next(model.parameters()).device)
    in_flight = min(num_tokens, max(config.chunk_length, at_once))
    hidden: int = base_config.hidden_size  # type: ignore[union-attr,assignment]
    inner: int = getattr(base_config, "intermediate_size", 4 * hidden)
    all_heads = max(layer.num_heads * (layer.key_dim + layer.value_dim) for layer in found.layers)
    widths = 6 * hidden + 3 * inner + all_heads  # live at once in a layer
    scores = 0
    if not computes_on_cpu(next(model.parameters()).device):  # of a prompt behind chunks: scores, and two of their size
        of_a_row = found.layers[0].num_heads * prompt * (config.chunk_length + prompt)
        scores = 3 * 4 * max(of_a_row, min(SCORES_BY_FORMULA, of_a_row * min(num_chunks, at_once // prompt)))
    lookup = looking = 0
    if config.is_opened:  # what chunks are chosen by lies in the processor's memory
        choosing = heads or middle_heads(model)
        if computes_on_cpu(next(model.parameters()).device):
            lookup = _lookup_bytes(model, choosing, num_tokens, num_chunks)
            looking = looking_bytes(choosing, num_tokens, prompt)
    return Cost(
        weights=sum(parameter.nbytes for parameter in model.parameters()) + _copies(model, weights),
        chunks=(chunks if place == "device" else 0) + lookup,
        rows=_tokens_of_a_request(config, alike, in_place, num_new_tokens) * per_token,
        scratch=max(in_flight * (widths * dtype.itemsize + per_token) + bringing + scores, looking),
        free=free_memory(next(model.parameters()).device),
        runtime=_runtime(next(model.parameters()).device),
        loaded=next(model.parameters()).device.type != "meta",
    )


def _lookup_bytes(model: nn.Module, heads: Heads, num_tokens: int, num_chunks: int) -> int:
    """Bytes of look-up keys: those of a token, and what usual questions pay to a chunk."""
    alone = LookupKeys.of(model, heads, 1, 1, 1, None)
    usual = alone.usual.nbytes
    return num_tokens * (alone.nbytes - usual - alone.usual_start.nbytes) + num_chunks * usual


def _tokens_of_a_request(config: FocusConfig, alike: Mapping[int, int], in_place: bool, num_new_tokens: int) -> int:
    """Keys and values of how many tokens a request holds besides the chunks themselves.

    Args:
        alike: how many chunks there are of each length.
        in_place: whether they lie on the device as they are computed with.
    """
    local = config.max_local_length
    if config.is_opened:
        return config.start_length + config.budget + GrowingKV.room(local)
    if config.rechunk and num_new_tokens > config.max_local_length:  # the oldest of them become chunks
        alike = Counter(alike) + Counter({config.rechunk_length: num_new_tokens // config.rechunk_length})
        local, num_new_tokens = local + num_new_tokens, config.max_local_length
    num_chunks, prompt = sum(alike.values()), config.most_prompt_tokens
    grown = GrowingKV.room(prompt + num_new_tokens)
    is_focused = config.is_focused(max(alike.values(), default=0))
    if config.decoding == "cached" and config.refresh_rows and (is_focused or not in_place):
        hot = sum(
            min(config.refresh_rows, count) * GrowingKV.room(length + prompt + max(num_new_tokens, GrowingKV.STEP))
            for length, count in alike.items()
        )
        return num_chunks * (GrowingKV.room(prompt - 1) + 1) + hot + local
    return num_chunks * (grown + 1) + local


def stored_bytes(model: nn.Module, config: FocusConfig, num_tokens: int) -> int:
    """Bytes of a text's chunks, wherever they are kept; what chunks have in common counts twice."""
    common = max(0, count_chunks(num_tokens, config) - 1) * config.overlap
    return Packing.of(model, config.kv_dtype).row_bytes(num_tokens + common)


def _copies(model: nn.Module, weights: Weights) -> int:
    """Bytes of second copies of weights: those there are, or those that loading the model will make."""
    if next(model.parameters()).device.type != "meta":
        return packed_bytes(model)
    return packable_bytes(model, chosen(model, weights))


def _runtime(device: torch.device) -> int:
    if device.type != "meta" or not computes_on_cpu(device):
        return 0
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device without swapping, or without being killed in a container."""
    if device.type == "cuda" or (device.type == "meta" and not computes_on_cpu(device)):
        place = None if device.type == "meta" else device
        idle = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)  # kept by torch, free to use
        return int(torch.cuda.mem_get_info(place)[0] + idle)
    import psutil

    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in memory_limits())])


def total_memory(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in memory_limits())])


def check_read(
    model: nn.Module,
    config: FocusConfig,
    num_tokens: int,
    folder: Path,
    written: int = 0,
    weights: Weights = "auto",
    heads: Heads | None = None,
) -> str:
    """Where the chunks of a text go (see `find_place`); refuses what fits nowhere, before anything is computed.

    Raises:
        MemoryLimitError: with what is needed, what is free, and the setting that would fit.
        ConfigError: more chunks than the base model has positions for.
    """
    if not config.is_opened:  # what is not open takes no position
        config.check_num_chunks(count_chunks(num_tokens, config), layout(model).max_positions)
    place = find_place(model, config, num_tokens, folder, written, weights, heads)
    if place is not None:
        return place
    cost = estimate(model, config, num_tokens, place=_places(model, config)[0], weights=weights, heads=heads)
    stored = stored_bytes(model, config, num_tokens)
    memory = f"needs about {readable_bytes(cost.needed)} of memory, but {readable_bytes(cost.free)} are free"
    disk = f"needs about {readable_bytes(stored)} on disk, but {readable_bytes(free_disk(folder))} are free in {folder}"
    remedies = _remedies(model, config, num_tokens, folder, weights, heads)
    raise MemoryLimitError(
        f"reading {num_tokens:,} tokens {disk if config.kv_place == 'disk' and cost.needed <= cost.free else memory}; "
        f"use {' or '.join(remedies)}."
    )


def check_question(
    model: nn.Module, config: FocusConfig, blocks: Sequence[ChunkBlock], num_new_tokens: int = 256
) -> None:
    """Refuse a question about chunks beside which there is no room for what it takes, before anything is computed.

    Raises:
        MemoryLimitError: with what is needed, what is free, and what would fit.
    """
    alike = count_alike(blocks)
    in_place = all(block.resident is not None for block in blocks)
    num_tokens = sum(block.token_ids.numel() for block in blocks)
    heads = next((block.lookup.heads for block in blocks if block.lookup is not None), None)
    cost = estimate(model, config, num_tokens, place="device" if in_place else "disk", heads=heads)
    per_token = layout(model).kv_bytes_per_token * next(model.parameters()).itemsize
    needed = cost.scratch + _tokens_of_a_request(config, alike, in_place, num_new_tokens) * per_token
    if needed > cost.free:
        less = f"generate fewer tokens than {num_new_tokens:,} (max_new_tokens), " if num_new_tokens > 256 else ""
        raise MemoryLimitError(
            f"a question about {num_tokens:,} tokens in {sum(alike.values()):,} chunks needs about "
            f"{readable_bytes(needed)} of memory beside them, but {readable_bytes(cost.free)} are free; {less}ask "
            f"about fewer documents, or use a greater chunk_length."
        )


def find_place(
    model: nn.Module,
    config: FocusConfig,
    num_tokens: int,
    folder: Path,
    written: int = 0,
    weights: Weights = "auto",
    heads: Heads | None = None,
) -> str | None:
    """The first of device, host and disk (or the one that is set) that has room for a text's chunks; None: none has.

    Args:
        folder: where files would go.
        written: bytes of them that are there already.
        weights, heads: as `estimate` takes them.
    """
    about = folder, written, weights, heads
    return next((place for place in _places(model, config) if _fits(model, config, num_tokens, place, *about)), None)


def _places(model: nn.Module, config: FocusConfig) -> list[str]:
    chosen = ["device", "host", "disk"] if config.kv_place == "auto" else [config.kv_place]
    has_host = not computes_on_cpu(next(model.parameters()).device)
    return list(dict.fromkeys("device" if place == "host" and not has_host else place for place in chosen))


def _fits(
    model: nn.Module,
    config: FocusConfig,
    num_tokens: int,
    place: str,
    folder: Path,
    written: int,
    weights: Weights,
    heads: Heads | None,
) -> bool:
    cost = estimate(model, config, num_tokens, place=place, weights=weights, heads=heads)
    if cost.needed > cost.free:
        return False
    stored = stored_bytes(model, config, num_tokens)
    if place == "host":
        return stored <= free_memory(torch.device("cpu"))
    return place == "device" or stored <= free_disk(folder) + written


def _remedies(
    model: nn.Module, config: FocusConfig, num_tokens: int, folder: Path, weights: Weights, heads: Heads | None
) -> list[str]:
    def fits(tokens: int, **changes: Any) -> bool:
        return find_place(model, config.replace(**changes), tokens, folder, 0, weights, heads) is not None

    remedies = [f"{name}={value!r}" for name, value in REMEDIES.items() if fits(num_tokens, **{name: value})]
    cost = estimate(model, config, num_tokens, weights=weights, heads=heads)
    if next(model.parameters()).dtype == torch.float32 and config.kv_place != "disk" and cost.new / 2 <= cost.free:
        remedies.append("dtype='bfloat16'")
    fitting = num_tokens
    while fitting and not fits(fitting):
        fitting = fitting * 99 // 100
    return [*remedies, f"a text of at most {fitting:,} tokens" if fitting else "a machine with more room"]


def free_disk(folder: Path) -> int:
    """Bytes that can be written into a folder, there or not yet."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak_resident()


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held on a device so far, or since they were last forgotten."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()
