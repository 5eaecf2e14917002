"""Requests whose far context is opened (`method.opened`): which chunks, and one token a step.

    prefill: look up  ->  open the best  ->  read the local context
    decode:  the newest token attends to what is open and to the kept local context; now and then look again

What is open is a copy of the request's own, keys moved to where they are seen; the chunks stay as they are, shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from focusllm.config import FocusConfig
from focusllm.decoding.request import Opened, OpenSpan, Request, Watched, added
from focusllm.errors import ConfigError
from focusllm.memory.chunking import split_start
from focusllm.memory.chunks import ChunkBlock, encode
from focusllm.memory.lookup import Looked, look, middle_heads
from focusllm.method.base import layout
from focusllm.method.focus import local_pass, mover
from focusllm.method.kv import GrowingKV, Segment
from focusllm.method.opened import lay_out, look_up, read_start

SMOOTHING = 60
"""Of the reciprocals of places, as in the paper: the first place is worth little more than the second."""
EQUALS = 1e-9
"""Less than most sums of reciprocals differ by, unless they are of the same places."""


def prefill(model: nn.Module, request: Request, config: FocusConfig, logits_to_keep: int) -> Tensor:
    """Open what the question asks for, then read the local context: logits [n, V]."""
    request.opened = _open(model, request, config)
    local = torch.tensor([request.local_ids], device=request.blocks[0].token_ids.device)
    start = torch.tensor([request.opened.far.length], device=local.device)
    watched = request.blocks[0].lookup_layers
    far = Segment([request.opened.far])
    logits, kv, paid = local_pass(model, local, start, [far], logits_to_keep, watched_layers=watched)
    request.local_kv = GrowingKV(kv, 1, kv.length)
    request.local_kv.append(kv)
    _watch(request, paid[0])
    return logits[0]


def decode(model: nn.Module, requests: Sequence[Request], config: FocusConfig) -> Sequence[Tensor]:
    """Read every request's newest local token, all in one pass: next-token logits [V] of each."""
    far, local, places = [], [], []
    for request in requests:
        opened, local_kv = request.opened, request.local_kv
        assert opened is not None
        assert local_kv is not None
        if config.look_again is not None and len(request.local_ids) - opened.looked_at >= config.look_again:
            request.opened = _open(model, request, config)
            _move(model, local_kv, request.opened.far.length - opened.far.length)
            opened = request.opened
        far.append(opened.far)
        local.append(local_kv)
        places.append(opened.far.length + len(request.local_ids) - 1)
    device = requests[0].blocks[0].token_ids.device
    newest = torch.tensor([request.local_ids[-1:] for request in requests], device=device)
    segments, place = [Segment(far), Segment(local)], torch.tensor(places, device=device)
    watched = requests[0].blocks[0].lookup_layers
    logits, kv, paid = local_pass(model, newest, place, segments, watched_layers=watched)
    for i, request in enumerate(requests):
        local[i].append(kv.rows(i, i + 1))
        _watch(request, paid[i])
    return list(logits[:, -1])


def read_on(model: nn.Module, request: Request, tokens: Sequence[int]) -> Tensor:
    """Read several local tokens at once, without looking up anew: logits [T, V] behind each."""
    assert request.opened is not None
    assert request.local_kv is not None
    new = torch.tensor([list(tokens)], device=request.blocks[0].token_ids.device)
    place = torch.tensor([request.opened.far.length + len(request.local_ids)], device=new.device)
    segments = [Segment([request.opened.far]), Segment([request.local_kv])]
    logits, kv, _ = local_pass(model, new, place, segments, logits_to_keep=0, watch=0)
    request.local_kv.append(kv)
    request.local_ids.extend(tokens)
    return logits[0]


def check_settings(config: FocusConfig, max_positions: int) -> None:
    """Check that settled settings stay inside a base model's positions, opened or condensed, before there is a text.

    Raises:
        ConfigError: naming the settings and what would fit.
    """
    if config.is_opened:
        check_positions(config, max_positions, config.start_length)
    else:
        config.check_positions(max_positions)


