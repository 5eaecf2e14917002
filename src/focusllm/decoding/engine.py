"""The engine: advances a set of requests by one token and returns.

It knows token ids, chunks and a model; nothing of text, files or threads. What a request knows is in its `Request`;
chunks are addressed as blocks that any number of requests share, and are never copied or changed.

    prefill(model, request, config)           -> logits of the last local tokens
    prefilling(model, request, config)        -> the same a batch of rows at a time, for who has other things to do
    decode(model, requests, tokens, config)   -> next-token logits of every request, after one new token each
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from focusllm.config import FocusConfig
from focusllm.decoding import opened
from focusllm.decoding.refresh import RefreshPolicy, Row, hottest
from focusllm.decoding.request import Request, added
from focusllm.errors import ConfigError
from focusllm.memory.chunking import count_chunks
from focusllm.memory.chunks import ChunkBlock, count_alike, encode, tokens_at_once
from focusllm.memory.lookup import Heads
from focusllm.method.adapter import sink_token
from focusllm.method.base import layout, run_plain
from focusllm.method.focus import candidate_pass, decode_pass, local_pass, read_prompt, shown_at, to_slots
from focusllm.method.kv import KV, GrowingKV, Segment, behind_sink, concat, lasting


def start_request(
    model: nn.Module,
    blocks: Sequence[ChunkBlock],
    local_ids: Sequence[int],
    config: FocusConfig,
    prompt_length: int | None = None,
    heads: Heads | None = None,
    word_scores: Tensor | None = None,
) -> Request:
    """A request that is ready for `prefill`; arguments are those of `Request`.

    Raises:
        ConfigError: an empty local context, or lengths beyond the base model's positions.
    """
    if not local_ids:
        raise ConfigError("the local context is empty; give at least one token to decode from.")
    request = Request(list(blocks), _with_bos(local_ids, config), prompt_length, heads, word_scores)
    if config.is_opened and prompt_length is not None:
        request.question_ids = request.local_ids[-opened.num_asking(request, config) :]
    max_positions = layout(model).max_positions
    if request.blocks and config.is_opened:
        opened.check_blocks(request.blocks)
        longest = max(block.length for block in request.blocks)
        num_start = len(request.blocks[0].start_ids)
        opened.check_positions(config, max_positions, num_start, longest, len(request.local_ids))
        return request
    if request.blocks:
        config.check_positions(max_positions)
        config.check_num_chunks(request.num_chunks, max_positions)
    if len(request.local_ids) + _first_place(model, request) > max_positions:
        raise ConfigError(
            f"a local context of {len(request.local_ids)} tokens does not fit into the base model's {max_positions} "
            f"positions; use a smaller local_length."
        )
    return request


@lasting
def prefill(model: nn.Module, request: Request, config: FocusConfig, logits_to_keep: int = 1) -> Tensor:
    """Read the dynamic prompt behind every chunk, or open those that matter; then read the local context.

    Returns:
        Logits [n, V] of the last local tokens (0: of all).
    """
    steps = prefilling(model, request, config, logits_to_keep)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            logits: Tensor = done.value
            return logits


@lasting
def prefilling(
    model: nn.Module, request: Request, config: FocusConfig, logits_to_keep: int = 1
) -> Generator[None, None, Tensor]:
    """`prefill` in steps: stops behind each batch of rows that has read the dynamic prompt, and returns what it does.

    The request must not be decoded, nor be begun anew, before that.
    """
    request.tails, request.hot, request.local_kv, request.plain_kv, request.opened = [], [], None, None, None
    request.paid, request.paid_local, request.local_start, request.watched = None, None, (0, 0), []
    if not request.blocks:
        request.plain_kv = DynamicCache(config=model.config)
        return _plain(model, request, request.local_ids, logits_to_keep)
    if config.is_opened:
        return opened.prefill(model, request, config, logits_to_keep)
    prompt_ids = _dynamic_prompt(request, config)
    request.row_ids = list(prompt_ids)
    prompt = _tensor(model, prompt_ids)
    candidates, first_slot = [], _first_slot(model)
    for block in request.blocks:
        tail: GrowingKV | None = None
        for first, kv in _batches(model, block, len(prompt), config):
            ordinary, lined_up = read_prompt(model, kv, prompt, first_slot)
            tail = tail or GrowingKV(ordinary, block.num_chunks, len(prompt) - 1)
            tail.fill_rows(first, ordinary)
            candidates.append(lined_up)
            first_slot += kv.num_rows
            yield
        assert tail is not None
        tail.length = len(prompt) - 1
        request.tails.append(tail)
    request.candidates = concat(candidates, dim=2)
    if config.decoding == "cached" and config.refresh_rows is not None:
        _choose_hot(model, request, config)
    return _local_from_start(model, request, config, logits_to_keep)


@lasting
def decode(model: nn.Module, requests: Sequence[Request], tokens: Sequence[int], config: FocusConfig) -> Tensor:
    """Append one token to every request.

    Args:
        tokens: one token id a request.

    Returns:
        Next-token logits [B, V], each as if its request had been alone.

    Raises:
        ConfigError: a token would leave the base model's positions; no request has changed.
    """
    logits: dict[int, Tensor] = {}
    together: list[int] = []
    for request in requests:
        _check_room(model, request, config)
    for i, (request, token) in enumerate(zip(requests, tokens, strict=True)):
        request.local_ids.append(token)
        request.num_generated += 1
        if _is_full(request, len(request.local_ids), config):
            logits[i] = _rechunk(model, request, config)
        elif request.blocks:
            together.append(i)
        else:
            logits[i] = _plain(model, request, [token], 1)[-1]
    open_ones = [i for i in together if requests[i].opened is not None]
    if open_ones:
        logits |= dict(zip(open_ones, opened.decode(model, [requests[i] for i in open_ones], config), strict=True))
    together = [i for i in together if requests[i].opened is None]
    side_by_side = [i for i in together if config.decoding == "cached" and _refreshed(requests[i]) is not None]
    if side_by_side:
        advanced = _decode_cached(model, [requests[i] for i in side_by_side], config)
        logits |= dict(zip(side_by_side, advanced, strict=True))
    for i in set(together) - set(side_by_side):
        logits[i] = _decode_in_batches(model, requests[i], config)
    return torch.stack([logits[i] for i in range(len(requests))])


def _decode_cached(model: nn.Module, requests: Sequence[Request], config: FocusConfig) -> Sequence[Tensor]:
    """One forward pass for all rows and the newest local tokens: logits [V] of every request."""
    pairs, start, row = _rows(model, requests)
    newest = _tensor(model, [request.local_ids[-1] for request in requests])
    local_start = _tensor(model, [_first_place(model, request) + len(request.local_ids) - 1 for request in requests])
    local = Segment([request.local_kv for request in requests if request.local_kv is not None])
    candidates = [request.candidates for request in requests if request.candidates is not None]
    slots = [_tensor(model, request.refreshed_slots) for request in requests]
    logits, ordinary, local_kv, paid = decode_pass(
        model, pairs, start, row, newest, local_start, local, candidates, slots, _first_slot(model)
    )
    _keep_ordinary(requests, ordinary)
    for i, request in enumerate(requests):
        assert request.local_kv is not None
        request.local_kv.append(local_kv.rows(i, i + 1))
        _count_attention(model, request, paid[i])
        for rows in request.hot:
            rows.update(model, RefreshPolicy(config.refresh_rows), paid[i][0], request.row_ids)
    return list(logits)


def _decode_in_batches(model: nn.Module, request: Request, config: FocusConfig) -> Tensor:
    """All rows a batch at a time, then the local pass: logits [V]. For `exact`, and for rows that lie elsewhere."""
    pair, slot, candidates = _tensor(model, [[request.row_ids[-1], request.local_ids[-1]]]), _first_slot(model), []
    for block, tail in zip(request.blocks, request.tails, strict=True):
        start = block.length + tail.length
        made: list[KV] = []
        for first, kv in _batches(model, block, 2, config):
            behind = Segment([tail.rows(first, first + kv.num_rows)])
            starts = torch.full((kv.num_rows,), start, device=pair.device)
            ordinary, ours = candidate_pass(model, pair.expand(kv.num_rows, -1), starts, [Segment([kv]), behind])
            made.append(ordinary)
            candidates.append(to_slots(model, ours, starts + 1, slot))
            slot += kv.num_rows
        tail.append(concat(made, 0))
    request.row_ids.append(request.local_ids[-1])
    request.candidates = concat(candidates, dim=2)
    if request.local_kv is None:
        return _local_from_start(model, request, config, 1)[-1]
    newest = _tensor(model, [request.local_ids[-1:]])
    place = _tensor(model, [_first_place(model, request) + len(request.local_ids) - 1])
    segments = Segment([request.candidates]), Segment([request.local_kv])
    segments = behind_sink(*segments) if _first_slot(model) else segments
    logits, kv, paid = local_pass(model, newest, place, segments)
    request.local_kv.append(kv)
    _count_attention(model, request, paid[0])
    return logits[0, -1]


def _batches(model: nn.Module, block: ChunkBlock, num_tokens: int, config: FocusConfig) -> Iterator[tuple[int, KV]]:
    """The rows of a block, as many at once as bound the scratch memory: (index of the first, keys and values).

    As many tokens at once as while the chunks were read, if each row takes `num_tokens` more; of rows that must be
    brought first at most `chunks_per_batch`.
    """
    at_once = max(1, tokens_at_once(config, block.token_ids.device) // num_tokens)
    if block.resident is None:
        at_once = min(at_once, config.chunks_per_batch)
    return block.batches(model, at_once)


def _rows(model: nn.Module, requests: Sequence[Request]) -> tuple[Tensor, Tensor, list[Segment]]:
    """What the rows of all requests read now: pairs [R, 2], their first positions [R], and what the rows hold."""
    pairs, starts, blocks = [], [], []
    for request in requests:
        pair = torch.tensor([request.row_ids[-1], request.local_ids[-1]])
        for kv, tail in _refreshed(request) or []:
            pairs.append(pair.expand(kv.num_rows, -1))
            starts.append(torch.full((kv.num_rows,), kv.length + tail.length))
            blocks.append((kv, tail))
    device = next(model.parameters()).device
    row = [Segment([kv for kv, _ in blocks]), Segment([tail for _, tail in blocks])]
    return torch.cat(pairs).to(device), torch.cat(starts).to(device), row


def _refreshed(request: Request) -> list[tuple[KV, GrowingKV]] | None:
    """The rows that a decode step reads, block by block: chunks and what is behind them, or nothing and both in one.
    None: not all can be at once, for they lie elsewhere.
    """
    if request.hot:
        return [(rows.nothing_before, rows.kv) for rows in request.hot]
    found = [(block.resident, tail) for block, tail in zip(request.blocks, request.tails, strict=True)]
    whole = [(kv, tail) for kv, tail in found if kv is not None]
    return whole if len(whole) == len(found) else None


def _choose_hot(model: nn.Module, request: Request, config: FocusConfig) -> None:
    """Choose the rows that are read at every token, by what the dynamic prompt would pay to each.

    The local context is read without any candidate for that: many that have nothing to say change what it asks for.
    Where none need to be chosen, all are hot if some lie elsewhere, so as to be brought once and not for every token.
    """
    is_focused = config.is_focused(max(count_alike(request.blocks).values()))
    if not is_focused and all(block.resident is not None for block in request.blocks):
        return
    attention = torch.zeros(request.num_chunks, device=next(model.parameters()).device)
    if is_focused:
        attention = _read_local(model, request, [], watch=len(request.row_ids))[2][0][0]
    rows: list[Row] = []
    for block, tail in zip(request.blocks, request.tails, strict=True):
        read = tail.filled()
        for i in range(block.num_chunks):
            rows.append(Row(block.part(i, i + 1), read.rows(i, i + 1), len(rows)))
    request.hot = hottest(model, rows, attention, RefreshPolicy(config.refresh_rows))


def _keep_ordinary(requests: Sequence[Request], ordinary: KV) -> None:
    """Append the token that is an ordinary one now to every row; the newest one will be in the next step."""
    first = 0
    for request in requests:
        request.row_ids.append(request.local_ids[-1])
        for _, tail in _refreshed(request) or []:
            tail.append(ordinary.rows(first, first + tail.num_rows))
            first += tail.num_rows


def _local_from_start(model: nn.Module, request: Request, config: FocusConfig, logits_to_keep: int) -> Tensor:
    """Decoding begins: the local context sees the refreshed rows' candidates. Logits [n, V]."""
    logits, kv, paid = _read_local(model, request, request.refreshed_slots, logits_to_keep)
    _count_attention(model, request, paid[0])
    if config.decoding == "cached":
        request.local_kv = GrowingKV(kv, 1, kv.length)
        request.local_kv.append(kv)
    return logits[0]


