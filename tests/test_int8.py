"""Weights in 8 bits: the kernels against the formula in float, every way in, and where there are no kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import FAMILIES, SMALL, WINDOWED, build, random_ids, with_candidates
from focusllm import ConfigError, FocusLLM
from focusllm.bench.plan import Plan, Spec
from focusllm.memory.chunks import document_key
from focusllm.method import int8, packed
from focusllm.method.adapter import injected
from focusllm.method.base import run
from focusllm.method.focus import Over
from focusllm.method.int8 import Int8Weight, has_dot_products, rounded_weight
from focusllm.method.packed import PackedWeight, chosen, kept_as, pack, packable_bytes, packed_bytes
from focusllm.method.passes import FIRST_POSITIONS

needs_kernels = pytest.mark.skipif(not int8.has_kernels(), reason="no kernels for 8 bits on this CPU")
TEXT = "A whale is not a fish. Call me Ishmael. Some years ago I went to sea. " * 6


def by_formula(weight: Tensor, input: Tensor, bias: Tensor | None, symmetric: bool = False) -> Tensor:
    """What the kernels compute, in float: both sides rounded, the input's range of a few tokens taken as it is."""
    flat = input.reshape(-1, input.shape[-1]).float()
    largest = flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
    y = flat / largest
    low, high = (-1.0, 1.0) if symmetric else (min(y.min().item(), 0.0), max(y.max().item(), 0.0))
    step = (high - low) / (254 if symmetric else 255)
    zero = round(-low / step)
    near = torch.clamp((y / step).round() + zero, 0, 255) - zero
    rounded, scales = rounded_weight(weight)
    out = F.linear(near * step * largest, rounded * scales[:, None], None if bias is None else bias.float())
    return out.to(input.dtype).view(*input.shape[:-1], -1)


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it puts the formula in the place of the kernels."""
    made: dict[int, Tensor] = {}
    build_copy = Int8Weight.__init__

    def init(self: Int8Weight, weight: Tensor) -> None:
        build_copy(self, weight)
        made[id(self)] = weight.detach().clone()

    monkeypatch.setattr(Int8Weight, "__init__", init)

    def replace() -> None:
        def linear(self: Int8Weight, input: Tensor, bias: Tensor | None) -> Tensor:
            many = self.many is not None and input.shape[:-1].numel() > int8.FEW_TOKENS
            return by_formula(made[id(self)], input, bias, many)

        monkeypatch.setattr(Int8Weight, "linear", linear)

    return replace


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pass_logits(model: nn.Module, ids: Tensor, first: int = 0) -> Tensor:
    with torch.no_grad():
        logits = run(model, ids, torch.arange(first, first + ids.shape[1])[None], Over(), logits_to_keep=0)
    assert logits is not None
    return logits


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "outputs"), [(1, 64, 96), (2, 96, 64), (7, 13, 5), (32, 576, 192)])
def test_few_tokens_are_multiplied_as_the_formula_says(
    tokens: int, width: int, outputs: int, dtype: torch.dtype
) -> None:
    weight, bias = normal(outputs, width).to(dtype), normal(outputs, seed=1).to(dtype)
    input = normal(1, tokens, width, seed=2).to(dtype) * torch.logspace(-3, 3, tokens)[None, :, None].to(dtype)
    input[0, -1, 0] = 0
    for given in (bias, None):
        got, expected = Int8Weight(weight).linear(input, given), by_formula(weight, input, given)
        exact = F.linear(input, weight, given)
        assert got.dtype == dtype
        scale = exact.float().abs().amax(-1, keepdim=True)  # of each token: huge ones do not coarsen the others
        rounding = ((expected - exact).float().abs() / scale).max().item()
        assert rounding < 0.05
        assert ((got - expected).float().abs() / scale).max().item() < max(0.1 * rounding, 4 * torch.finfo(dtype).eps)


@needs_kernels
def test_a_token_of_zeros_stays_what_it_is() -> None:
    weight, bias = normal(8, 16), normal(8, seed=1)
    input = torch.stack([torch.zeros(16), normal(16)])
    assert torch.equal(Int8Weight(weight).linear(input, bias)[0], bias)
    assert torch.equal(Int8Weight(torch.zeros(8, 16)).linear(input, bias), bias.expand(2, -1))


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_what_is_no_number_stays_none_and_is_its_token_s_alone(bad: float, tokens: int) -> None:
    input = normal(tokens, 16)
    input[0, 3] = bad
    got = Int8Weight(normal(8, 16, seed=1)).linear(input, None).isfinite()
    assert not got[0].any()
    assert got[1:].all()


@needs_kernels
def test_many_tokens_are_multiplied_as_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel that is used where there are dot products; of two neighbours one is zero, so that sums fit."""
    monkeypatch.setattr(int8, "has_dot_products", lambda: True)
    weight, input = normal(96, 64), normal(2, 40, 64, seed=2) * torch.logspace(-3, 3, 40)[None, :, None]
    weight[:, 1::2] = 0
    copy = Int8Weight(weight)
    assert copy.nbytes == 2 * weight.numel() + 4 * len(weight)
    expected, exact = by_formula(weight, input, None, symmetric=True), F.linear(input, weight)
    scale = exact.abs().amax(-1, keepdim=True)
    error = (copy.linear(input, None) - expected).abs() / scale
    assert error.max().item() < 0.1 * ((expected - exact).abs() / scale).max().item()