def check_positions(
    config: FocusConfig, max_positions: int, num_start: int, longest: int | None = None, num_local: int = 0
) -> None:
    """Check that start, what is opened and the local context stay inside a base model's positions.

    Args:
        num_start: tokens of the shared start. longest: of the chunks; None: as configured.
        num_local: tokens of the local context, if it is longer than it will be kept.

    Raises:
        ConfigError: with the largest budget or chunk that fits.
    """
    local, longest = max(config.max_local_length, num_local), config.chunk_length if longest is None else longest
    room = max_positions - num_start - local
    if budget_of(config, room) > room or room < 1:
        fits = f"an open_tokens of at most {room}" if room > 0 else "a smaller local_length"
        raise ConfigError(
            f"a start of {num_start} tokens, open_tokens {budget_of(config, room)} and up to {local} local tokens take "
            f"more than the base model's {max_positions} positions; use {fits}."
        )
    room = max_positions - num_start - config.most_prompt_tokens
    if longest > room:
        raise ConfigError(
            f"a start of {num_start} tokens, a chunk of {longest} and a question of {config.most_prompt_tokens} take "
            f"more than the base model's {max_positions} positions; use a chunk_length of at most {max(room, 1)}."
        )


def check_blocks(blocks: Sequence[ChunkBlock]) -> None:
    """Check that chunks can be opened together.

    Raises:
        ConfigError: some were read to be condensed, or behind other starts, or are chosen by other heads.
    """
    hows = {(block.start_ids, block.lookup.heads if block.lookup is not None else None) for block in blocks}
    if len(hows) > 1 or any(heads is None for _, heads in hows):
        raise ConfigError("the documents were not all read alike to be opened; read them again, all by one model.")


def budget_of(config: FocusConfig, room: int) -> int:
    """How many tokens are open at most: by default one chunk, or what of it there are positions for."""
    return max(min(config.chunk_length, room), 1) if config.open_tokens is None else config.open_tokens


def more_chunks(model: nn.Module, request: Request, token_ids: Sequence[int], config: FocusConfig) -> list[ChunkBlock]:
    """The oldest local tokens as chunks, read behind the start that the others were read behind, or that they have."""
    if request.blocks:
        start, rest, lookup = request.blocks[0].start, list(token_ids), request.blocks[0].lookup
        heads = lookup.heads if lookup is not None else None
    else:
        first, rest = split_start(token_ids, config)
        start, heads = read_start(model, first), request.heads
    return encode(model, rest, config, start=start, heads=heads or middle_heads(model))


def _open(model: nn.Module, request: Request, config: FocusConfig) -> Opened:
    """Look up what the newest local tokens ask for, and open it."""
    start, num_start = request.blocks[0].start, len(request.blocks[0].start_ids)
    local = max(config.max_local_length, len(request.local_ids))
    budget = budget_of(config, layout(model).max_positions - num_start - local)
    spans = choose(looked(model, request, config), request.blocks, config, budget, request.word_scores)
    if request.opened is not None and spans == request.opened.spans:
        return replace(request.opened, looked_at=len(request.local_ids))
    found = []
    for span in spans:
        block, row = _row(request.blocks, span.chunk)
        found.append((block.rows(model, row, row + 1).tokens(span.first, span.stop), num_start + span.first))
    return Opened(spans, lay_out(model, start, found), len(request.local_ids))


def _move(model: nn.Module, local_kv: GrowingKV, delta: int) -> None:
    """The local context stands right behind what is open, however long that is."""
    if delta:
        local_kv.move(mover(model, torch.tensor([[delta]], device=local_kv.keys[0].device)))


def num_asking(request: Request, config: FocusConfig) -> int:
    """Most tokens at the end of the local context that chunks are chosen by."""
    return min(config.most_prompt_tokens, request.prompt_length or config.prompt_length)


def looked(model: nn.Module, request: Request, config: FocusConfig) -> Looked:
    """What the look-up heads pay to the far context for what is asked: by the newest local tokens, or by a question
    and what was generated since.
    """
    keys = [block.lookup for block in request.blocks if block.lookup is not None]
    start, device = request.blocks[0].start, request.blocks[0].token_ids.device
    most = num_asking(request, config)
    num_newest = min(request.num_generated, most) if request.question_ids else most
    newest = request.local_ids[-num_newest:] if num_newest > 0 else []
    question = [*request.question_ids, *newest]
    behind = config.chunk_length + len(request.blocks[0].start_ids)
    asked = look_up(model, start, torch.tensor(question, device=device), behind, keys[0].heads.layers)
    return look(keys, asked, start)


