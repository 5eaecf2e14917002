"""FocusLLM in one file (arXiv 2408.11745): read chunks side by side, condense each into a candidate, decode.

     far context                                        local context           next token
    +---------+---------+ ... +---------+   +--------------------------------+
    | chunk 1 | chunk 2 |     | chunk R |   |          ... | dynamic prompt  |---> ?
    +---------+---------+     +---------+   +--------------------------------+
        |          |               |            |
        v          v               v            |
    encode_chunks: each chunk alone, all at once, by the frozen base  ->  chunk KV [R, K, C, D] a layer
        |          |               |            |
        v          v               v            |
    candidate_pass: behind every chunk  [ chunk i | dynamic prompt ]
                    the last token of the prompt is the candidate: it alone is projected by the trainable
                    q, k, v, o. Its key and value, at every layer, are chunk i condensed for this very moment.
        |          |               |            |
        v          v               v            v
    to_slots:   [ cand 1 | cand 2 | ... | cand R ]   keys moved from their positions in the rows to slots 0..R-1
        |
        v
    local_pass (frozen):  [ cand 1 .. cand R | local context at positions R, R+1, ... ]  ->  logits

A decode step repeats the candidate pass with two tokens a row, [previous token, newest token]: the previous one is an
ordinary token now and stays in the row; the newest one is the new candidate and does not. Then the local pass gives the
next token: over the whole local context again (`exact`, the paper), or over the newest token alone, attending to the
kept keys and values of the local context (`cached`). Cached, both passes are short, and `decode_pass` runs them as one:
layer by layer, the rows make their candidates and the newest local token attends to them.

If the projections were trained behind a sink, the local pass begins with that token, which sees no candidates: it is at
position 0, the candidates at 1..R, the local context behind them.

Pure functions over (model, tensors). No tokenizer, no files, no state. Differentiable in the candidate projections:
ordinary tokens never see them, so chunks are encoded without a graph and gradients flow through the candidates and
the local pass only.

Letters: R chunks (rows), C tokens of a chunk, P of the dynamic prompt, W of the local context, K key-value heads,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focusllm.method.adapter import sink_token
from focusllm.method.attention import attend
from focusllm.method.base import layout, run
from focusllm.method.kv import KV, Segment, behind_sink, concat, hidden_from_first, lasting
from focusllm.method.passes import PassEnded
from focusllm.method.rope import move_keys, rotation
from focusllm.method.scoring import Scoring


class Over:
    """Attention of a pass to segments of earlier tokens and to itself; keeps the new keys and values.

    With `last_layer`, the pass ends as soon as it has those of that layer: nothing else of it is wanted.
    """

    def __init__(
        self,
        segments: Sequence[Segment] = (),
        watch: int = 0,
        own_mask: Tensor | None = None,
        last_layer: int | None = None,
        watched_layers: Collection[int] | None = None,
    ):
        self.segments, self.watch, self.own_mask, self.last_layer = segments, watch, own_mask, last_layer
        self.watched_layers, self.kv, self.paid = watched_layers, KV([], []), list[Tensor]()

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        """One layer's attention (see `LayerAttention`)."""
        self.kv.keys.append(key)
        self.kv.values.append(value)
        if layer == self.last_layer:
            raise PassEnded
        watch = self.watch if self.watched_layers is None or layer in self.watched_layers else 0
        out, paid = attend(query, key, value, [s.layer(layer) for s in self.segments], self.own_mask, how, watch)
        if paid:
            self.paid = [a + b for a, b in zip(self.paid, paid, strict=True)] if self.paid else paid
        return out


@lasting
def encode_chunks(model: nn.Module, chunk_ids: Tensor) -> KV:
    """Read R chunks of equal length by the base model, each as if it were the whole text (paper section 3.1).

    The result depends on a chunk's own tokens only: not on other chunks, not on a question, not on the adapter.

    Args:
        chunk_ids: [R, C].

    Returns:
        [R, K, C, D] a layer, keys at positions 0..C-1.
    """
    attention = Over(last_layer=_last_layer(model))
    run(model, chunk_ids, torch.arange(chunk_ids.shape[1], device=chunk_ids.device)[None], attention)
    return attention.kv


def candidate_pass(model: nn.Module, tokens: Tensor, start: Tensor, row: Sequence[Segment]) -> tuple[KV, KV]:
    """Continue R rows by the same few tokens; the last one becomes each row's candidate (paper section 3.2).

    Args:
        tokens: [R, T], the dynamic prompt at first, then [previous token, newest token].
        start: [R], position of the first of these tokens in each row.
        row: what the rows hold already, as segments: chunk, then earlier prompt and generated tokens.

    Returns:
        Keys and values of the T - 1 ordinary tokens, to be kept in the rows; and of the candidates [R, K, 1, D],
        keys at the candidates' positions in the rows, start + T - 1.
    """
    attention = Over(row, last_layer=_last_layer(model))
    positions = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    run(model, tokens, positions, attention, candidates=slice(tokens.shape[1] - 1, tokens.shape[1]))
    return attention.kv.tokens(0, -1), attention.kv.tokens(-1)


