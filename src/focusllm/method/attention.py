"""Attention over segments: earlier tokens that lie in several places, read where they lie.

    query of new tokens  --->  [ segment 1 | segment 2 | ... | the new tokens themselves ]

Keys and values are neither joined nor copied, and key-value heads are not repeated for the query heads that share
them (but by the kernel for NVIDIA GPUs). Few queries (decoding; in 2-byte types on a CPU prompts behind chunks too):
scores of all segments under one softmax, by batched matrix products. Many queries: a flash kernel a segment (on an
NVIDIA GPU the memory-efficient one, which takes masks), results merged exactly through the logarithms of their
softmax sums (as flash attention joins its tiles, arXiv 2205.14135). Chunks alone: in bfloat16 on a CPU by products, a
block of queries at a time; on a GPU by torch's own kernel. With gradients: joined, one differentiable call; but
2-byte types on a CPU by products again (`differentiable`).

What a layer does besides (`Scoring`): a sliding window is a mask made of positions, where it hides anything at all; a
cap on scores goes by products, for no kernel has it; a learned sink is one more score a head, of a value of nothing.

Pure functions over tensors. Letters: B rows, H query heads, K key-value heads, T new tokens, S earlier ones, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from focusllm.method.differentiable import (
    Part,
    bias_of,
    by_formula,
    by_products,
    by_torch,
    flash,
    repeated,
    without_cudnn,
)
from focusllm.method.kv import Block, LayerSegment, lasting
from focusllm.method.scoring import Scoring, with_sinks, within

QUERY_BLOCK = 128
"""Queries of a product in `_causal_by_blocks`: its scores stay in the caches."""
FEW_QUERIES = 16
"""Up to so many queries a key-value head, scores are computed by plain products."""
FEW_QUERIES_2_BYTES = 256
"""The same on a CPU for 2-byte types, whose products are faster there than the flash kernel's own."""
SCORES_AT_ONCE = 2**21
"""Most scores of a product with few queries on a CPU, if rows can be taken apart: they stay in the caches."""
SCORES_BY_FORMULA = 2**26
"""Most scores of many queries without a flash kernel, if rows can be taken apart: 256 MiB in float32, three times."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[LayerSegment | tuple[Sequence[Block], Tensor | None]],
    mask: Tensor | None,
    scale: float | Scoring,
    watch: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Attention of new tokens to segments of earlier ones and to themselves.

    Args:
        query: [B, H, T, D]. key, value: [B, K, T, D], of the same new tokens.
        segments: earlier tokens; all segments are cut into blocks at the same rows.
        mask: [T, T] or [B, T, T], True where a new token sees a new token; None: causal.
        scale: factor of the scores, or all that makes weights of them.
        watch: report what so many of the newest tokens pay to the first segment, and would pay to what they do not see
            (not to what is outside their window); and what the newest one pays to all others, up to itself.

    Returns:
        The result [B, H, T, D]; and if watched, one [rows, S + others] a block of the first segment, a mean over heads
        and tokens (the sum over what is seen is the share of their attention that it got).
    """
    how = scale if isinstance(scale, Scoring) else Scoring(scale)
    parts = [LayerSegment(*segment) for segment in segments]
    earlier = [tensor for part in parts for block in part.blocks for tensor in block[:2]]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value, *earlier)):
        few = query.device.type == "cpu" and query.dtype.itemsize == 2
        joined = _parts(key, value, parts, mask, how)
        if how.softcap is not None or how.sinks is not None:
            return by_formula(query, joined, how), []
        return by_products(query, joined, how.scale) if few else _attend_joined(query, joined, how.scale), []
    if not parts:
        return _attend_own(query, key, value, mask, how), []
    own = _own_mask(mask, how, key)
    outs: list[Tensor] = []
    paid: list[Tensor | None] = []
    start = 0
    for index, first_block in enumerate(parts[0].blocks):
        rows = slice(start, start + first_block[0].shape[0])
        masks = _masks(parts, index, rows, how)
        past = [  # without what is empty, unless it is watched
            (*part.blocks[index], mask_of)
            for number, (part, mask_of) in enumerate(zip(parts, masks, strict=True))
            if part.blocks[index][2] or (watch and number == 0)
        ]
        is_plain = how.window is not None or (own is None and all(m is None for *_, m in past))
        partly = _attend_few if _are_few(query, key.shape[1]) and is_plain else _attend_many
        out, share = partly(query[rows], key[rows], value[rows], past, _mask_of(own, rows), how, watch)
        outs.append(out)
        paid.append(share)
        start = rows.stop
    return torch.cat(outs) if outs[1:] else outs[0], [share for share in paid if share is not None]


