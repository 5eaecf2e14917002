"""Attention that gradients flow through, for few tokens over what is frozen and for many over few candidates.

`by_products`: few new tokens over long segments that need no gradients (candidates over their chunks). Plain products;
the gradients of the segments' keys and values are left out.

`over_sets`: many new tokens, each over a few earlier ones of its own (a local context over the candidates that were
made at each of its positions). The new tokens among themselves by the flash kernel. Its backward pass takes the softmax
sums and the result of all that a token attends to, not of its own part alone, and so gives the exact gradients of that
part (as ring attention does, arXiv 2310.01889).

Both are for a CPU. Elsewhere, and in 4-byte types for few tokens, `by_torch`: one call over all that is seen.

What caps its scores, has sinks or, over sets, a window goes by the formula as it is written down (`by_formula`).

All are compared with the formula in tests. Letters as in `attention`; G = H / K query heads share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from focusllm.method.scoring import Scoring, within

Part = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values [B, K, S, D], and a mask [T, S] or [B, T, S] (True: visible)."""

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def by_products(query: Tensor, parts: Sequence[Part], scale: float) -> Tensor:
    """Attention to several parts under one softmax.

    Args:
        query: [B, H, T, D]; differentiable, as the keys and values of those parts that require gradients are.

    Returns:
        [B, H, T, D].
    """
    flat = [tensor for key, value, _ in parts for tensor in (key, value)]
    result: Tensor = _ByProducts.apply(query, scale, [mask for *_, mask in parts], *flat)  # type: ignore[no-untyped-call]
    return result


def by_formula(query: Tensor, parts: Sequence[Part], how: Scoring) -> Tensor:
    """Attention to several parts as it is written down, with cap and sinks: [B, H, T, D], differentiable."""
    rows, heads, length, width = query.shape
    num_kv_heads = parts[0][0].shape[1]
    grouped = (query * how.scale).reshape(rows, num_kv_heads, -1, width)  # [B, K, G * T, D]
    scores = []
    for key, _, mask in parts:
        score = how.capped((grouped @ key.transpose(-1, -2)).to(_wide(query))).view(rows, heads, length, -1)
        if mask is not None:
            score = score.masked_fill(~mask if mask.dim() == 2 else ~mask[:, None], -torch.inf)
        scores.append(score)
    if how.sinks is not None:
        scores.append(how.sinks.to(scores[0].dtype)[:, None, None].expand(rows, -1, length, 1))
    weights = torch.cat(scores, -1).softmax(-1).to(query.dtype)
    values = torch.cat([value for _, value, _ in parts], 2)
    out = weights[..., : values.shape[2]].reshape(rows, num_kv_heads, -1, values.shape[2]) @ values
    return out.view(rows, heads, length, -1)


class _ByProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, scale: float, masks: list[Tensor | None], *flat: Tensor) -> Tensor:
        rows, heads, length, width = query.shape
        num_kv_heads = flat[0].shape[1]
        packed = (query * scale).reshape(rows * num_kv_heads, -1, width)  # [B * K, G * T, D]
        keys, values = ([tensor.flatten(0, 1) for tensor in flat[i::2]] for i in (0, 1))
        weights = [torch.bmm(packed, key.transpose(1, 2)) for key in keys]
        for score, mask in zip(weights, masks, strict=True):
            if mask is not None:
                hidden = ~mask if mask.dim() == 2 else ~mask[:, None]
                score.view(rows, heads, length, -1).masked_fill_(hidden, torch.finfo(score.dtype).min)
        most = torch.stack([score.amax(-1) for score in weights]).amax(0)[..., None]
        for score in weights:  # in place: these are the largest tensors here
            score.sub_(most).exp_()
        total = torch.stack([weight.sum(-1, dtype=_wide(query)) for weight in weights]).sum(0)[..., None]
        out = torch.bmm(weights[0], values[0]).to(total.dtype)
        for weight, value in zip(weights[1:], values[1:], strict=True):
            out += torch.bmm(weight, value)
        out /= total
        ctx.save_for_backward(packed, out, total, *keys, *values, *weights)
        ctx.scale, ctx.shape, ctx.num_kv_heads = scale, query.shape, num_kv_heads
        return out.to(query.dtype).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        packed, out, total, *flat = ctx.saved_tensors
        count = len(flat) // 3
        grad = grad.reshape(packed.shape) / total
        delta = (grad * out).sum(-1, keepdim=True).to(packed.dtype)
        grad = grad.to(packed.dtype)
        to_query: Tensor | None = None
        to_flat: list[Tensor | None] = []
        for i, (key, value, weight) in enumerate(zip(flat[:count], flat[count:-count], flat[-count:], strict=True)):
            to_score = torch.bmm(grad, value.transpose(1, 2)).sub_(delta).mul_(weight)
            product = torch.bmm(to_score, key)
            to_query = product if to_query is None else to_query.add_(product)
            shape = (ctx.shape[0], ctx.num_kv_heads, *key.shape[1:])
            needs_key, needs_value = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            to_flat.append(torch.bmm(to_score.transpose(1, 2), packed).view(shape) if needs_key else None)
            to_flat.append(torch.bmm(weight.transpose(1, 2), grad).view(shape) if needs_value else None)
        assert to_query is not None
        return (to_query.mul_(ctx.scale).view(ctx.shape), None, None, *to_flat)