def choose(
    found: Looked,
    blocks: Sequence[ChunkBlock],
    config: FocusConfig,
    budget: int,
    word_scores: Tensor | None = None,
) -> list[OpenSpan]:
    """What to open, in the order of the text: the chunks with the most weight, as many as the budget holds.

    Of a chunk that is larger than the budget, the part around its most important tokens. Where neighbours are open,
    the second leaves out what both have in common.

    Args:
        found: as `looked` gives it. budget: most tokens; without one of its own (`open_tokens`) for one chunk alone.
        word_scores: see `Request`; chunks that came since have none.
    """
    rows = [row for block in found.tokens for row in block]
    room, chosen = budget, list[OpenSpan]()
    for chunk in fused(found.chunks, word_scores).argsort(descending=True, stable=True).tolist():
        if len(rows[chunk]) <= room:
            chosen.append(OpenSpan(chunk, 0, len(rows[chunk])))
            room -= len(rows[chunk])
            if config.open_tokens is None:
                break
        elif not chosen:
            chosen.append(_around(rows[chunk], chunk, room))
            break
    return _joined(sorted(chosen, key=lambda span: span.chunk), blocks, config.overlap)


def fused(by_heads: Tensor, word_scores: Tensor | None) -> Tensor:
    """What every chunk is worth by look-up heads [R] and by words [<= R]: the reciprocals of its places in both orders,
    added (Cormack and others, SIGIR 2009). What gets nothing has no place; of equals words decide, which tell names
    apart that heads take for one another.
    """
    if word_scores is None or not word_scores.any():
        return by_heads
    by_words = by_heads.new_zeros(len(by_heads), dtype=torch.float64)
    by_words[: len(word_scores)] = word_scores.to(by_words)
    total = by_words * (EQUALS / by_words.max())
    for scores in (by_heads, by_words):
        order = scores.argsort(descending=True, stable=True)
        places = torch.arange(1, len(order) + 1, dtype=torch.float64, device=order.device)
        total[order] += (scores[order] > 0) / (SMOOTHING + places)
    return total


def _around(weights: Tensor, chunk: int, length: int) -> OpenSpan:
    """The run of so many tokens with the most weight."""
    sums = weights.double().cumsum(0)
    runs = sums[length - 1 :] - torch.cat([sums.new_zeros(1), sums[:-length]])
    first = int(runs.argmax())
    return OpenSpan(chunk, first, first + length)


def _joined(spans: list[OpenSpan], blocks: Sequence[ChunkBlock], overlap: int) -> list[OpenSpan]:
    """The same without what a chunk has in common with the one before it, where both are open."""
    found: list[OpenSpan] = []
    for span in spans:
        before = found[-1] if found else None
        if before is not None and before.chunk == span.chunk - 1:
            end = _ids(blocks, before.chunk)[: before.stop][-overlap:] if overlap else []
            common = overlap if end == _ids(blocks, span.chunk)[:overlap] else 0  # else of another text
            span = OpenSpan(span.chunk, max(span.first, common), span.stop)
        if span.length > 0:
            found.append(span)
    return found


def _ids(blocks: Sequence[ChunkBlock], chunk: int) -> list[int]:
    block, row = _row(blocks, chunk)
    ids: list[int] = block.token_ids[row].tolist()
    return ids


def _row(blocks: Sequence[ChunkBlock], chunk: int) -> tuple[ChunkBlock, int]:
    """The block that a chunk lies in, and its row there."""
    for block in blocks:
        if chunk < block.num_chunks:
            return block, chunk
        chunk -= block.num_chunks
    raise IndexError(chunk)


def _watch(request: Request, paid: Tensor) -> None:
    """Keep what the newest token paid to the tokens of what is open and of the local context [1, T]."""
    assert request.opened is not None
    far, spans = request.opened.far, request.opened.spans
    first = far.length - sum(span.length for span in spans)
    local, began = paid[0, far.length :].cpu(), request.watched[0].local if request.watched else None
    if began is not None:
        local = added(torch.zeros_like(began), local, request.local_start)
    request.watched.append(Watched(spans, paid[0, first : far.length].cpu(), local))