def _attend_own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: Scoring) -> Tensor:
    """Attention of new tokens to each other alone."""
    on_cpu, is_long = query.device.type == "cpu", query.shape[2] > QUERY_BLOCK
    by_blocks = (on_cpu and (query.dtype == torch.bfloat16 or how.window is not None)) or how.softcap is not None
    if by_blocks and is_long and mask is None:
        return _causal_by_blocks(query, key, value, how)
    by_torch_alone = query.dtype.itemsize == 2 or not _has_flash(query, value)  # else it would keep all scores
    if not on_cpu and mask is None and how.is_plain and by_torch_alone:  # nothing to merge with
        return _causal_by_torch(query, key, value, how.scale)
    own = _own_mask(mask, how, key)
    out, lse = _partial(query, key, value, own, own is None, how)
    return out if how.sinks is None else out * (lse - with_sinks(lse, how.sinks)).exp()[..., None].to(out.dtype)


def _own_mask(mask: Tensor | None, how: Scoring, key: Tensor) -> Tensor | None:
    """What new tokens see of each other; None: causal."""
    if how.window is None:
        return mask
    if mask is None:
        mask = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    assert how.positions is not None
    return mask & within(how.window, how.positions, how.positions)


def _masks(segments: Sequence[LayerSegment], index: int, rows: slice, how: Scoring) -> list[Tensor | None]:
    """What some rows see of their block of each segment, the window included; None: all."""
    given = [_mask_of(segment.mask, rows) for segment in segments]
    if how.window is None:
        return given
    assert how.positions is not None
    queries = how.positions if len(how.positions) == 1 else how.positions[rows]
    lengths = [segment.blocks[index][2] for segment in segments]
    masks: list[Tensor | None] = []
    for number, (segment, mask) in enumerate(zip(segments, given, strict=True)):
        if segment.positions is not None:
            keys = segment.positions[index]
        elif int(queries[0, 0]) != sum(lengths):
            raise ValueError("segments that do not fill the positions before the new tokens must say their own.")
        else:
            keys = sum(lengths[:number]) + torch.arange(lengths[number], device=queries.device)
        near = within(how.window, queries, keys)
        masks.append(near if mask is None else mask & near)
    return masks


Past = Sequence[tuple[Tensor, Tensor, int, Tensor | None, Tensor | None]]
"""Keys, values, length, what is seen and mask of each segment, for one block of rows."""


def _are_few(query: Tensor, num_kv_heads: int) -> bool:
    """Whether plain products are the faster way to the scores."""
    fast = query.device.type == "cpu" and query.dtype.itemsize == 2
    return query.shape[1] // num_kv_heads * query.shape[2] <= (FEW_QUERIES_2_BYTES if fast else FEW_QUERIES)