def _read_local(
    model: nn.Module, request: Request, slots: Sequence[int], logits_to_keep: int = 1, watch: int = 1
) -> tuple[Tensor, KV, list[Tensor]]:
    """The local pass over the whole local context, which sees the candidates at `slots`; the others are scored."""
    assert request.candidates is not None
    start, local = _tensor(model, [_first_place(model, request)]), _tensor(model, [request.local_ids])
    shown = shown_at(_tensor(model, slots), request.num_chunks)
    segments = [Segment([request.candidates], shown=[shown])]
    return local_pass(model, local, start, segments, logits_to_keep, sink_token(model), watch)


def _plain(model: nn.Module, request: Request, token_ids: Sequence[int], logits_to_keep: int) -> Tensor:
    """The base model alone: logits [n, V]."""
    return run_plain(model, _tensor(model, [token_ids]), request.plain_kv, logits_to_keep)[0]


def _rechunk(model: nn.Module, request: Request, config: FocusConfig) -> Tensor:
    """Turn the oldest local tokens into new chunks and go on as a new request would: next-token logits [V]."""
    moved, kept = request.local_ids[: -config.local_length], request.local_ids[-config.local_length :]
    new = opened.more_chunks(model, request, moved, config) if config.is_opened else encode(model, moved, config)
    request.blocks, request.local_ids = request.blocks + new, _with_bos(kept, config)
    paid_before, paid_local, (place, first) = request.paid, request.paid_local, request.local_start
    watched = request.watched
    logits = prefill(model, request, config)[-1]
    if paid_before is not None and request.paid is not None:
        request.paid[: len(paid_before)] += paid_before
    start = len(request.local_ids) - len(kept), first + len(moved) - place
    if paid_local is not None and request.paid_local is not None:
        request.paid_local, request.local_start = added(paid_local, request.paid_local, start), start
    if watched:
        local = added(torch.zeros_like(watched[0].local), request.watched[0].local, start)
        request.watched, request.local_start = [*watched, replace(request.watched[0], local=local)], start
    return logits


