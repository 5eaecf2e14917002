"""Attention over segments: earlier tokens that lie in several places, read where they lie.

    query of new tokens  --->  [ segment 1 | segment 2 | ... | the new tokens themselves ]

Keys and values are neither joined nor copied, and key-value heads are not repeated for the query heads that share
them (but by the kernel for NVIDIA GPUs). Few queries (decoding; in 2-byte types on a CPU prompts behind chunks too):
scores of all segments under one softmax, by batched matrix products. Many queries: a flash kernel a segment (on an
NVIDIA GPU the memory-efficient one, which takes masks), results merged exactly through the logarithms of their
softmax sums (as flash attention joins its tiles, arXiv 2205.14135). Chunks alone: in bfloat16 on a CPU by products, a
block of queries at a time; on a GPU by torch's own kernel. With gradients: joined, one differentiable call; but
2-byte types on a CPU by products again (`differentiable`).

Pure functions over tensors. Letters: B rows, H query heads, K key-value heads, T new tokens, S earlier ones, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from focusllm.method.differentiable import Part, bias_of, by_products, by_torch, flash, repeated, without_cudnn

Block = tuple[Tensor, Tensor, int, Tensor | None]
"""Keys and values [rows, K, room, D]; how many of their tokens count (the room behind them holds finite numbers); and
which of these are seen [S], None: all."""
LayerSegment = tuple[Sequence[Block], Tensor | None]
"""One layer of a `Segment`: blocks along the rows, and a mask [T, S] or [rows, T, S] (True: visible)."""

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
    segments: Sequence[LayerSegment],
    mask: Tensor | None,
    scale: float,
    watch: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Attention of new tokens to segments of earlier ones and to themselves.

    Args:
        query: [B, H, T, D]. key, value: [B, K, T, D], of the same new tokens.
        segments: earlier tokens; all segments are cut into blocks at the same rows.
        mask: [T, T] or [B, T, T], True where a new token sees a new token; None: causal.
        scale: factor of the scores.
        watch: report what so many of the newest tokens pay to the first segment, and would pay to what they do not see;
            and what the newest one pays to all others, up to itself.

    Returns:
        The result [B, H, T, D]; and if watched, one [rows, S + others] a block of the first segment, a mean over heads
        and tokens (the sum over what is seen is the share of their attention that it got).
    """
    earlier = [tensor for blocks, _ in segments for block in blocks for tensor in block[:2]]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value, *earlier)):
        few = query.device.type == "cpu" and query.dtype.itemsize == 2
        parts = _parts(key, value, segments, mask)
        return by_products(query, parts, scale) if few else _attend_joined(query, parts, scale), []
    if not segments:
        by_blocks = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] > QUERY_BLOCK
        if by_blocks and mask is None and query.shape[3] == value.shape[3]:
            return _causal_by_blocks(query, key, value, scale), []
        by_torch_alone = query.dtype.itemsize == 2 or not _has_flash(query, value)  # else it would keep all scores
        if query.device.type != "cpu" and mask is None and by_torch_alone:  # nothing to merge with
            return _causal_by_torch(query, key, value, scale), []
        return _partial(query, key, value, mask, mask is None, scale)[0], []
    outs: list[Tensor] = []
    paid: list[Tensor | None] = []
    start = 0
    for first_block in segments[0][0]:
        rows = slice(start, start + first_block[0].shape[0])
        index = len(outs)
        past = [  # without what is empty, unless it is watched
            (*blocks[index], _mask_of(segment_mask, rows))
            for number, (blocks, segment_mask) in enumerate(segments)
            if blocks[index][2] or (watch and number == 0)
        ]
        few = _are_few(query, key.shape[1]) and mask is None and all(m is None for *_, m in past)
        partly = _attend_few if few else _attend_many
        out, share = partly(query[rows], key[rows], value[rows], past, _mask_of(mask, rows), scale, watch)
        outs.append(out)
        paid.append(share)
        start = rows.stop
    return torch.cat(outs) if outs[1:] else outs[0], [share for share in paid if share is not None]


Past = Sequence[tuple[Tensor, Tensor, int, Tensor | None, Tensor | None]]
"""Keys, values, length, what is seen and mask of each segment, for one block of rows."""


def _are_few(query: Tensor, num_kv_heads: int) -> bool:
    """Whether plain products are the faster way to the scores."""
    fast = query.device.type == "cpu" and query.dtype.itemsize == 2
    return query.shape[1] // num_kv_heads * query.shape[2] <= (FEW_QUERIES_2_BYTES if fast else FEW_QUERIES)