def _attend_few(
    query: Tensor, key: Tensor, value: Tensor, past: Past, mask: Tensor | None, how: Scoring, watch: int
) -> tuple[Tensor, Tensor | None]:
    """One softmax over the scores of all segments, causal among the new tokens; so many rows at once as caches hold."""
    rows, heads, length, _ = query.shape
    at_once = max(1, SCORES_AT_ONCE // (heads * length * (length + sum(k.shape[2] for k, *_ in past))))
    if query.device.type == "cpu" and rows > at_once:
        return _some_rows_at_once(_attend_few, at_once, query, key, value, past, mask, how, watch)
    packed = _packed(query * how.scale, key.shape[1]).flatten(0, 1)  # [B * K, G * T, D]
    values = [v.flatten(0, 1) for _, v, *_ in past] + [value.flatten(0, 1)]
    scores = []
    for past_key, _, count, *_ in past:
        # Over the whole room, for a batched product would copy a part of it.
        scores.append(how.capped(torch.bmm(packed, past_key.flatten(0, 1).transpose(1, 2))))
        if count < past_key.shape[2]:
            scores[-1][..., count:] = -torch.inf
    scores.append(how.capped(torch.bmm(packed, key.flatten(0, 1).transpose(1, 2))))
    if length > 1 and mask is None:
        scores[-1].masked_fill_(_later_tokens(length, heads // key.shape[1], query.device), -torch.inf)
    sink = [] if how.sinks is None else [_sink_scores(how.sinks, packed, key.shape[1], length)]
    joined = torch.cat([*scores, *sink], -1)
    by_token = joined.view(rows, -1, length, joined.shape[-1])  # [B, H, T, S]
    start = 0
    for past_key, _, count, seen, visible in past:
        if seen is not None:
            joined[..., start : start + count].masked_fill_(~seen, -torch.inf)
        if visible is not None:
            by_token[..., start : start + count].masked_fill_(_hidden(visible), -torch.inf)
        start += past_key.shape[2]
    if mask is not None:
        by_token[..., start : start + length].masked_fill_(_hidden(mask), -torch.inf)
    weights = joined.softmax(-1)
    share = None
    if watch:
        first = weights[..., : past[0][2]]
        if past[0][3] is not None:
            first = _paid(scores[0][..., : past[0][2]].float(), joined.float().logsumexp(-1, keepdim=True))
        first = _mean(first.reshape(rows, heads, length, -1)[:, :, -watch:].float(), past[0][4])
        newest = weights.view(rows, heads, length, -1)[:, :, -1].float().mean(1)
        rooms = [part.shape[1] for part in values]  # over the whole room, as the scores are; a sink is behind them
        _, *others = torch.split(newest[:, : sum(rooms)], rooms, -1)
        counts = [*(count for _, _, count, *_ in past[1:]), length]
        share = torch.cat([first, *(part[:, :count] for part, count in zip(others, counts, strict=True))], -1)
    out, start = None, 0
    for part in values:
        product = torch.bmm(weights[..., start : start + part.shape[1]], part)
        out, start = product if out is None else out + product, start + part.shape[1]
    assert out is not None
    return out.view(rows, heads, length, -1), share


def _attend_many(
    query: Tensor, key: Tensor, value: Tensor, past: Past, mask: Tensor | None, how: Scoring, watch: int
) -> tuple[Tensor, Tensor | None]:
    """A partial result a segment, merged by their softmax sums; by the formula few rows at once, for its scores."""
    rows, heads, length, _ = query.shape
    at_once = max(1, SCORES_BY_FORMULA // (heads * length * (length + sum(k.shape[2] for k, *_ in past))))
    by_formula_alone = how.softcap is not None or not _has_flash(query, value)
    if by_formula_alone and rows > at_once:
        return _some_rows_at_once(_attend_many, at_once, query, key, value, past, mask, how, watch)
    parts = [
        _partial(query, k[:, :, :n], v[:, :, :n], _masked(m, seen, length), False, how)
        for k, v, n, seen, m in past
        if n
    ]
    parts.append(_partial(query, key, value, mask, mask is None, how))
    lse = with_sinks(torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0), how.sinks)
    merged = parts[0][0] * (parts[0][1] - lse).exp()[..., None]
    for out, part_lse in parts[1:]:
        merged = merged + out * (part_lse - lse).exp()[..., None]
    share = None
    if watch:
        shares = [_paid_to(past[0][0][:, :, : past[0][2]], query[:, :, -watch:], lse, past[0][4], how)]
        others = [(k[:, :, :n], _masked(m, seen, length)) for k, _, n, seen, m in past[1:]] + [(key, mask)]
        shares += [_paid_to(k, query[:, :, -1:], lse, m, how) for k, m in others]
        share = torch.cat(shares, -1)
    return merged.to(query.dtype), share


def _paid_to(key: Tensor, newest: Tensor, lse: Tensor, visible: Tensor | None, how: Scoring) -> Tensor:
    """What the newest n queries [B, H, n, D] pay to keys, masked ones nothing: a mean over heads and queries [B, S]."""
    scores = _packed(newest.to(lse.dtype), key.shape[1]) @ key.to(lse.dtype).transpose(-1, -2) * how.scale
    scores = how.capped(scores.reshape(*newest.shape[:3], -1))  # [B, H, n, S]
    return _mean(_paid(scores, lse[:, :, -newest.shape[2] :, None]), visible)


def _paid(scores: Tensor, lse: Tensor) -> Tensor:
    """What keys get of the attention to all that is seen, or would get beside it: the latter bounded, far beyond what
    matters, so that sums and means of it stay finite.
    """
    return (scores - lse).clamp(max=20).exp()


def _mean(paid: Tensor, visible: Tensor | None) -> Tensor:
    """What the last tokens paid [rows, H, n, S], a mean over heads and tokens: nothing to what a mask hides."""
    if visible is not None:
        paid = paid.masked_fill(_hidden(visible[..., -paid.shape[2] :, :]), 0)
    return paid.mean((1, 2))


def _hidden(visible: Tensor) -> Tensor:
    """A mask [T, S] or [rows, T, S] the other way round, for all heads."""
    return ~visible if visible.dim() == 2 else ~visible[:, None]


def _sink_scores(sinks: Tensor, packed: Tensor, num_kv_heads: int, length: int) -> Tensor:
    """The sinks' scores [H] beside those of packed queries [B * K, G * T, D]: [B * K, G * T, 1]."""
    by_head = sinks.to(packed.dtype).view(num_kv_heads, -1, 1).expand(-1, -1, length)
    return by_head.reshape(num_kv_heads, -1, 1).repeat(len(packed) // num_kv_heads, 1, 1)


def _some_rows_at_once(
    partly: Callable[..., tuple[Tensor, Tensor | None]],
    at_once: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: Past,
    mask: Tensor | None,
    how: Scoring,
    watch: int,
) -> tuple[Tensor, Tensor | None]:
    """`_attend_few` or `_attend_many`, a part of the rows after another."""
    parts = []
    for start in range(0, query.shape[0], at_once):
        some = slice(start, start + at_once)
        own = [(k[some], v[some], n, seen, _mask_of(m, some)) for k, v, n, seen, m in past]
        parts.append(partly(query[some], key[some], value[some], own, _mask_of(mask, some), how, watch))
    shares = [share for _, share in parts if share is not None]
    return torch.cat([out for out, _ in parts]), torch.cat(shares) if shares else None


def _mask_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    """A mask of some rows; one without rows, [T, S] or [1, T, S], is that of all."""
    return mask if mask is None or mask.dim() == 2 or len(mask) == 1 else mask[rows]


def _masked(mask: Tensor | None, seen: Tensor | None, length: int) -> Tensor | None:
    """What a query sees [T, S] or [rows, T, S] of what is seen [S] at all."""
    if seen is None:
        return mask
    return seen.expand(length, -1) if mask is None else mask & seen


def _causal_by_blocks(query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
    """Causal attention of long rows to themselves, in blocks of queries.

    In bfloat16 on a CPU products are several times faster than the flash kernel's own, and what is later than a block
    is left out; reading chunks takes 0.88 of the time (benchmarks/reading_attention.py). So is what is before a window.
    """
    rows, heads, length, width = query.shape
    num_kv_heads, out = key.shape[1], query.new_empty(rows, heads, length, value.shape[3])
    query = query * how.scale
    for row in range(rows):
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            first = 0 if how.window is None else max(0, start + 1 - how.window)  # positions grow by one at least
            packed = query[row, :, start:end].reshape(num_kv_heads, -1, width)  # [K, G * T, D]
            scores = how.capped(torch.bmm(packed, key[row, :, first:end].transpose(1, 2)))
            later = _later_tokens(end - start, heads // num_kv_heads, query.device)
            scores[:, :, start - first :].masked_fill_(later, -torch.inf)
            if how.window is not None:
                assert how.positions is not None
                own = how.positions[row if len(how.positions) > 1 else 0]
                near = within(how.window, own[None, start:end], own[first:end])
                scores.masked_fill_(~near.repeat(heads // num_kv_heads, 1), -torch.inf)
            if how.sinks is not None:
                scores = torch.cat([scores, _sink_scores(how.sinks, packed, num_kv_heads, end - start)], -1)
            made = torch.bmm(scores.softmax(-1)[..., : end - first], value[row, :, first:end])
            out[row, :, start:end] = made.view(heads, -1, value.shape[3])
    return out


def _causal_by_torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of rows to themselves, by the kernel that torch has for the device (on CUDA flash attention)."""
    grouped = query.shape[1] != key.shape[1]
    with without_cudnn():
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


@lru_cache(maxsize=32)
@lasting
def _later_tokens(length: int, num_groups: int, device: torch.device) -> Tensor:
    """[G * T, T]: True where a key is later than the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1).repeat(num_groups, 1)


def _packed(query: Tensor, num_kv_heads: int) -> Tensor:
    """[B, H, T, D] -> [B, K, H / K * T, D]: the query heads that share a key-value head, one after another."""
    rows, heads, length, width = query.shape
    return query.reshape(rows, num_kv_heads, heads // num_kv_heads * length, width)


def _partial(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, how: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention to one run of tokens, [B, H, T, D], and its logarithm of softmax sums [B, H, T]; without sinks."""
    rows, heads, length, _ = query.shape
    if not causal and mask is None:  # grouped heads share a pass over their keys
        query = _packed(query, key.shape[1])
    if _has_flash(query, value) and how.softcap is None:
        bias = None
        if mask is not None:
            bias = bias_of(mask, query.dtype)
            bias = bias[None, None] if bias.dim() == 2 else bias[:, None]
        kernel = flash if query.device.type == "cpu" else _efficient
        out, lse = kernel(query, key, value, 0.0, causal, attn_mask=bias, scale=how.scale)
    else:
        out, lse = _partial_by_formula(query, key, value, mask, causal, how)
    return out.reshape(rows, heads, length, -1), lse.reshape(rows, heads, length)


def _has_flash(query: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel that returns the softmax sums."""
    if query.device.type == "cuda":  # NVIDIA's; it reads 16 bytes at a time, and bfloat16 from Ampere on
        known = query.dtype != torch.bfloat16 or torch.cuda.get_device_capability(query.device)[0] >= 8
        fits = query.dtype.itemsize <= 4 and query.shape[-1] % 8 == 0 and value.shape[-1] % 8 == 0
        return torch.version.hip is None and known and fits
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, *, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel for NVIDIA GPUs that takes a bias and gives the softmax sums (memory-efficient, arXiv 2112.05682)."""
    key, value = repeated(key, query.shape[1]), repeated(value, query.shape[1])
    if attn_mask is not None:
        seen = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, -seen % 8))[..., :seen].expand(*query.shape[:2], -1, -1)  # aligned rows
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout, causal, scale=scale
    )
    return out, lse[..., : query.shape[2]]  # padded to a multiple of 32


def _partial_by_formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, how: Scoring
) -> tuple[Tensor, Tensor]:
    """The same by the formula, for devices without a kernel that returns the softmax sums."""
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, heads, length, width = query.shape
    grouped = (query * how.scale).reshape(rows, key.shape[1], -1, length, width)  # scaled first: float16 would overflow
    scores = how.capped((grouped @ key[:, :, None].transpose(-1, -2)).to(wide))  # [B, K, G, T, S]
    if causal:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask[:, None, None]
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    lse = torch.logsumexp(scores, -1)
    out = (scores - lse[..., None]).exp().to(value.dtype) @ value[:, :, None]
    return out.reshape(rows, heads, length, -1), lse.reshape(rows, heads, length)


def _attend_joined(query: Tensor, parts: Sequence[Part], scale: float) -> Tensor:
    """Everything joined along the tokens and one call of scaled dot product attention, for gradients."""
    length = query.shape[2]
    masks = [torch.ones(length, k.shape[2], dtype=torch.bool, device=k.device) if m is None else m for k, _, m in parts]
    if any(m.dim() == 3 for m in masks):
        masks = [m.expand(query.shape[0], -1, -1) for m in masks]
    joined = torch.cat(masks, -1)
    keys, values = torch.cat([k for k, _, _ in parts], 2), torch.cat([v for _, v, _ in parts], 2)
    return by_torch(query, keys, values, joined if joined.dim() == 2 else joined[:, None], scale)


def _parts(
    key: Tensor, value: Tensor, segments: Sequence[LayerSegment], mask: Tensor | None, how: Scoring
) -> list[Part]:
    """Keys, values and mask of every segment, and of the new tokens."""
    parts: list[Part] = []
    for segment in segments:
        if len(segment.blocks) != 1:
            raise ValueError(f"a segment has {len(segment.blocks)} blocks; with gradients it must have one.")
    masks = _masks(segments, 0, slice(None), how) if segments else []
    for segment, segment_mask in zip(segments, masks, strict=True):
        past_key, past_value, count, seen = segment.blocks[0]
        mask_of = _masked(segment_mask, seen, key.shape[2])
        parts.append((past_key[:, :, :count], past_value[:, :, :count], mask_of))
    length = key.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
    own = _own_mask(mask, how, key)
    return [*parts, (key, value, causal if own is None else own)]