def _is_full(request: Request, num_local_tokens: int, config: FocusConfig) -> bool:
    """Whether the oldest of so many local tokens become chunks; not where the base model alone reads such a text."""
    is_plain = not request.blocks and config.is_plain(num_local_tokens)
    return config.rechunk and num_local_tokens >= config.max_local_length and not is_plain


def _check_room(model: nn.Module, request: Request, config: FocusConfig) -> None:
    """Refuse one more token where it, or the chunks that it makes of the oldest ones, would leave the positions."""
    max_positions, count = layout(model).max_positions, len(request.local_ids) + 1
    if _is_full(request, count, config):
        if config.is_opened:
            num_start = len(request.blocks[0].start_ids) if request.blocks else config.start_length
            opened.check_positions(config, max_positions, num_start)
            return
        config.check_positions(max_positions)
        num_new = count_chunks(count - config.local_length, config)
        config.check_num_chunks(request.num_chunks + num_new, max_positions)
        return
    taken = _first_place(model, request) + count
    for block in request.blocks:
        taken = max(taken, block.length + len(request.row_ids) + 1)
    if taken > max_positions:
        raise ConfigError(
            f"the next token needs position {taken}, but the base model has {max_positions}; use a smaller "
            f"{'local_length' if config.rechunk else 'chunk_length, or set rechunk=True'}."
        )


