"""The correctness gate: does the method do on this model what it says?

Each check compares two ways to the same numbers. The limit is measured, not felt: a multiple of what the base model
itself differs by when it computes the same thing in two ways (at once, and token by token from its own cache), and of
the resolution of its type, relative to the largest number compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from focusllm.config import FocusConfig
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.memory.chunking import cut
from focusllm.memory.chunks import encode
from focusllm.memory.lookup import middle_heads
from focusllm.method.adapter import AdapterConfig, inject, injected, remove
from focusllm.method.base import run, run_plain
from focusllm.method.focus import Over, candidate_pass, encode_chunks, focus_logits, local_pass, mover, read_prompt
from focusllm.method.kv import KV, Segment, concat
from focusllm.method.opened import opened_logits, read_start

SLACK = 4.0
"""Ways to the same numbers may differ by so many times the base model's own difference."""

Pairs = Iterable[tuple[Tensor, Tensor]]
"""Actual and expected."""


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute error, the limit, and whether it is kept."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Within the limit (a NaN is not)."""
        return self.error <= self.limit


def verify(model: nn.Module, seed: int = 0) -> Iterator[Check]:
    """Run all checks on a model, with short random texts and random candidate projections.

    The model is left as it was found, candidate projections included.

    Raises:
        ModelError: the model is not supported.
    """
    kept = injected(model)
    try:
        with torch.no_grad():
            yield from _checks(model, torch.Generator().manual_seed(seed))
    finally:
        remove(model)
        for path, wrapper in kept.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, wrapper)