@needs_kernels
def test_many_tokens_are_left_to_float_where_that_is_as_fast(llama: nn.Module) -> None:
    ids = torch.tensor([random_ids(int8.FEW_TOKENS + 1)])
    before = pass_logits(llama, ids)
    pack(llama, "int8")
    assert torch.equal(pass_logits(llama, ids), before) != has_dot_products()
    assert not torch.equal(pass_logits(llama, ids[:, 1:]), pass_logits(build(), ids[:, 1:]))


@needs_kernels
@pytest.mark.parametrize("family", [*FAMILIES, *WINDOWED])
def test_all_families_compute_what_the_formula_says(family: str, formula: Callable[[], None]) -> None:
    model, ids = with_candidates(build(family, "eager")), torch.tensor([random_ids(12), random_ids(12, seed=1)])
    exact = pass_logits(model, ids)
    assert pack(model, "int8") == packable_bytes(model, "int8") == packed_bytes(model) > 0
    got = pass_logits(model, ids)
    formula()
    expected = pass_logits(model, ids)
    rounding = (expected - exact).square().mean().sqrt().item()
    # Halfway between two whole numbers the last bit of a float decides, and the layers behind see that.
    assert (got - expected).square().mean().sqrt().item() < 0.3 * rounding
    torch.testing.assert_close(got[:, :FIRST_POSITIONS], exact[:, :FIRST_POSITIONS], rtol=0, atol=0.1 * rounding)


@needs_kernels
def test_what_is_at_the_first_positions_is_told_by_positions(llama: nn.Module) -> None:
    ids = torch.tensor([random_ids(6)])
    plain = [pass_logits(llama, ids, first) for first in (0, 2, FIRST_POSITIONS)]
    pack(llama, "int8")
    packed_too = [pass_logits(llama, ids, first) for first in (0, 2, FIRST_POSITIONS)]
    near = [(a - b).abs().amax((0, 2)) < 1e-5 for a, b in zip(plain, packed_too, strict=True)]
    assert [tokens.tolist() for tokens in near] == [[True] * 4 + [False] * 2, [True] * 2 + [False] * 4, [False] * 6]


@needs_kernels
def test_candidate_projections_stay_float(llama: nn.Module) -> None:
    pack(llama, "int8")
    ours = [matrix for module in injected(llama).values() for matrix in module.matrices]
    assert {type(packed._copies[matrix][0]) for matrix in ours} == {PackedWeight}
    assert kept_as(llama) == "int8"


@needs_kernels
def test_outside_of_passes_and_with_gradients_nothing_changes(llama: nn.Module) -> None:
    ids = torch.tensor([random_ids(9)])
    model = copy.deepcopy(llama).requires_grad_(True)
    before, names = llama(ids).logits, list(llama.state_dict())
    for one in (llama, model):
        pack(one, "int8")
    assert torch.equal(llama(ids).logits, before)
    assert list(llama.state_dict()) == names
    with_graph = run(model, ids, torch.arange(9)[None], Over(), logits_to_keep=0)
    packed.unpack(llama)
    assert kept_as(llama) == "plain"
    assert torch.equal(with_graph, pass_logits(llama, ids))


@needs_kernels
@pytest.mark.parametrize("far_context", ["condensed", "opened"])
def test_every_way_in(model_folder: Path, far_context: str, formula: Callable[[], None]) -> None:
    llm = FocusLLM.from_pretrained(model_folder, weights="int8", far_context=far_context)
    assert kept_as(llm.model) == "int8"
    calls = []
    kernel = Int8Weight.linear

    def counted(self: Int8Weight, input: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(input.shape)
        return kernel(self, input, bias)

    def everything() -> tuple[str, str, list[list[int]]]:
        book = llm.read(TEXT)
        answer = llm.ask(book, "Who went to sea?", max_new_tokens=4).text
        goes_on = llm.continue_text(TEXT, max_new_tokens=4).text
        ids = torch.tensor([random_ids(150), random_ids(150, seed=1)])
        return answer, goes_on, llm.model.generate(ids, max_new_tokens=4)[:, 150:].tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8Weight, "linear", counted)
        got = everything()
    assert calls
    formula()
    assert everything() == got


@needs_kernels
def test_what_was_read_in_8_bits_is_another_document(llama: nn.Module) -> None:
    keys = []
    for weights in ("plain", "packed", "int8"):
        pack(llama, weights)
        keys.append(document_key(llama, [1, 2, 3], SMALL))
    assert keys[0] == keys[1] != keys[2]


def test_where_there_are_no_kernels_float_is_used_and_that_is_said(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(int8, "has_kernels", lambda: False)
    llm = FocusLLM.from_pretrained(model_folder, weights="int8", notify=said.append)
    assert kept_as(llm.model) != "int8"
    assert said == ["Weights stay as they are: this CPU, or torch for it, has no kernels for weights='int8'."]


def test_a_gpu_computes_with_the_model_s_own_weights(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(packed, "computes_on_cpu", lambda _: False)
    assert packable_bytes(llama, chosen(llama, "int8", said.append)) == 0
    assert said == ["Weights stay as they are: a GPU has no kernels for weights='int8'."]


def test_unknown_values_are_refused(model_folder: Path, focusllm: Callable[..., tuple[int, str, str]]) -> None:
    told = "weights is 'int7'; it must be 'auto', 'plain', 'packed' or 'int8'."
    with pytest.raises(ConfigError, match=told):
        FocusLLM.from_pretrained(model_folder, weights="int7")
    with pytest.raises(ConfigError, match=told):
        Plan([Spec("focus", "focus")], weights="int7")  # type: ignore[arg-type]
    code, _, error = focusllm("info", "--model", model_folder, "--weights", "int7")
    assert (code, error) == (2, f"focusllm: {told}\n")
