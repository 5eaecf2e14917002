"""Packed weights: the same passes to rounding, and a model that is otherwise what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import build, with_candidates
from focusllm import AdapterConfig, FocusLLM
from focusllm.checks.info import describe
from focusllm.memory.cost import estimate
from focusllm.method.adapter import injected
from focusllm.method.base import run
from focusllm.method.focus import Over, candidate_pass
from focusllm.method.packed import PackedLinear, pack, packable_bytes, packed_bytes, unpack


def pass_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return run(model, ids, torch.arange(ids.shape[1])[None], Over(), logits_to_keep=0)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def supported(dtype: torch.dtype) -> bool:
    return packable_bytes(nn.Linear(4, 4, dtype=dtype)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_agree_to_rounding(llama: nn.Module, ids: torch.Tensor, dtype: torch.dtype) -> None:
    if not supported(dtype):
        pytest.skip("no kernels for this type on this machine")
    model = copy.deepcopy(llama).to(dtype)
    before = pass_logits(model, ids)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert pack(model) == packable_bytes(model) == packed_bytes(model)
    assert packed_bytes(model) == sum([m.weight.nbytes for m in linear] + candidate_matrices(model)) > 0
    assert all(type(m) is PackedLinear for m in linear)
    torch.testing.assert_close(
        pass_logits(model, ids), before, rtol=0, atol=3 * torch.finfo(dtype).eps * before.abs().max().item()
    )


@pytest.mark.parametrize("config", [AdapterConfig(rank=4), AdapterConfig()])
def test_candidate_projections_are_packed_too(ids: torch.Tensor, config: AdapterConfig) -> None:
    model = with_candidates(build(), config)
    before = candidate_keys(model, ids)
    base_alone = packable_bytes(build())
    if not base_alone:
        pytest.skip("no kernels for this type on this machine")
    assert pack(model) - base_alone == sum(candidate_matrices(model)) > 0
    calls = []
    packed_kernel = torch.ops.mkldnn._linear_pointwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(a[1]) or packed_kernel(*a))
        torch.testing.assert_close(candidate_keys(model, ids), before, atol=1e-5, rtol=0)
    # In each layer q, k, v, o, gate, up and down, and of the candidates' q, k, v, o one or two matrices each; in the
    # last one only up to the keys and values.
    of_candidates = 2 if config.rank else 1
    assert len(calls) == len(model.model.layers) * (7 + 4 * of_candidates) - (4 + of_candidates)
    unpack(model)
    assert packed_bytes(model) == 0
    assert torch.equal(candidate_keys(model, ids), before)


def candidate_matrices(model: nn.Module) -> list[int]:
    """Their sizes in bytes."""
    return [p.nbytes for one in injected(model).values() for p in one.own_parameters().values() if p.dim() == 2]


def candidate_keys(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        kept, candidates = candidate_pass(model, ids, torch.tensor([0, 0]), [])
    return torch.cat([*kept.keys, *candidates.keys], 2)


def test_outside_of_passes_nothing_changes(llama: nn.Module, ids: torch.Tensor) -> None:
    model = copy.deepcopy(llama)
    names, before, passed = list(model.state_dict()), model(ids).logits, pass_logits(model, ids)
    pack(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(ids).logits, before)
    unpack(model)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert torch.equal(pass_logits(model, ids), passed)


def test_weights_that_change_are_not_missed(llama: nn.Module, ids: torch.Tensor) -> None:
    model = copy.deepcopy(llama)
    pack(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    plain = copy.deepcopy(model)
    unpack(plain)
    assert packed_bytes(plain) == 0
    assert torch.equal(pass_logits(model, ids), pass_logits(plain, ids))
    pack(model)
    torch.testing.assert_close(pass_logits(model, ids), pass_logits(plain, ids))
    wide = model.double()
    assert pass_logits(wide, ids).dtype == torch.float64
    assert packable_bytes(wide) == 0


def test_gradients_are_those_of_the_weights(llama: nn.Module, ids: torch.Tensor) -> None:
    plain, packed = (copy.deepcopy(llama).requires_grad_(True) for _ in range(2))
    pack(packed)
    for model in (plain, packed):
        run(model, ids, torch.arange(ids.shape[1])[None], Over(), logits_to_keep=0).logsumexp(-1).sum().backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (packed, plain))
    assert found.keys() == expected.keys()
    assert len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_small_models_are_packed_when_loaded(model_folder) -> None:
    found = {w: FocusLLM.from_pretrained(model_folder, weights=w) for w in ("auto", "packed", "plain", "int8")}
    sizes = {weights: packed_bytes(llm.model) for weights, llm in found.items()}
    assert sizes["plain"] == 0
    assert sizes["auto"] == sizes["packed"] == packable_bytes(found["packed"].model)
    assert (sizes["packed"] > 0) == supported(torch.float32)
    costs = {weights: estimate(llm.model.base, llm.config, 4096).weights for weights, llm in found.items()}
    _, skeleton, config, _ = describe(model_folder, None, "float32", {})  # before it is loaded
    for weights, cost in costs.items():
        assert cost - costs["plain"] == packed_bytes(found[weights].model.base)
        assert estimate(skeleton, config, 4096, weights=weights).weights == cost
