"""Look-up keys: of every token what the few heads that choose chunks need, apart from all else and contiguous.

A question touches these and nothing else of a document: some 250 bytes a token for the embedded model of 0.5B
parameters, where all its keys and values are 24 KiB. So what lies on disk is chosen from without being read.

    int8, a scale a token      [P key heads, R chunks, C tokens, D]   P: key-value heads that the look-up heads share
    what usual questions pay   [N look-up heads, R, U]                U: their tokens, a logarithm of a sum each

Letters: R chunks, C tokens of a chunk, T of the question, D head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from focusllm.files import whole_file
from focusllm.memory.store import from_int8, to_int8
from focusllm.method.base import layout
from focusllm.method.kv import KV
from focusllm.method.opened import Start, look_up

ROWS_AT_ONCE = 8
"""Chunks that are brought at once for their keys."""
TOKENS_AT_ONCE = 1 << 14
"""Of which keys are unpacked at once."""
KNOWN_STARTS = 16
"""Shared starts behind which the usual questions are kept: few where documents are asked, many where texts go on."""
SURE_HEADS = 4
"""Heads that a chunk is weighed by: those that pay it most."""


@dataclass(frozen=True)
class Heads:
    """What chooses: which query heads, (layer, head) each, with the key-value head that each of them shares."""

    pairs: tuple[tuple[int, int], ...]
    shared: tuple[int, ...]
    usual: tuple[tuple[int, ...], ...] = ()
    """The token ids of questions that any text could be asked. What these pay to a chunk it gets whatever is asked."""

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

    def asking(self, usual: Sequence[Sequence[int]]) -> Heads:
        """The same with usual questions."""
        return replace(self, usual=tuple(map(tuple, usual)))

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


_usual: WeakKeyDictionary[nn.Module, dict[tuple[Heads, tuple[int, ...], int], dict[int, Tensor]]] = WeakKeyDictionary()


def _usual_queries(model: nn.Module, heads: Heads, start: Start | None, longest: int) -> dict[int, Tensor]:
    """Of each layer what the usual questions' tokens ask for [H, U, D], behind chunks of so many tokens; kept with the
    model, for they take as long as reading their tokens does.
    """
    ids, known = start.token_ids if start is not None else (), _usual.setdefault(model, {})
    if (heads, ids, longest) not in known:
        if len(known) >= KNOWN_STARTS:
            del known[next(iter(known))]
        device, asked = next(model.parameters()).device, list[dict[int, Tensor]]()
        for question in heads.usual:
            tokens = torch.tensor(question, device=device)
            asked.append(look_up(model, start, tokens, len(ids) + longest, heads.layers))
        joined = {layer: torch.cat([one[layer] for one in asked], 1).float().cpu() for layer in heads.layers}
        known[heads, ids, longest] = joined
    return known[heads, ids, longest]


@dataclass(eq=False)
class LookupKeys:
    """The look-up keys of R chunks of C tokens."""

    heads: Heads
    packed: Tensor
    scales: Tensor
    usual: Tensor
    """[N, R, U]: for each token of the usual questions the logarithm of what it pays to a chunk, not yet a share of
    what it pays to all: so it holds whatever other chunks there are."""
    usual_start: Tensor
    """[N, U]: the same over the shared start."""
    start: Start | None
    queries: Callable[[], Mapping[int, Tensor]]
    """Of each layer what the usual questions ask for [H, U, D]."""

    @classmethod
    def of(
        cls, model: nn.Module, heads: Heads, num_rows: int, length: int, longest: int, start: Start | None
    ) -> LookupKeys:
        """Room for so many chunks of a model, read behind a start.

        Args:
            longest: tokens of the longest chunk that there may be; all questions are asked from behind that.
        """
        shape, width = (len(heads.key_heads), num_rows, length), layout(model).layers[heads.pairs[0][0]].key_dim
        packed, scales = torch.zeros(*shape, width, dtype=torch.int8), torch.zeros(*shape, 1, dtype=torch.float16)
        num_usual = sum(map(len, heads.usual))
        usual = torch.zeros(len(heads.pairs), num_rows, num_usual)
        queries = partial(_usual_queries, model, heads, start, longest)
        return cls(heads, packed, scales, usual, torch.zeros(len(heads.pairs), num_usual), start, queries)

    def save(self, path: Path, key: str) -> None:
        """Keep them in a file, for a text that is asked again.

        Args:
            key: what they are of (`document_key`).

        Raises:
            OSError: it cannot be written.
        """
        tensors = {name: getattr(self, name).contiguous() for name in KEPT}
        with whole_file(path) as part:
            save_file(tensors, part, metadata={"document": key, "heads": repr(self.heads), "sum": _sum(tensors)})

    @classmethod
    def load(cls, path: Path, key: str, empty: LookupKeys) -> LookupKeys | None:
        """Those in a file; None: it is not there, is damaged, or is of another text or of other heads than `empty`."""
        about, tensors = _content(path)
        wanted = {"document": key, "heads": repr(empty.heads), "sum": _sum(tensors)}
        if about != wanted or any(tensors[name].shape != getattr(empty, name).shape for name in KEPT):
            return None
        kept: Any = {name: tensors[name] for name in KEPT}
        return replace(empty, **kept)

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
        return sum(getattr(self, name).nbytes for name in KEPT)

    def write(self, first: int, kv: KV) -> None:
        """Take what is needed of some chunks' keys [n, K, C, D] a layer."""
        for place, (layer, head) in enumerate(self.heads.key_heads):
            packed, scales = to_int8(kv.keys[layer][:, head])
            self.packed[place, first : first + kv.num_rows] = packed.to(self.packed.device)
            self.scales[place, first : first + kv.num_rows] = scales.to(self.scales.device)
        if self.heads.usual:
            self._ask_usual(first, kv.num_rows)

    def _ask_usual(self, first: int, count: int) -> None:
        """What the usual questions pay to some chunks."""
        queries, part = self.queries(), self.rows(first, first + count)
        place_of = {pair: place for place, pair in enumerate(self.heads.key_heads)}
        for i, ((layer, head), shared) in enumerate(zip(self.heads.pairs, self.heads.shared, strict=True)):
            asked = queries[layer][head]  # [U, D]
            keys = part.unpacked(place_of[layer, shared]).view(count, -1, asked.shape[1])
            self.usual[i, first : first + count] = (asked @ keys.transpose(1, 2)).logsumexp(-1)
            if self.start is not None:
                before = self.start.kv.keys[layer][0, shared].float().cpu()
                self.usual_start[i] = (asked @ before.T).logsumexp(-1)

    def rows(self, start: int, stop: int) -> LookupKeys:
        """Some of the chunks, as views."""
        packed, scales, usual = self.packed[:, start:stop], self.scales[:, start:stop], self.usual[:, start:stop]
        return replace(self, packed=packed, scales=scales, usual=usual)

    def pieces(self) -> Iterator[LookupKeys]:
        """All chunks, so many at a time as are unpacked at once."""
        at_once = max(1, TOKENS_AT_ONCE // max(self.length, 1))
        return (self.rows(first, first + at_once) for first in range(0, self.num_rows, at_once))

    def unpacked(self, place: int) -> Tensor:
        """The keys [R * C, D] of a key head, by its place among `heads.key_heads`."""
        return from_int8(self.packed[place], self.scales[place], torch.float32).flatten(0, 1)


KEPT = ("packed", "scales", "usual", "usual_start")
"""The tensors that a file has."""


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
    """To every chunk [R of all], by the `SURE_HEADS` that pay it most beyond what usual questions do; at least 0."""


def look(keys: Sequence[LookupKeys], queries: Mapping[int, Tensor], start: Start | None) -> Looked:
    """Weigh all chunks by a question.

    A softmax a head and token of the question, over the shared start and all chunks' tokens jointly, so that a chunk
    is weighed against all others; a token of the question that looks nothing up pays the start. A mean over the
    question. Heads also pay for what a chunk is, whatever is asked: what the usual questions pay is subtracted. Of a
    chunk a few heads that are sure of it say more than all of them, so the four that pay it most count.

    Args:
        keys: of the same heads. queries: of each layer [H, T, D], scaled, as `look_up` gives them.
        start: the shared start, if there is one.
    """
    heads, num_start = keys[0].heads, start.length if start is not None else 0
    sizes = [found.num_rows * found.length for found in keys]
    total = torch.zeros(sum(sizes))
    by_head = -_usual_share(keys) if heads.usual else torch.zeros(len(heads.pairs), sum(f.num_rows for f in keys))
    for place, (layer, key_head) in enumerate(heads.key_heads):
        own = [i for i, pair in enumerate(heads.pairs) if (pair[0], heads.shared[i]) == (layer, key_head)]
        asked = torch.stack([queries[layer][heads.pairs[i][1]] for i in own]).float().cpu()  # [n, T, D]
        scores = torch.empty(*asked.shape[:2], num_start + len(total))
        if start is not None:
            scores[..., :num_start] = asked @ start.kv.keys[layer][0, key_head].float().cpu().T
        stop = num_start
        for part in (part for found in keys for part in found.pieces()):
            told = part.unpacked(place)  # [c, D]
            torch.matmul(asked, told.T, out=scores[..., stop : stop + len(told)])
            stop += len(told)
        scores -= scores.logsumexp(-1, keepdim=True)
        for i, own_scores in zip(own, scores, strict=True):
            weights = own_scores.exp_().mean(0)[num_start:]
            total += weights
            rows = zip(torch.split(weights, sizes), keys, strict=True)
            by_head[i] += torch.cat([part.view(-1, found.length).sum(1) for part, found in rows])
    chunks = by_head.topk(min(SURE_HEADS, len(by_head)), 0).values.sum(0).clamp(min=0)
    tokens = [part.view(-1, found.length) for part, found in zip(torch.split(total, sizes), keys, strict=True)]
    return Looked(tokens, chunks)


def looking_bytes(heads: Heads, num_tokens: int, num_asking: int) -> int:
    """What `look` takes in passing: of the query heads that share one key head the scores of every token, twice."""
    most = max(Counter((layer, shared) for (layer, _), shared in zip(heads.pairs, heads.shared, strict=True)).values())
    return 2 * 4 * most * num_asking * num_tokens


def _usual_share(keys: Sequence[LookupKeys]) -> Tensor:
    """What the usual questions pay to each chunk, a mean over their tokens [N, R of all], among these chunks."""
    sums = torch.cat([found.usual for found in keys], 1)
    if keys[0].start is not None:
        sums = torch.cat([keys[0].usual_start[:, None], sums], 1)
    shares = sums.softmax(1).mean(-1)
    return shares[:, 1:] if keys[0].start is not None else shares
