"""Look-up keys: of every token what the few heads that choose chunks need, apart from all else and contiguous.

A question touches these and nothing else of a document: some 250 bytes a token for the embedded model of 0.5B
parameters, where all its keys and values are 24 KiB. So what lies on disk is chosen from without being read.

    int8, a scale a token      [P key heads, R chunks, C tokens, D]   P: key-value heads that the look-up heads share

Letters: R chunks, C tokens of a chunk, T of the question, D head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from focusllm.files import whole_file
from focusllm.memory.store import from_int8, to_int8
from focusllm.method.base import layout
from focusllm.method.kv import KV
from focusllm.method.opened import Start

ROWS_AT_ONCE = 8
"""Chunks that are brought at once for their keys."""
SURE_HEADS = 4
"""Heads that a chunk is weighed by: those that pay it most."""


@dataclass(frozen=True)
class Heads:
    """Which query heads choose: (layer, head) each, and the key-value head that each of them shares."""

    pairs: tuple[tuple[int, int], ...]
    shared: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, pairs: Sequence[tuple[int, int]]) -> Heads:
        """Heads of a model."""
        layers = layout(model).layers
        shared = (head * layers[layer].num_kv_heads // layers[layer].num_heads for layer, head in pairs)
        return cls(tuple(pairs), tuple(shared))

    @property
    def key_heads(self) -> list[tuple[int, int]]:
        """The (layer, key-value head) pairs whose keys are kept, each once."""
        return sorted({(layer, key_head) for (layer, _), key_head in zip(self.pairs, self.shared, strict=True)})

    @property
    def layers(self) -> set[int]:
        """The layers that they lie in."""
        return {layer for layer, _ in self.pairs}


def middle_heads(model: nn.Module) -> Heads:
    """Where nothing was found out about a model: all heads of the layers from a quarter to five eighths.

    Heads that look things up lie there in the models that were looked at (arXiv 2506.09944, 2602.22591).
    """
    able, found = choosing_layers(model), layout(model)
    middle = able[len(able) // 4 : max(len(able) * 5 // 8, 1)]
    return Heads.of(model, [(i, head) for i in middle for head in range(found.layers[i].num_heads)])


def choosing_layers(model: nn.Module) -> list[int]:
    """The layers whose heads may choose: those that see all chunks, with keys of one width."""
    layers = layout(model).layers
    able = [i for i, layer in enumerate(layers) if layer.window is None] or list(range(len(layers)))
    (width, _), *_ = Counter(layers[i].key_dim for i in able).most_common(1)
    return [i for i in able if layers[i].key_dim == width]


@dataclass(eq=False)
class LookupKeys:
    """The look-up keys of R chunks of C tokens."""

    heads: Heads
    packed: Tensor
    scales: Tensor

    @classmethod
    def of(cls, model: nn.Module, heads: Heads, num_rows: int, length: int) -> LookupKeys:
        """Room for so many chunks of a model."""
        shape, width = (len(heads.key_heads), num_rows, length), layout(model).layers[heads.pairs[0][0]].key_dim
        packed = torch.zeros(*shape, width, dtype=torch.int8)
        return cls(heads, packed, torch.zeros(*shape, 1, dtype=torch.float16))

    def save(self, path: Path, key: str) -> None:
        """Keep them in a file, for a text that is asked again.

        Args:
            key: what they are of (`document_key`).

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"packed": self.packed.contiguous(), "scales": self.scales.contiguous()}
        with whole_file(path) as part:
            save_file(tensors, part, metadata={"document": key, "heads": repr(self.heads), "sum": _sum(tensors)})

    @classmethod
    def load(cls, path: Path, key: str, empty: LookupKeys) -> LookupKeys | None:
        """Those in a file; None: it is not there, is damaged, or is of another text or of other heads than `empty`."""
        about, tensors = _content(path)
        wanted = {"document": key, "heads": repr(empty.heads), "sum": _sum(tensors)}
        if about != wanted or tensors["packed"].shape != empty.packed.shape:
            return None
        return cls(empty.heads, tensors["packed"], tensors["scales"])

    @property
    def num_rows(self) -> int:
        """R."""
        return self.packed.shape[1]

    @property
    def length(self) -> int:
        """C."""
        return self.packed.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.packed.nbytes + self.scales.nbytes

    def write(self, first: int, kv: KV) -> None:
        """Take what is needed of some chunks' keys [n, K, C, D] a layer."""
        for place, (layer, head) in enumerate(self.heads.key_heads):
            packed, scales = to_int8(kv.keys[layer][:, head])
            self.packed[place, first : first + kv.num_rows] = packed.to(self.packed.device)
            self.scales[place, first : first + kv.num_rows] = scales.to(self.scales.device)

    def rows(self, start: int, stop: int) -> LookupKeys:
        """Some of the chunks, as views."""
        return LookupKeys(self.heads, self.packed[:, start:stop], self.scales[:, start:stop])

    def unpacked(self, place: int) -> Tensor:
        """The keys [R * C, D] of a key head, by its place among `heads.key_heads`."""
        return from_int8(self.packed[place], self.scales[place], torch.float32).flatten(0, 1)


def is_whole(path: Path, key: str) -> bool:
    """Whether a file holds what was written into it for a key, whichever heads it is of."""
    about, tensors = _content(path)
    return about.get("document") == key and about.get("sum") == _sum(tensors)


def _content(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file says of itself, and its tensors; empty: it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}, {}


def _sum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Looked:
    """What the look-up heads pay for a question."""

    tokens: list[Tensor]
    """To every token, all heads together: one [R, C] for each of the blocks that were looked at."""
    chunks: Tensor
    """To every chunk [R of all], by the `SURE_HEADS` that pay it most."""


def look(keys: Sequence[LookupKeys], queries: Mapping[int, Tensor], start: Start | None) -> Looked:
    """Weigh all chunks by a question.

    A softmax a head and token of the question, over the shared start and all chunks' tokens jointly, so that a chunk
    is weighed against all others; a token of the question that looks nothing up pays the start. A mean over the
    question. Of a chunk a few heads that are sure of it say more than all of them: by the four that pay it most the
    right one of 24 came first in 23 of 24 questions, by the mean of all heads in 3 (docs/log.md, 2026-11-30).

    Args:
        keys: of the same heads. queries: of each layer [H, T, D], scaled, as `look_up` gives them.
        start: the shared start, if there is one.
    """
    heads, num_start = keys[0].heads, start.length if start is not None else 0
    total, by_head = torch.zeros(sum(found.num_rows * found.length for found in keys)), list[Tensor]()
    sizes = [found.num_rows * found.length for found in keys]
    for place, (layer, key_head) in enumerate(heads.key_heads):
        parts = [start.kv.keys[layer][0, key_head].float().cpu()] if start is not None else []
        told = torch.cat([*parts, *(found.unpacked(place) for found in keys)])  # [S + R * C, D]
        for (own_layer, head), shared in zip(heads.pairs, heads.shared, strict=True):
            if (own_layer, shared) != (layer, key_head):
                continue
            scores = queries[layer][head].float().cpu() @ told.T
            weights = scores.softmax(-1).mean(0)[num_start:]
            total += weights
            rows = zip(torch.split(weights, sizes), keys, strict=True)
            by_head.append(torch.cat([part.view(-1, found.length).sum(1) for part, found in rows]))
    chunks = torch.stack(by_head).topk(min(SURE_HEADS, len(by_head)), 0).values.sum(0)
    tokens = [part.view(-1, found.length) for part, found in zip(torch.split(total, sizes), keys, strict=True)]
    return Looked(tokens, chunks)