def _attend_few(
    query: Tensor, key: Tensor, value: Tensor, past: Past, mask: Tensor | None, scale: float, watch: int
) -> tuple[Tensor, Tensor | None]:
    """One softmax over the scores of all segments, causal among the new tokens; so many rows at once as caches hold."""
    rows, heads, length, _ = query.shape
    at_once = max(1, SCORES_AT_ONCE // (heads * length * (length + sum(k.shape[2] for k, *_ in past))))
    if query.device.type == "cpu" and rows > at_once:
        return _some_rows_at_once(_attend_few, at_once, query, key, value, past, mask, scale, watch)
    packed = _packed(query * scale, key.shape[1]).flatten(0, 1)  # [B * K, G * T, D]
    values = [v.flatten(0, 1) for _, v, *_ in past] + [value.flatten(0, 1)]
    scores = []
    for past_key, _, count, *_ in past:
        # Over the whole room, for a batched product would copy a part of it.
        scores.append(torch.bmm(packed, past_key.flatten(0, 1).transpose(1, 2)))
        if count < past_key.shape[2]:
            scores[-1][..., count:] = -torch.inf
    scores.append(torch.bmm(packed, key.flatten(0, 1).transpose(1, 2)))
    if length > 1:
        scores[-1].masked_fill_(_later_tokens(length, heads // key.shape[1], query.device), -torch.inf)
    joined = torch.cat(scores, -1)
    start = 0
    for past_key, _, count, seen, _ in past:
        if seen is not None:
            joined[..., start : start + count].masked_fill_(~seen, -torch.inf)
        start += past_key.shape[2]
    weights = joined.softmax(-1)
    share = None
    if watch:
        first = weights[..., : past[0][2]]
        if past[0][3] is not None:
            first = _paid(scores[0][..., : past[0][2]].float(), joined.float().logsumexp(-1, keepdim=True))
        first = first.reshape(rows, heads, length, -1)[:, :, -watch:].float().mean((1, 2))
        newest = weights.view(rows, heads, length, -1)[:, :, -1].float().mean(1)
        _, *others = torch.split(
            newest, [part.shape[1] for part in values], -1
        )  # over the whole room, as the scores are
        counts = [*(count for _, _, count, *_ in past[1:]), length]
        share = torch.cat([first, *(part[:, :count] for part, count in zip(others, counts, strict=True))], -1)
    out, start = None, 0
    for part in values:
        product = torch.bmm(weights[..., start : start + part.shape[1]], part)
        out, start = product if out is None else out + product, start + part.shape[1]
    assert out is not None
    return out.view(rows, heads, length, -1), share


def _attend_many(
    query: Tensor, key: Tensor, value: Tensor, past: Past, mask: Tensor | None, scale: float, watch: int
) -> tuple[Tensor, Tensor | None]:
    """A partial result a segment, merged by their softmax sums; by the formula few rows at once, for its scores."""
    rows, heads, length, _ = query.shape
    at_once = max(1, SCORES_BY_FORMULA // (heads * length * (length + sum(k.shape[2] for k, *_ in past))))
    if not _has_flash(query, value) and rows > at_once:
        return _some_rows_at_once(_attend_many, at_once, query, key, value, past, mask, scale, watch)
    parts = [
        _partial(query, k[:, :, :n], v[:, :, :n], _masked(m, seen, length), False, scale)
        for k, v, n, seen, m in past
        if n
    ]
    parts.append(_partial(query, key, value, mask, mask is None, scale))
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
    merged = parts[0][0] * (parts[0][1] - lse).exp()[..., None]
    for out, part_lse in parts[1:]:
        merged = merged + out * (part_lse - lse).exp()[..., None]
    share = None
    if watch:
        shares = [_paid_to(past[0][0][:, :, : past[0][2]], query[:, :, -watch:], lse, None, scale)]
        others = [(k[:, :, :n], _masked(m, seen, length)) for k, _, n, seen, m in past[1:]] + [(key, mask)]
        shares += [_paid_to(k, query[:, :, -1:], lse, m, scale) for k, m in others]
        share = torch.cat(shares, -1)
    return merged.to(query.dtype), share


def _paid_to(key: Tensor, newest: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What the newest n queries [B, H, n, D] pay to keys, to masked ones nothing: a mean over heads and queries."""
    count = newest.shape[2]
    scores = _packed(newest.to(lse.dtype), key.shape[1]) @ key.to(lse.dtype).transpose(-1, -2) * scale
    scores = scores.reshape(*newest.shape[:3], -1)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., -count:, :].reshape(-1, 1, count, key.shape[2]), -torch.inf)
    return _paid(scores, lse[:, :, -count:, None]).mean((1, 2))


def _paid(scores: Tensor, lse: Tensor) -> Tensor:
    """What keys get of the attention to all that is seen, or would get beside it: the latter bounded, far beyond what
    matters, so that sums and means of it stay finite.
    """
    return (scores - lse).clamp(max=20).exp()


def _some_rows_at_once(
    partly: Callable[..., tuple[Tensor, Tensor | None]],
    at_once: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: Past,
    mask: Tensor | None,
    scale: float,
    watch: int,
) -> tuple[Tensor, Tensor | None]:
    """`_attend_few` or `_attend_many`, a part of the rows after another."""
    parts = []
    for start in range(0, query.shape[0], at_once):
        some = slice(start, start + at_once)
        own = [(k[some], v[some], n, seen, _mask_of(m, some)) for k, v, n, seen, m in past]
        parts.append(partly(query[some], key[some], value[some], own, _mask_of(mask, some), scale, watch))
    shares = [share for _, share in parts if share is not None]
    return torch.cat([out for out, _ in parts]), torch.cat(shares) if shares else None


def _mask_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    """A mask of some rows; one without rows [T, S] is that of all."""
    return mask if mask is None or mask.dim() == 2 else mask[rows]


def _masked(mask: Tensor | None, seen: Tensor | None, length: int) -> Tensor | None:
    """What a query sees [T, S] or [rows, T, S] of what is seen [S] at all."""
    if seen is None:
        return mask
    return seen.expand(length, -1) if mask is None else mask & seen


def _causal_by_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of long rows to themselves, in blocks of queries.

    In bfloat16 on a CPU products are several times faster than the flash kernel's own, and what is later than a block
    is left out; reading chunks takes 0.88 of the time (benchmarks/reading_attention.py).
    """
    rows, heads, length, width = query.shape
    num_kv_heads, out = key.shape[1], torch.empty_like(query)
    query = query * scale
    for row in range(rows):
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            packed = query[row, :, start:end].reshape(num_kv_heads, -1, width)  # [K, G * T, D]
            scores = torch.bmm(packed, key[row, :, :end].transpose(1, 2))
            later = _later_tokens(end - start, heads // num_kv_heads, query.device)
            scores[:, :, start:].masked_fill_(later, -torch.inf)
            made = torch.bmm(scores.softmax(-1), value[row, :, :end])
            out[row, :, start:end] = made.view(heads, -1, width)
    return out


def _causal_by_torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of rows to themselves, by the kernel that torch has for the device (on CUDA flash attention)."""
    grouped = query.shape[1] != key.shape[1]
    with without_cudnn():
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


@lru_cache(maxsize=32)
def _later_tokens(length: int, num_groups: int, device: torch.device) -> Tensor:
    """[G * T, T]: True where a key is later than the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1).repeat(num_groups, 1)


def _packed(query: Tensor, num_kv_heads: int) -> Tensor:
    """[B, H, T, D] -> [B, K, H / K * T, D]: the query heads that share a key-value head, one after another."""
    rows, heads, length, width = query.shape
    return query.reshape(rows, num_kv_heads, heads // num_kv_heads * length, width)


def _partial(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to one run of tokens, [B, H, T, D], and its logarithm of softmax sums [B, H, T]."""
    rows, heads, length, _ = query.shape
    if not causal and mask is None:  # grouped heads share a pass over their keys
        query = _packed(query, key.shape[1])
    if _has_flash(query, value):
        bias = None
        if mask is not None:
            bias = bias_of(mask, query.dtype)
            bias = bias[None, None] if bias.dim() == 2 else bias[:, None]
        kernel = flash if query.device.type == "cpu" else _efficient
        out, lse = kernel(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    else:
        out, lse = _partial_by_formula(query, key, value, mask, causal, scale)
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
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by the formula, for devices without a kernel that returns the softmax sums."""
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, heads, length, width = query.shape
    grouped = (query * scale).reshape(rows, key.shape[1], -1, length, width)  # scaled first: float16 would overflow
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).to(wide)  # [B, K, G, T, S]
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


def _parts(key: Tensor, value: Tensor, segments: Sequence[LayerSegment], mask: Tensor | None) -> list[Part]:
    """Keys, values and mask of every segment, and of the new tokens."""
    parts: list[Part] = []
    for blocks, segment_mask in segments:
        if len(blocks) != 1:
            raise ValueError(f"a segment has {len(blocks)} blocks; with gradients it must have one.")
        past_key, past_value, count, seen = blocks[0]
        mask_of = _masked(segment_mask, seen, key.shape[2])
        parts.append((past_key[:, :, :count], past_value[:, :, :count], mask_of))
    length = key.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
    return [*parts, (key, value, causal if mask is None else mask)]
