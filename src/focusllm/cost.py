"""What a text costs in memory, estimated before it is spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from focusllm.base import layout
from focusllm.chunking import count_chunks
from focusllm.config import FocusConfig
from focusllm.errors import MemoryLimitError
from focusllm.kv import GrowingKV
from focusllm.machine import peak_resident

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Bytes by what they are for, and the machine's free bytes."""

    weights: int
    """Base model and candidate projections."""
    chunks: int
    """Keys and values of the chunks: the document, kept as long as it may be asked."""
    rows: int
    """What one request adds: prompt and generated tokens behind every chunk, candidates, local context."""
    scratch: int
    """Hidden states of the batch being read, gone afterwards."""
    free: int
    """Free memory of the device now."""

    @property
    def new(self) -> int:
        """What a loaded model still needs."""
        return self.chunks + self.rows + self.scratch

    @property
    def total(self) -> int:
        """What it needs in all."""
        return self.weights + self.new

    def to_dict(self) -> dict[str, int]:
        """All fields and the total, as JSON takes them."""
        return {**asdict(self), "total": self.total}


def estimate(model: nn.Module, config: FocusConfig, num_tokens: int, num_new_tokens: int = 256) -> Cost:
    """The memory that reading `num_tokens` tokens and answering one question takes.

    The model may be on the meta device (nothing loaded). Memory of the runtime itself (libraries) is not counted.
    """
    found, base_config = layout(model), model.config
    dtype = next(model.parameters()).dtype
    per_token = found.kv_bytes_per_token * dtype.itemsize
    num_chunks = count_chunks(num_tokens, config.chunk_length)
    prompt = min(config.prompt_length, config.chunk_length)
    room = (((prompt + num_new_tokens) // GrowingKV.STEP) + 1) * GrowingKV.STEP
    in_flight = min(num_tokens, config.chunk_length * config.chunks_per_batch)
    hidden: int = base_config.hidden_size  # type: ignore[union-attr,assignment]
    inner: int = getattr(base_config, "intermediate_size", 4 * hidden)
    widths = 6 * hidden + 3 * inner + 2 * found.num_heads * found.head_dim  # live at once in a layer
    return Cost(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        chunks=num_tokens * per_token,
        rows=(num_chunks * (room + 1) + config.max_local_length) * per_token,
        scratch=in_flight * (widths * dtype.itemsize + per_token),
        free=free_memory(next(model.parameters()).device),
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device without swapping."""
    if device.type == "cuda" or (device.type == "meta" and torch.cuda.is_available()):
        place = None if device.type == "meta" else device
        idle = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)  # kept by torch, free to use
        return int(torch.cuda.mem_get_info(place)[0] + idle)
    import psutil

    return int(psutil.virtual_memory().available)


def check_memory(model: nn.Module, config: FocusConfig, num_tokens: int) -> None:
    """Refuse a read that would not fit, before anything is computed.

    Raises:
        MemoryLimitError: with what is needed, what is free, and the setting that would fit.
    """
    cost = estimate(model, config, num_tokens)
    if cost.new <= cost.free:
        return
    remedies = []
    if next(model.parameters()).dtype == torch.float32 and cost.new / 2 <= cost.free:
        remedies.append("dtype='bfloat16'")
    frugal = config.replace(chunks_per_batch=1)
    if estimate(model, frugal, num_tokens).new <= cost.free:
        remedies.append("chunks_per_batch=1")
    fitting = num_tokens
    while fitting and estimate(model, config, fitting).new > cost.free:
        fitting = fitting * 99 // 100
    remedies.append(f"a text of at most {fitting:,} tokens")
    raise MemoryLimitError(
        f"reading {num_tokens:,} tokens needs about {cost.new / GIB:.1f} GiB, but {cost.free / GIB:.1f} GiB are free; "
        f"use {' or '.join(remedies)}."
    )


def check_read(model: nn.Module, config: FocusConfig, num_tokens: int) -> None:
    """Refuse a read whose chunks would not fit, into memory or into the local pass, before anything is computed.

    Raises:
        MemoryLimitError: as `check_memory`.
        ConfigError: more chunks than the base model has positions for.
    """
    check_memory(model, config, num_tokens)
    config.check_num_chunks(count_chunks(num_tokens, config.chunk_length), layout(model).max_positions)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held on a device so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()