def over_sets(
    query: Tensor, key: Tensor, value: Tensor, set_keys: Tensor, set_values: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Attention of new tokens to each other, and of each to one set of earlier tokens (by joined masks off the CPU).

    Args:
        query: [B, H, T, D]. key, value: [B, K, T, D], of the same new tokens.
        set_keys, set_values: [B, K, M, R, D]: M sets of R tokens for the last M new tokens, one each; the tokens
            before them see the first set.
        bias: [B, 1, T, T], added to the new tokens' scores with each other; None: causal.

    Returns:
        [B, H, T, D], differentiable in all five tensors.
    """
    if query.device.type != "cpu":
        return joined_sets(query, key, value, set_keys, set_values, bias, scale)
    result: Tensor = _OverSets.apply(query, key, value, set_keys, set_values, bias, scale)  # type: ignore[no-untyped-call]
    return result


def joined_sets(
    query: Tensor, key: Tensor, value: Tensor, set_keys: Tensor, set_values: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """The same by one call over all sets, each hidden from the tokens that have another: for other devices."""
    length, (count, size) = query.shape[2], set_keys.shape[2:4]
    place = torch.arange(length, device=query.device)
    if bias is None:
        bias = bias_of(place[:, None] >= place, query.dtype)
    sees = (place - (length - count)).clamp(min=0)[:, None] == torch.arange(count, device=query.device)
    sets = bias_of(sees.repeat_interleave(size, 1), query.dtype).expand(len(query), 1, -1, -1)
    keys, values = torch.cat([set_keys.flatten(2, 3), key], 2), torch.cat([set_values.flatten(2, 3), value], 2)
    return by_torch(query, keys, values, torch.cat([sets, bias.expand(len(query), 1, -1, -1)], -1), scale)


def masked_sets(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    set_keys: Tensor,
    set_values: Tensor,
    mask: Tensor | None,
    how: Scoring,
    slots: Tensor,
) -> Tensor:
    """The same for layers with a window, capped scores or sinks.

    Args:
        mask: [B, T, T], True where a new token sees a new token; None: causal.
        slots: [R], positions of the tokens of a set.
    """
    length, (count, size) = query.shape[2], set_keys.shape[2:4]
    place = torch.arange(length, device=query.device)
    of_token = (place - (length - count)).clamp(min=0)
    sees = (of_token[:, None] == torch.arange(count, device=query.device)).repeat_interleave(size, 1)
    own = place[:, None] >= place if mask is None else mask
    if how.window is not None:
        assert how.positions is not None
        sees = sees & within(how.window, how.positions, slots.repeat(count))
        own = own & within(how.window, how.positions, how.positions)
    parts = [(set_keys.flatten(2, 3), set_values.flatten(2, 3), sees), (key, value, own)]
    return by_formula(query, parts, how)


def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention with a mask in one call of torch's, differentiable.

    A GPU's kernels take a mask or grouped heads, not both, and what torch does instead keeps all scores. So key-value
    heads are repeated there.
    """
    if query.device.type != "cpu":
        key, value = repeated(key, query.shape[1]), repeated(value, query.shape[1])
    grouped = query.shape[1] != key.shape[1]
    with without_cudnn():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def repeated(tensor: Tensor, num_heads: int) -> Tensor:
    """Keys or values [B, K, S, D] for each query head: [B, H, S, D], the same tensor if there are as many."""
    groups = num_heads // tensor.shape[1]
    return tensor.repeat_interleave(groups, 1) if groups > 1 else tensor


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention of torch on an NVIDIA GPU without cuDNN's kernel, which makes a plan for every new shape.

    Lengths are new all the time here, and a plan takes tens of milliseconds.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores instead of a mask (True: visible)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class _OverSets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        set_keys: Tensor,
        set_values: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        own, own_lse = flash(query, key, value, 0.0, bias is None, attn_mask=bias, scale=scale)
        grouped = _grouped(query, key.shape[1])
        wide = _wide(query)
        scores = _per_set(grouped, set_keys).to(wide) * scale  # [B, K, G, T, R]
        own_lse = own_lse.to(wide).view(scores.shape[:-1])
        lse = torch.logaddexp(own_lse, torch.logsumexp(scores, -1))
        weights = (scores - lse[..., None]).exp()
        out = own.view(grouped.shape) * (own_lse - lse).exp()[..., None]
        out = (out + _from_sets(weights.to(query.dtype), set_values)).to(query.dtype)
        ctx.save_for_backward(query, key, value, set_keys, set_values, bias, out.view(query.shape), lse, weights)
        ctx.scale = scale
        result: Tensor = out.view(query.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, set_keys, set_values, bias, out, lse, weights = ctx.saved_tensors
        scale, grad = ctx.scale, grad.contiguous()
        to_query, to_key, to_value = flash_backward(
            grad, query, key, value, out, lse.view(query.shape[:-1]), 0.0, bias is None, attn_mask=bias, scale=scale
        )
        grouped, grad = (_grouped(x, key.shape[1]) for x in (query, grad))
        delta = (grad.to(lse.dtype) * out.view(grad.shape)).sum(-1, keepdim=True)
        to_score = ((_per_set(grad, set_values) - delta) * weights * scale).to(query.dtype)
        to_query = to_query + _from_sets(to_score, set_keys).view(query.shape)
        count = set_keys.shape[2]
        to_set_keys, to_set_values = _to_sets(to_score, grouped, count), _to_sets(weights.to(query.dtype), grad, count)
        return to_query, to_key, to_value, to_set_keys, to_set_values, None, None


def _per_set(tokens: Tensor, sets: Tensor) -> Tensor:
    """Products of each token's vector with its set's: [B, K, G, T, D] and [B, K, M, R, D] to [B, K, G, T, R]."""
    first, last = _parted(tokens, sets.shape[2])
    shared = torch.matmul(first, sets[:, :, :1].transpose(-1, -2))  # [B, K, G, T - M, D] with [B, K, 1, D, R]
    own = torch.matmul(last.transpose(2, 3), sets.transpose(-1, -2)).transpose(2, 3)  # [B, K, M, G, D], [B, K, M, D, R]
    return torch.cat([shared, own], 3)


def _from_sets(weights: Tensor, sets: Tensor) -> Tensor:
    """Sums of each token's set by its weights: [B, K, G, T, R] and [B, K, M, R, D] to [B, K, G, T, D]."""
    first, last = _parted(weights, sets.shape[2])
    own = torch.matmul(last.transpose(2, 3), sets).transpose(2, 3)
    return torch.cat([torch.matmul(first, sets[:, :, :1]), own], 3)


def _to_sets(weights: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Sums over the tokens that see each set, by weight: [B, K, G, T, R] and [B, K, G, T, D] to [B, K, M, R, D]."""
    (first_weights, weights), (first, last) = _parted(weights, count), _parted(tokens, count)
    made = torch.matmul(weights.permute(0, 1, 3, 4, 2), last.transpose(2, 3))  # [B, K, M, R, G] with [B, K, M, G, D]
    made[:, :, 0] += torch.matmul(first_weights.flatten(2, 3).transpose(-1, -2), first.flatten(2, 3))
    return made


def _grouped(query: Tensor, num_kv_heads: int) -> Tensor:
    """[B, H, T, D] to [B, K, G, T, D]."""
    rows, heads, length, width = query.shape
    return query.reshape(rows, num_kv_heads, heads // num_kv_heads, length, width)


def _parted(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B, K, G, T, ...] at the first of the last `count` tokens."""
    start = tokens.shape[3] - count
    return tokens[:, :, :, :start], tokens[:, :, :, start:]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