def _first_slot(model: nn.Module) -> int:
    """Position of the first candidate in the local pass: behind the sink, if there is one."""
    return int(sink_token(model) is not None)


def _first_place(model: nn.Module, request: Request) -> int:
    """Position of the first local token: behind sink and candidates."""
    if request.opened is not None:
        return request.opened.far.length
    return request.num_chunks + _first_slot(model) if request.blocks else 0


def _dynamic_prompt(request: Request, config: FocusConfig) -> list[int]:
    """The tail of the local context that is read behind every chunk, never longer than a chunk."""
    length = min(config.most_prompt_tokens, request.prompt_length or config.prompt_length)
    local = request.local_ids
    if config.bos_token_id is not None:  # counted without the token that was put in front of the local context
        length = min(length, config.local_length)
    return _with_bos(local[-length:], config)


def _with_bos(token_ids: Sequence[int], config: FocusConfig) -> list[int]:
    ids = list(token_ids)
    return ids if config.bos_token_id is None or ids[0] == config.bos_token_id else [config.bos_token_id, *ids]


def _count_attention(model: nn.Module, request: Request, paid: Tensor) -> None:
    """Add what a token paid to the candidates, and to the local context behind the sink."""
    num_chunks = request.num_chunks
    request.count_attention(paid[0, :num_chunks], paid[0, num_chunks + _first_slot(model) :])


def _tensor(model: nn.Module, ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)
