"""Chunks opened: the other way in which the local context sees the far context. Nothing is trained; any model can.

      shared start     chunks: each is read alone behind the start, all at once        local context
     +------------+   +---------+---------+ ... +---------+                        +------------------+
     |    start   |   | chunk 1 | chunk 2 |     | chunk R |                        |     question     |
     +------------+   +---------+---------+     +---------+                        +------------------+
            |               |         |              |                                     |
            |               +---------+------<-------+--- look_up: which tokens would a -----+
            |                         |                   few look-up heads attend to?
            v                         v
     +------------+-------------+-------------+------------------+
     |    start   |   chunk 2   |   chunk 7   |  local context   |---> next token
     +------------+-------------+-------------+------------------+
       lay_out: the keys of what is opened are moved to consecutive positions, in the order of the text;
       local_pass (`focus.py`): the local context attends to all tokens of it, and to itself.

It is a mask over the unchanged base model: a chunk sees the start and itself, the local context sees the start, what is
opened, and itself. The start (a chat template's head, or the first tokens of a text) is there once: read apart, chunks
would each take part of their beginning for the beginning of the text (arXiv 2412.16545, 2502.05431). A decode step is
one token. What is opened can be copied word for word; what is not is not seen, so that opening serves looking up, and
condensing (`focus.py`), which sees all chunks at once, does not need to know where to look.

Letters: S tokens of the start, R chunks of C tokens, T of the question, H query heads, K key-value heads, D dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from focusllm.method.base import run
from focusllm.method.focus import Over, encode_chunks, local_pass, mover
from focusllm.method.kv import KV, Segment, concat, lasting
from focusllm.method.passes import PassEnded
from focusllm.method.scoring import Scoring


@dataclass(frozen=True, eq=False)
class Start:
    """The shared start: its tokens, and their keys and values [1, K, S, D] a layer at positions 0..S-1."""

    token_ids: tuple[int, ...]
    kv: KV

    @property
    def length(self) -> int:
        """S."""
        return len(self.token_ids)


def read_start(model: nn.Module, start_ids: Sequence[int]) -> Start | None:
    """Read a shared start; None: there are no tokens for one."""
    if not start_ids:
        return None
    ids = torch.tensor([list(start_ids)], device=next(model.parameters()).device)
    return Start(tuple(start_ids), encode_chunks(model, ids))


@lasting
def read_behind(model: nn.Module, start_ids: Sequence[int], chunk_ids: Tensor) -> KV:
    """Read R chunks of equal length, each alone behind the start.

    The start is read again in every row: it is short, and one pass without earlier tokens is the fastest there is.

    Args:
        chunk_ids: [R, C].

    Returns:
        [R, K, C, D] a layer, keys at positions S..S+C-1.
    """
    if not start_ids:
        return encode_chunks(model, chunk_ids)
    start = torch.tensor(list(start_ids), dtype=chunk_ids.dtype, device=chunk_ids.device)
    rows = torch.cat([start.expand(len(chunk_ids), -1), chunk_ids], 1)
    return encode_chunks(model, rows).tokens(len(start))


@torch.no_grad()
def look_up(
    model: nn.Module, start: Start | None, question: Tensor, position: int, layers: Collection[int]
) -> dict[int, Tensor]:
    """What a question asks for: the queries of some layers, behind the start and at one distance from all chunks.

    Rotated to a place behind the longest chunk, so that where a chunk stands in its text plays no part. The pass ends
    with the last of these layers.

    Args:
        question: [T]. position: of its first token, S + C of the longest chunk.

    Returns:
        For each layer the queries [H, T, D], scaled as the model scales its scores.
    """
    found: dict[int, Tensor] = {}
    at_start = [torch.arange(start.length, device=question.device)] if start is not None else []
    behind = Over([Segment([start.kv], positions=at_start)] if start is not None else [])
    last = max(layers)

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        if layer in layers:
            found[layer] = query[0] * how.scale
        if layer == last:
            raise PassEnded
        return behind(layer, query, key, value, how)

    positions = torch.arange(position, position + len(question), device=question.device)
    run(model, question[None], positions[None], attention)
    return found


def lay_out(model: nn.Module, start: Start | None, pieces: Sequence[tuple[KV, int]]) -> KV:
    """[start | piece | piece ...] at consecutive positions: keys [1, K, S + sum of n, D] a layer.

    Args:
        pieces: keys and values [1, K, n, D] a layer of what is opened, in order, and the position of the first key.
    """
    parts, place = ([start.kv], start.length) if start is not None else ([], 0)
    for kv, position in pieces:
        move = mover(model, torch.tensor([[place - position]], device=kv.keys[0].device))
        parts.append(KV([move(i, key) for i, key in enumerate(kv.keys)], kv.values))
        place += kv.length
    return concat(parts, 2)


def opened_logits(
    model: nn.Module, start_ids: Sequence[int], chunks: Sequence[Tensor], local: Tensor, logits_to_keep: int = 1
) -> Tensor:
    """The whole way once, from nothing: the definition that every faster path is compared with.

    Args:
        start_ids: the shared start; may be empty. chunks: what is opened, [C_i] token ids each, in order.
        local: [W], the local context.

    Returns:
        Logits [n, V] of the last tokens of the local context.
    """
    start = read_start(model, start_ids)
    far = lay_out(model, start, [(read_behind(model, start_ids, chunk[None]), len(start_ids)) for chunk in chunks])
    place = torch.tensor([far.length], device=local.device)
    return local_pass(model, local[None], place, [Segment([far])], logits_to_keep)[0][0]