def _last_layer(model: nn.Module) -> int:
    return len(layout(model).layers) - 1


def to_slots(model: nn.Module, candidates: KV, positions: Tensor, first_slot: int = 0) -> KV:
    """Line candidates up for the local pass: row i's key goes from its position in the row to slot first_slot + i.

    Args:
        candidates: [R, K, 1, D] a layer.
        positions: [R], where the candidate keys are.

    Returns:
        [1, K, R, D] a layer, in the order of the rows.
    """
    delta = first_slot + torch.arange(candidates.num_rows, device=positions.device) - positions
    lined_up = candidates.map(lambda tensor: tensor.transpose(0, 2))
    move = mover(model, delta[None])
    return KV([move(i, key) for i, key in enumerate(lined_up.keys)], lined_up.values)


def mover(model: nn.Module, delta: Tensor) -> Callable[[int, Tensor], Tensor]:
    """A function of (layer, keys [B, K, T, D]) that moves keys by delta [B, T] positions."""
    found = layout(model)
    turns = {rotary: rotation(delta, rotary.inv_freq.to(delta.device)) for rotary in found.rotaries}
    of_layer = [turns[layer.rotary] if layer.rotary else None for layer in found.layers]
    return lambda i, keys: keys if (turn := of_layer[i]) is None else move_keys(keys, turn, found.interleaved)


def local_pass(
    model: nn.Module,
    tokens: Tensor,
    start: Tensor,
    segments: Sequence[Segment],
    logits_to_keep: int = 1,
    sink: int | None = None,
    watch: int = 1,
    watched_layers: Collection[int] | None = None,
) -> tuple[Tensor, KV, list[Tensor]]:
    """Decode from the candidates and the local context, by the base model (paper section 3.3).

    Args:
        tokens: [B, T], the whole local context, or the newest tokens when the earlier ones are among the segments.
        start: [B], position of the first of them: the number of candidates plus the local tokens before it.
        segments: the candidates first, then (cached decoding) the local context's kept keys and values.
        logits_to_keep: how many of the last tokens get logits; 0: all.
        sink: a token to be read first, at position 0: it sees no candidates, the others see it. For whole local
            contexts; `start` counts it.
        watch: how many of the newest tokens are watched, and in which layers; None: in all.

    Returns:
        Logits [B, n, V]; keys and values of these tokens (the sink's first); and what the watched ones paid to the
        candidates, a mean of them, and the newest one to all other tokens up to itself: one [rows, R + tokens] a block,
        summed over layers (empty while gradients are recorded).
    """
    positions = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    if sink is not None:
        logits_to_keep = logits_to_keep or tokens.shape[1]
        tokens, positions = F.pad(tokens, (1, 0), value=sink), F.pad(positions, (1, 0))
        segments = [hidden_from_first(segment, tokens.shape[1]) for segment in segments]
    attention = Over(segments, watch if segments and not torch.is_grad_enabled() else 0, watched_layers=watched_layers)
    logits = run(model, tokens, positions, attention, logits_to_keep=logits_to_keep)
    assert logits is not None
    return logits, attention.kv, attention.paid


