"""Attention with gradients of its own, against the formula and torch's own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focusllm.method.differentiable import bias_of, by_products, joined_sets, over_sets

ROWS, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 6, 3, 7, 8


def random(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def by_formula(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def assert_same(out: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weight = random(*out.shape, seed=9, grad=False)
    found, wanted = (torch.autograd.grad((x * weight).sum(), inputs, retain_graph=True) for x in (out, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_by_products_is_attention_to_all_parts() -> None:
    query = random(ROWS, HEADS, LENGTH, WIDTH)
    far = [random(ROWS, KV_HEADS, 5, WIDTH, seed=i, grad=False) for i in (1, 2)]
    near = [random(ROWS, KV_HEADS, 4, WIDTH, seed=i) for i in (3, 4)]
    own = [random(ROWS, KV_HEADS, LENGTH, WIDTH, seed=i) for i in (5, 6)]
    mask = torch.rand(ROWS, LENGTH, 4, generator=torch.Generator().manual_seed(7)) < 0.5
    itself = torch.eye(LENGTH, dtype=torch.bool)
    parts = [(far[0], far[1], None), (near[0], near[1], mask), (own[0], own[1], itself)]
    visible = torch.cat([torch.ones(ROWS, LENGTH, 5, dtype=torch.bool), mask, itself.expand(ROWS, -1, -1)], -1)
    joined = [torch.cat([far[i], near[i], own[i]], 2) for i in (0, 1)]
    expected = by_formula(query, joined[0], joined[1], visible[:, None], 0.3)
    assert_same(by_products(query, parts, 0.3), expected, [query, *near, *own])


@pytest.mark.parametrize("count", [1, 3, LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_over_sets_is_attention_to_each_tokens_own_set(count: int, padded: bool) -> None:
    query = random(ROWS, HEADS, LENGTH, WIDTH)
    own = [random(ROWS, KV_HEADS, LENGTH, WIDTH, seed=i) for i in (1, 2)]
    sets = [random(ROWS, KV_HEADS, count, 2, WIDTH, seed=i) for i in (3, 4)]
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(ROWS, -1, -1).clone()
    if padded:
        visible[1, 2:, :2] = False
    which = (torch.arange(LENGTH) - (LENGTH - count)).clamp(min=0)  # the tokens before the last ones see the first set
    sees = (which[:, None] == torch.arange(count)).repeat_interleave(2, 1).expand(ROWS, -1, -1)
    joined = [torch.cat([sets[i].flatten(2, 3), own[i]], 2) for i in (0, 1)]
    expected = by_formula(query, joined[0], joined[1], torch.cat([sees, visible], -1)[:, None], 0.3)
    bias = bias_of(visible, torch.float64)[:, None] if padded else None
    for function in (over_sets, joined_sets):
        out = function(query, own[0], own[1], sets[0], sets[1], bias, 0.3)
        assert_same(out, expected, [query, *own, *sets])


def test_half_precision_is_close_to_double() -> None:
    tensors = [random(ROWS, HEADS, LENGTH, WIDTH), *(random(ROWS, KV_HEADS, LENGTH, WIDTH, seed=i) for i in (1, 2))]
    sets = [random(ROWS, KV_HEADS, 3, 2, WIDTH, seed=i) for i in (3, 4)]
    weight = random(ROWS, HEADS, LENGTH, WIDTH, seed=5, grad=False)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in (*tensors, *sets)]
    whole = [half.detach().double().requires_grad_() for half in halves]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for function in (
        lambda q, k, v, sk, sv: over_sets(q, k, v, sk, sv, None, 0.3),
        lambda q, k, v, sk, sv: by_products(q, [(sk.flatten(2, 3), sv.flatten(2, 3), None), (k, v, causal)], 0.3),
    ):
        out, exact = function(*halves), function(*whole)
        torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0)
        found = torch.autograd.grad((out * weight).sum(), halves)
        for a, b in zip(found, torch.autograd.grad((exact * weight).sum(), whole), strict=True):
            assert (a.double() - b).norm() < 0.02 * b.norm()
