"""Finding a model's look-up heads: which few heads, asked a question, attend to the chunk that answers it.

    made-up facts hidden in a text  ->  chunks, each read behind the start
    each question                   ->  queries of all layers  ->  what every head pays to every chunk, beyond what it
                                                                   pays when the usual questions are asked
    heads                           ->  by how often, and how clearly, the right chunk comes first

Half of the questions find the heads, the other half tell how good these are together. The text is the Python language
reference, which every Python carries; facts and questions are `needles`, never those of an evaluation.
(Few heads, found by few examples, choose better than all of them or the mean: arXiv 2506.09944, 2510.02219.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from focusllm.checks.needles import Needle, needles
from focusllm.documents.text import encode_ids, frame_ids, frame_question, usual_ids
from focusllm.errors import ModelError
from focusllm.memory.lookup import SURE_HEADS, Heads, choosing_layers
from focusllm.method.base import layout
from focusllm.method.opened import Start, look_up, read_behind, read_start

Keys = list[Tensor]
"""A chunk's, [1, K, C, D] a layer."""
NUM_HEADS = 8
FACTS_A_CHUNK = 4


@dataclass(frozen=True)
class Found:
    """Look-up heads, and how good they are on questions that were not used to find them."""

    heads: Heads
    right_first: float
    right_among_four: float
    all_heads_first: float
    """What the mean of all heads reaches."""
    num_questions: int
    """Held-out ones."""
    num_chunks: int


def find_heads(
    model: nn.Module,
    tokenizer: Any,
    num_questions: int = 64,
    chunk_length: int = 512,
    num_heads: int = NUM_HEADS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Find the heads of a model that chunks are to be chosen by.

    Args:
        num_questions: facts that are hidden; half of them find the heads.
        chunk_length: of the chunks that they are hidden in.
        progress: called with (steps done, steps in all).

    Raises:
        ModelError: the model has fewer heads than are asked for, or a chunk holds no fact.
    """
    able = [(i, head) for i in choosing_layers(model) for head in range(layout(model).layers[i].num_heads)]
    if num_heads > len(able):
        raise ModelError(f"num_heads is {num_heads}, but the model has {len(able)} heads to choose by; ask for fewer.")
    hidden = needles(np.random.default_rng(0), num_questions)
    rows, right = _hide(hidden, tokenizer, chunk_length)
    usual = usual_ids(tokenizer)
    start_ids, steps = frame_ids(tokenizer)[0], len(rows) + len(hidden) + len(usual)
    start, chunks = read_start(model, start_ids), list[Keys]()
    device = next(model.parameters()).device
    for i, row in enumerate(rows):
        chunks.append(read_behind(model, start_ids, torch.tensor([row], device=device)).keys)
        progress(i + 1, steps)
    paid = []
    for i, question in enumerate([*(frame_question(tokenizer, needle.question)[1] for needle in hidden), *usual]):
        paid.append(_paid(model, start, chunks, torch.tensor(question, device=device)))
        progress(len(rows) + i + 1, steps)
    asked, anyway = torch.stack(paid[: len(hidden)]), torch.stack(paid[len(hidden) :]).mean(0)
    best, first, among_four = _best(asked - anyway, torch.tensor(right), num_heads)
    by_all = _recall(asked[1::2].mean(1), torch.tensor(right)[1::2], 1)
    heads = Heads.of(model, [able[i] for i in best])
    return Found(heads, first, among_four, by_all, num_questions=len(hidden) // 2, num_chunks=len(chunks))


def _hide(hidden: Sequence[Needle], tokenizer: Any, chunk_length: int) -> tuple[list[list[int]], list[int]]:
    """Chunks of one length with the facts in them, and in which of them each is. Neighbouring facts lie far apart, so
    that a head which likes a part of the text is not taken for one that looks up.
    """
    from pydoc_data.topics import topics

    facts = [encode_ids(tokenizer, f" {needle.statement}") for needle in hidden]
    a_chunk = min(FACTS_A_CHUNK, chunk_length // (2 * max(map(len, facts))))  # at least half of a chunk is other text
    if not a_chunk:
        raise ModelError(f"chunks of {chunk_length} tokens have no room for a fact; use longer ones.")
    num_chunks = max(2, -(-len(hidden) // a_chunk))
    filler = encode_ids(tokenizer, "\n".join(topics[name] for name in sorted(topics)))
    rng = np.random.default_rng(1)
    right = [int(place) for place in rng.permutation(np.arange(len(hidden)) % num_chunks)]
    rows = []
    for chunk in range(num_chunks):
        own = [fact for fact, at in zip(facts, right, strict=True) if at == chunk]
        room = chunk_length - sum(map(len, own))
        body, last, row = filler[chunk * chunk_length :][:room], 0, list[int]()
        for cut, fact in zip(sorted(rng.integers(0, room, len(own)).tolist()), own, strict=True):
            row += [*body[last:cut], *fact]
            last = cut
        rows.append(row + body[last:])
    return rows, right


def _paid(model: nn.Module, start: Start | None, chunks: Sequence[Keys], question: Tensor) -> Tensor:
    """What every head that may choose pays to every chunk, a mean over the question: [heads, R]."""
    able, num_start = choosing_layers(model), start.length if start is not None else 0
    asked = look_up(model, start, question, num_start + chunks[0][0].shape[2], able)
    paid = []
    for layer in able:
        before = [start.kv.keys[layer][0]] if start is not None else []
        keys = torch.cat([*before, *(keys[layer][0] for keys in chunks)], 1).float()
        queries = asked[layer].float().view(keys.shape[0], -1, *asked[layer].shape[1:])
        weights = (queries @ keys[:, None].transpose(2, 3)).softmax(-1).mean(2).flatten(0, 1)[:, num_start:]
        paid.append(weights.view(len(weights), len(chunks), -1).sum(-1))
    return torch.cat(paid)


def _best(paid: Tensor, right: Tensor, num_heads: int) -> tuple[list[int], float, float]:
    """The best heads by every other question [Q, heads, R]; tried on the others, how often the right chunk comes first
    and among four.
    """
    learn, held_out = slice(0, None, 2), slice(1, None, 2)
    each = torch.arange(len(right[learn]))
    to_right = paid[learn][each, :, right[learn]]
    first = (paid[learn].argmax(-1) == right[learn][:, None]).float().mean(0)
    best = (first + to_right.mean(0) / 1000).topk(num_heads).indices  # of equals, the one that is surer

    sure = paid[held_out][:, best].topk(min(SURE_HEADS, num_heads), 1).values.sum(1)
    return sorted(best.tolist()), _recall(sure, right[held_out], 1), _recall(sure, right[held_out], 4)


def _recall(weights: Tensor, right: Tensor, count: int) -> float:
    """How often the right chunk is among so many of the heaviest [Q, R]."""
    chosen = weights.topk(min(count, weights.shape[-1])).indices
    return float((chosen == right[:, None]).any(-1).float().mean())