def _checks(model: nn.Module, generator: torch.Generator) -> Iterator[Check]:
    device = next(model.parameters()).device
    config = FocusConfig(chunk_length=24, chunk_overlap=4, local_length=16, prompt_length=6, chunks_per_batch=2)
    vocab: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    ids = torch.randint(0, vocab, (3 * 24 + 7 + 16,), generator=generator)
    forced = torch.randint(0, vocab, (2 * config.rechunk_length + 3,), generator=generator).tolist()
    far, local = ids[:-16].tolist(), ids[-16:].tolist()
    ids = ids.to(device)

    remove(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = _logits(model, ids[None])
    noise = (plain[:, 1:] - _token_by_token(model, ids[None])[:, 1:]).abs().max() / plain.abs().max()
    tolerance = SLACK * (noise.item() + 2 * torch.finfo(plain.dtype).eps)

    def tensor(token_ids: list[int]) -> Tensor:
        return torch.tensor(token_ids, device=device)

    def check(name: str, pairs: Pairs, relative: float = tolerance) -> Check:
        error = size = 0.0
        for actual, expected in pairs:
            difference = (actual.double() - expected.double()).abs().max().item()
            error = difference if difference != difference else max(error, difference)
            size = max(size, expected.abs().max().item())
        return Check(name, error, relative * size)

    places = torch.arange(len(ids), device=device)[None]
    ours = run(model, ids[None], places, Over(), logits_to_keep=0)
    assert ours is not None
    yield check("a pass of ours equals base", [(ours, plain)])
    inject(model, AdapterConfig(rank=4))
    yield check("injected but unused equals base", [(_logits(model, ids[None]), plain)], 0.0)
    yield check("untrained low-rank candidate equals base", _untrained(model, ids))
    inject(model, AdapterConfig())
    yield check("untrained full candidate equals base", _untrained(model, ids))
    request = start_request(model, [], local, config)
    local_only = _logits(model, ids[None, -16:])[0]
    yield check("text without far context equals base", [(prefill(model, request, config, 0), local_only)], 0.0)

    for wrapper in injected(model).values():
        for parameter in wrapper.own_parameters().values():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    batched = _run(model, far, local, [], config)
    looped = _run(model, far, local, [], config.replace(chunks_per_batch=1))
    yield check("chunks in batches equal chunks one by one", [(batched, looped)])
    chunks = [tensor(far[first:stop]) for first, stop in cut(len(far), config)]
    steps = _run(model, far, local, forced[:8], config.replace(decoding="exact"))
    anew = [
        focus_logits(model, chunks, tensor(local[-6:] + new), tensor(local + new))[-1]
        for new in (forced[:count] for count in range(9))
    ]
    yield check("exact: step by step equals from nothing", [(steps, torch.stack(anew))])
    yield check("cached: step by step equals two passes a step", _cached_steps(model, far, local, forced[:8], config))
    yield check("past the local context equals a new request", _rechunked(model, far, local, forced, config))
    yield check("keys moved equal keys computed in place", _moved_keys(model, ids[:24]))
    yield check("opened: step by step equals from nothing", _opened(model, far, local, forced[:8], config))

    remove(model)
    state = model.state_dict()
    yield check("removed: weights equal base", [(state[name], tensor) for name, tensor in before.items()], 0.0)
    yield check("removed: logits equal base", [(_logits(model, ids[None]), plain)], 0.0)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def _token_by_token(model: nn.Module, ids: Tensor) -> Tensor:
    """The base model's logits from its own cache, one token at a time."""
    cache = DynamicCache(config=model.config)
    return torch.cat([run_plain(model, ids[:, i : i + 1], cache, 0) for i in range(ids.shape[1])], 1)


def _untrained(model: nn.Module, ids: Tensor) -> Pairs:
    """Candidate keys and values after a chunk, and those of an ordinary last token."""
    chunk = encode_chunks(model, ids[None, :24])
    start = torch.tensor([24], device=ids.device)
    _, candidate = candidate_pass(model, ids[None, 24:30], start, [Segment([chunk])])
    whole = encode_chunks(model, ids[None, :30]).tokens(-1)
    return zip((*candidate.keys, *candidate.values), (*whole.keys, *whole.values), strict=True)


def _run(model: nn.Module, far: list[int], local: list[int], forced: list[int], config: FocusConfig) -> Tensor:
    """Logits [1 + n, V] after prefill and after every forced token."""
    request = start_request(model, encode(model, far, config), local, config)
    rows = [prefill(model, request, config)[-1]]
    rows += [decode(model, [request], [token], config)[0] for token in forced]
    return torch.stack(rows)


def _cached_steps(model: nn.Module, far: list[int], local: list[int], forced: list[int], config: FocusConfig) -> Pairs:
    """The engine's single pass a step, and candidate pass and local pass from nothing over kept local states."""
    device = next(model.parameters()).device
    *full, last = (far[first:stop] for first, stop in cut(len(far), config))
    encoded = [encode_chunks(model, torch.tensor(group, device=device)) for group in (full, [last])]
    count = sum(kv.num_rows for kv in encoded)
    kept: list[KV] = []
    for step, actual in enumerate(_run(model, far, local, forced, config)):
        prompt = torch.tensor(local[-6:] + forced[:step], device=device)
        first, candidates = 0, []
        for kv in encoded:
            candidates.append(read_prompt(model, kv, prompt, first)[1])
            first += kv.num_rows
        new = local if step == 0 else forced[step - 1 : step]
        start = torch.tensor([count + (0 if step == 0 else len(local) + step - 1)], device=device)
        segments = [Segment([concat(candidates, 2)])] + ([Segment([concat(kept, 2)])] if kept else [])
        logits, kv, _ = local_pass(model, torch.tensor([new], device=device), start, segments)
        kept.append(kv)
        yield actual, logits[0, -1]


def _rechunked(model: nn.Module, far: list[int], local: list[int], forced: list[int], config: FocusConfig) -> Pairs:
    """When the local context has overflowed (twice), and a request that starts with the same chunks."""
    request = start_request(model, encode(model, far, config), local, config)
    prefill(model, request, config)
    for token in forced:
        chunks_before = request.num_chunks
        logits = decode(model, [request], [token], config)[0]
        if request.num_chunks > chunks_before:
            fresh = start_request(model, request.blocks, request.local_ids, config)
            yield logits, prefill(model, fresh, config)[-1]


def _opened(model: nn.Module, far: list[int], local: list[int], forced: list[int], config: FocusConfig) -> Pairs:
    """The engine with all chunks open, and the same read from nothing."""
    opened = config.replace(far_context="opened", open_tokens=len(far), chunk_overlap=0, rechunk=False)
    start = read_start(model, local[:4])
    request = start_request(model, encode(model, far, opened, start=start, heads=middle_heads(model)), local, opened)
    steps = [prefill(model, request, opened)[-1]]
    steps += [decode(model, [request], [token], opened)[0] for token in forced]
    assert request.opened is not None
    rows = [row for block in request.blocks for row in block.token_ids]
    seen = [rows[span.chunk] for span in request.opened.spans]
    for count, actual in enumerate(steps):
        new = torch.tensor(local + forced[:count], device=rows[0].device)
        yield actual, opened_logits(model, local[:4], seen, new)[-1]


def _moved_keys(model: nn.Module, ids: Tensor) -> Pairs:
    """Keys computed at positions 0.. and moved by 5, and keys computed at 5.. ."""
    move = mover(model, torch.tensor([[5]], device=ids.device))
    for layer, (here, there) in enumerate(zip(_keys_at(model, ids, 0), _keys_at(model, ids, 5), strict=True)):
        yield move(layer, here), there


def _keys_at(model: nn.Module, ids: Tensor, first: int) -> list[Tensor]:
    attention = Over()
    run(model, ids[None], torch.arange(first, first + len(ids), device=ids.device)[None], attention)
    return attention.kv.keys