def decode_pass(
    model: nn.Module,
    pairs: Tensor,
    start: Tensor,
    row: Sequence[Segment],
    newest: Tensor,
    local_start: Tensor,
    local: Segment,
    candidates: Sequence[KV],
    slots: Sequence[Tensor],
    first_slot: int = 0,
) -> tuple[Tensor, KV, KV, list[Tensor]]:
    """A cached decode step of B requests in one forward pass: `candidate_pass`, `to_slots` and `local_pass` at once.

    The weights are read once instead of twice. All tokens travel as one sequence, [previous, newest] of every row and
    then the B newest local tokens, and are told apart in the attention only.

    Args:
        pairs, start, row: as `candidate_pass` takes them, T = 2, the rows of all requests one after another.
        newest: [B], the requests' newest tokens. local_start: [B], their positions in the local pass.
        local: the local contexts' kept keys and values, a block a request.
        candidates: each request's candidate set [1, K, R_b, D] a layer, changed in place at `slots`.
        slots: which of its slots each request's rows belong to. The newest token sees these; the others keep what they
            hold and are only scored.
        first_slot: position of the first slot; behind a sink, which is the first of the kept local tokens, it is 1.

    Returns:
        Logits [B, V]; the rows' ordinary tokens [R, K, 1, D]; the newest local tokens [B, K, 1, D]; and what each paid
        to its candidates and local tokens [1, R_b + tokens], summed over layers.
    """
    rows, counts = pairs.shape[0], [len(own) for own in slots]
    move = mover(model, (torch.cat(list(slots)) + first_slot - (start + 1))[None])
    seen = Segment(candidates, shown=[shown_at(own, kv.length) for own, kv in zip(slots, candidates, strict=True)])
    if first_slot:
        seen, local = behind_sink(seen, local)
    over_rows, local_kv = Over(row), KV([], [])
    totals: list[Tensor] = []

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        all_of = (query, key, value)
        q_rows, k_rows, v_rows = (x[0, :, : 2 * rows].reshape(-1, rows, 2, x.shape[3]).transpose(0, 1) for x in all_of)
        q, k, v = (x[0, :, 2 * rows :].transpose(0, 1)[:, :, None] for x in all_of)  # [B, heads, 1, D]
        out_rows = over_rows(layer, q_rows, k_rows, v_rows, how.at(at_rows))  # [R, H, 2, D]
        lined_up = move(layer, key[:, :, 1 : 2 * rows : 2])  # [1, K, R, D]
        made = torch.split(lined_up, counts, 2), torch.split(value[:, :, 1 : 2 * rows : 2], counts, 2)
        for kv, own_slots, own_keys, own_values in zip(candidates, slots, *made, strict=True):
            kv.keys[layer].index_copy_(2, own_slots, own_keys)
            kv.values[layer].index_copy_(2, own_slots, own_values)
        local_kv.keys.append(k)
        local_kv.values.append(v)
        own = how.at(local_start[:, None])
        out_local, paid = attend(q, k, v, [seen.layer(layer), local.layer(layer)], None, own, 1)
        totals[:] = [a + b for a, b in zip(totals, paid, strict=True)] if totals else paid
        flat = [out_rows.transpose(0, 1).flatten(1, 2), out_local[:, :, 0].transpose(0, 1)]
        return torch.cat(flat, 1)[None]

    tokens = torch.cat([pairs.flatten(), newest])[None]
    at_rows = torch.stack([start, start + 1], 1)
    positions = torch.cat([at_rows.flatten(), local_start])[None]
    keep = torch.arange(2 * rows, 2 * rows + len(newest), device=tokens.device)
    logits = run(model, tokens, positions, attention, candidates=slice(1, 2 * rows, 2), logits_to_keep=keep)
    assert logits is not None
    return logits[0], over_rows.kv.tokens(0, 1), local_kv, totals


def shown_at(slots: Tensor, num_slots: int) -> Tensor | None:
    """Which of so many slots [R] are seen where only those at `slots` are; None: all of them."""
    if len(slots) == num_slots:
        return None
    return torch.zeros(num_slots, dtype=torch.bool, device=slots.device).index_fill_(0, slots, True)


def read_prompt(model: nn.Module, chunk_kv: KV, prompt: Tensor, first_slot: int = 0) -> tuple[KV, KV]:
    """The first candidate pass: put the dynamic prompt behind R chunks and line their candidates up.

    Args:
        chunk_kv: [R, K, C, D] a layer, from `encode_chunks`.
        prompt: [P].

    Returns:
        Keys and values of the P - 1 ordinary prompt tokens [R, K, P - 1, D], and the candidates [1, K, R, D].
    """
    start = torch.full((chunk_kv.num_rows,), chunk_kv.length, device=prompt.device)
    ordinary, candidates = candidate_pass(model, prompt.expand(chunk_kv.num_rows, -1), start, [Segment([chunk_kv])])
    return ordinary, to_slots(model, candidates, start + len(prompt) - 1, first_slot)


def focus_logits(
    model: nn.Module, chunks: Sequence[Tensor], prompt: Tensor, local: Tensor, logits_to_keep: int = 1
) -> Tensor:
    """The whole method once, from nothing: the definition that every faster path is compared with.

    Args:
        chunks: R tensors [C_i] of token ids, in order; lengths may differ.
        prompt: [P], the dynamic prompt. local: [W], the local context.

    Returns:
        Logits [n, V] of the last tokens of the local context; differentiable in the candidate projections.
    """
    groups: list[list[Tensor]] = []
    for chunk in chunks:  # neighbours of equal length are read together
        if groups and len(groups[-1][0]) == len(chunk):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    candidates: list[KV] = []
    sink = sink_token(model)
    first_slot = int(sink is not None and bool(chunks))
    for group in groups:
        candidates.append(read_prompt(model, encode_chunks(model, torch.stack(group)), prompt, first_slot)[1])
        first_slot += len(group)
    segments = [Segment([concat(candidates, dim=2)])] if candidates else []
    start = torch.tensor([first_slot], device=local.device)
    return local_pass(model, local[None], start, segments, logits_to_keep, sink if chunks else None)[0][0]
