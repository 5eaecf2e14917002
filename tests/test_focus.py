"""The method against the slow reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import SMALL, build, random_ids, with_candidates
from focusllm import AdapterConfig
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.memory.chunking import cut
from focusllm.memory.chunks import encode
from focusllm.method import attention
from focusllm.method.adapter import injected, trainable_parameters
from focusllm.method.attention import (
    QUERY_BLOCK,
    _attend_joined,
    _causal_by_blocks,
    _causal_by_torch,
    _partial,
    _partial_by_formula,
    _parts,
    attend,
)
from focusllm.method.differentiable import by_products
from focusllm.method.focus import encode_chunks, focus_logits, read_prompt
from focusllm.method.kv import KV, LayerSegment
from focusllm.method.opened import read_behind
from focusllm.method.rope import move_keys, rotation
from focusllm.method.scoring import Scoring
from reference import cached_logits, candidates_of, exact_logits

TEXT = random_ids(24 * 3 + 7 + 20)
FAR, LOCAL = TEXT[:-20], TEXT[-20:]
CHUNKS = [FAR[first:stop] for first, stop in cut(len(FAR), SMALL)]
FORCED = random_ids(12, seed=5)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def tensors(lists: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(ids) for ids in lists]


@pytest.mark.parametrize(
    "adapter",
    [
        *(AdapterConfig(), AdapterConfig(rank=4, alpha=8), AdapterConfig("kv"), AdapterConfig("qo")),
        AdapterConfig(rank=4, sink_token=7),
    ],
)
def test_whole_method_equals_reference(adapter: AdapterConfig) -> None:
    model = build()
    with_candidates(model, adapter)
    _wrap_all(model)
    expected = exact_logits(model, CHUNKS, LOCAL[-6:], LOCAL, adapter.sink_token)
    actual = focus_logits(model, tensors(CHUNKS), torch.tensor(LOCAL[-6:]), torch.tensor(LOCAL), 0)
    torch.testing.assert_close(actual, expected, **CLOSE)


def _wrap_all(model: nn.Module) -> None:
    """Put untrained wrappers on the projections that have none, for the reference."""
    from focusllm.method.adapter import CandidateLinear

    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(layer.self_attn, name)
            if not isinstance(projection, CandidateLinear):
                setattr(layer.self_attn, name, CandidateLinear(projection, AdapterConfig()))


def test_candidates_equal_reference(llama: nn.Module) -> None:
    prompt = LOCAL[-6:]
    full = encode_chunks(llama, torch.tensor(CHUNKS[:3]))
    _, candidates = read_prompt(llama, full, torch.tensor(prompt))
    inv_freq = llama.model.rotary_emb.inv_freq
    for (keys, values), got_keys, got_values in zip(
        candidates_of(llama, CHUNKS[:3], prompt), candidates.keys, candidates.values, strict=True
    ):
        unrotated = move_keys(got_keys, rotation(-torch.arange(3)[None], inv_freq))
        torch.testing.assert_close(unrotated[0], keys, **CLOSE)
        torch.testing.assert_close(got_values[0], values, **CLOSE)


@pytest.mark.parametrize("sink", [None, 7])
def test_exact_decoding_equals_reference(sink: int | None) -> None:
    llama = with_candidates(build(), AdapterConfig(sink_token=sink))
    config = SMALL.replace(decoding="exact")
    request = start_request(llama, encode(llama, FAR, config), LOCAL, config)
    actual = [prefill(llama, request, config)[-1]]
    actual += [decode(llama, [request], [token], config)[0] for token in FORCED]
    for step, logits in enumerate(actual):
        new = FORCED[:step]
        expected = exact_logits(llama, CHUNKS, LOCAL[-6:] + new, LOCAL + new, sink)[-1]
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("sink", [None, 7])
def test_cached_decoding_equals_its_definition_from_scratch(sink: int | None) -> None:
    llama = with_candidates(build(), AdapterConfig(sink_token=sink))
    request = start_request(llama, encode(llama, FAR, SMALL), LOCAL, SMALL)
    actual = [prefill(llama, request, SMALL)[-1]]
    actual += [decode(llama, [request], [token], SMALL)[0] for token in FORCED]
    for step, logits in enumerate(actual):
        expected = cached_logits(llama, CHUNKS, LOCAL[-6:], LOCAL, FORCED[:step], sink)
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_cached_differs_from_exact_after_the_first_token(llama: nn.Module) -> None:
    """The two definitions agree on the first token only; equal numbers later would mean that one is wrong."""
    both = []
    for decoding in ("cached", "exact"):
        config = SMALL.replace(decoding=decoding)
        request = start_request(llama, encode(llama, FAR, config), LOCAL, config)
        both.append([prefill(llama, request, config)[-1], decode(llama, [request], FORCED[:1], config)[0]])
    torch.testing.assert_close(both[0][0], both[1][0], rtol=0, atol=0)
    assert (both[0][1] - both[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("per_batch", [1, 3, 100])
def test_chunks_in_batches_equal_chunks_one_by_one(llama: nn.Module, per_batch: int) -> None:
    config = SMALL.replace(chunks_per_batch=per_batch)
    blocks = encode(llama, FAR, config)
    for block, group in zip(blocks, (CHUNKS[:3], CHUNKS[3:]), strict=True):
        for row, chunk in enumerate(group):
            alone = encode_chunks(llama, torch.tensor([chunk]))
            for got, want in zip(block.kv.rows(row, row + 1).keys, alone.keys, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("per_batch", "limit", "passes"), [(8, 48, [2, 1, 1]), (1, 48, [1, 1, 1, 1]), (8, 10, [1, 1, 1, 1])]
)
def test_a_cpu_reads_few_tokens_at_once(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch, per_batch: int, limit: int, passes: list[int]
) -> None:
    read = []
    monkeypatch.setattr("focusllm.memory.chunks.CPU_TOKENS_AT_ONCE", limit)
    monkeypatch.setattr(
        "focusllm.memory.chunks.read_behind", lambda *given: read.append(len(given[2])) or read_behind(*given)
    )
    encode(llama, FAR, SMALL.replace(chunks_per_batch=per_batch))
    assert read == passes


def test_chunks_do_not_depend_on_candidates_or_each_other(llama: nn.Module) -> None:
    base = encode_chunks(build(), torch.tensor([CHUNKS[0], CHUNKS[1]]))
    other = encode_chunks(llama, torch.tensor([CHUNKS[0], CHUNKS[2]]))
    for a, b in zip(base.keys + base.values, other.keys + other.values, strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])


def test_passes_without_logits_end_with_the_last_keys_and_values(llama: nn.Module) -> None:
    calls: list[object] = []
    llama.model.layers[-1].mlp.register_forward_hook(lambda *_: calls.append(_))
    chunk, local = torch.tensor([CHUNKS[0]]), torch.tensor(LOCAL)
    read_prompt(llama, encode_chunks(llama, chunk), local)
    assert not calls
    focus_logits(llama, [chunk[0]], local, local)
    assert len(calls) == 1  # the local pass


def test_gradients_reach_the_candidate_projections_only() -> None:
    model = with_candidates(build(), AdapterConfig(rank=4))
    logits = focus_logits(model, tensors(CHUNKS), torch.tensor(LOCAL[-6:]), torch.tensor(LOCAL))
    logits.sum().backward()
    trained = trainable_parameters(model)
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.values())
    left_out = {id(p) for w in injected(model).values() for p in w.own_parameters().values()} - {
        id(p) for p in trained.values()
    }
    assert len(left_out) == 4  # q and o of the last layer, two tensors each
    others = [p for p in model.parameters() if id(p) not in {id(t) for t in trained.values()}]
    assert all(parameter.grad is None or parameter.grad.abs().max() == 0 for parameter in others)


def test_gradients_equal_finite_differences() -> None:
    model = with_candidates(build().double(), AdapterConfig())
    arguments = (model, tensors(CHUNKS[:2]), torch.tensor(LOCAL[-4:]), torch.tensor(LOCAL))
    focus_logits(*arguments)[-1].logsumexp(0).backward()
    step = 1e-3  # transformers computes norms and rotary tables in float32, so no smaller step shows
    for path in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        parameter = trainable_parameters(model)[path]
        index = divmod(int(parameter.grad.abs().argmax()), parameter.shape[1])
        with torch.no_grad():
            parameter[index] += step
            above = focus_logits(*arguments)[-1].logsumexp(0)
            parameter[index] -= 2 * step
            below = focus_logits(*arguments)[-1].logsumexp(0)
            parameter[index] += step
        torch.testing.assert_close((above - below) / (2 * step), parameter.grad[index], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 5, 40, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("scores_at_once", "watch"), [(attention.SCORES_AT_ONCE, 1), (1, 3)])
def test_attention_over_segments_equals_attention_over_all(
    length: int, dtype: torch.dtype, some: bool, scores_at_once: int, watch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several segments of several blocks, few and many queries, against one softmax over everything in float64; with
    some of a block only scored, and with rows one by one."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, heads, length, 16) for heads in (6, 2, 2))
    rooms = [[(3, 40, 33), (2, 24, 17)], [(3, 64, 9), (2, 64, 0)]]  # rows, room, tokens that count
    segments = [
        ([(*(torch.randn(rows, 2, room, 16) for _ in "kv"), count, None) for rows, room, count in blocks], None)
        for blocks in rooms
    ]
    if some:
        segments[0][0][1] = (*segments[0][0][1][:3], torch.rand(17) > 0.5)
    cast = [([(k.to(dtype), v.to(dtype), n, seen) for k, v, n, seen in blocks], mask) for blocks, mask in segments]
    got, paid = attend(query.to(dtype), key.to(dtype), value.to(dtype), cast, None, 0.25, watch)
    naive = []
    for precise in (torch.float64, dtype):
        rows, start = [], 0
        for first, second in zip(*(blocks for blocks, _ in segments), strict=True):
            keys = [first[0][:, :, : first[2]], second[0][:, :, : second[2]], key[start : start + first[0].shape[0]]]
            values = [
                first[1][:, :, : first[2]],
                second[1][:, :, : second[2]],
                value[start : start + first[0].shape[0]],
            ]
            k = torch.cat(keys, 2).to(dtype).to(precise).repeat_interleave(3, 1)
            v = torch.cat(values, 2).to(dtype).to(precise).repeat_interleave(3, 1)
            q = query[start : start + first[0].shape[0]].to(dtype).to(precise)
            hidden = torch.ones(length, k.shape[2], dtype=torch.bool).triu(k.shape[2] - length + 1)
            if first[3] is not None:
                hidden[:, : first[2]] |= ~first[3]
            scores = q @ k.transpose(-1, -2) * 0.25
            visible = scores.masked_fill(hidden, -torch.inf)
            rows.append(visible.softmax(-1) @ v)
            if precise == torch.float64:
                paying = scores[:, :, -watch:, : first[2]] - visible[:, :, -watch:].logsumexp(-1, keepdim=True)
                others = visible.softmax(-1)[:, :, -1, first[2] :].mean(1)  # the newest one's alone
                share = torch.cat([paying.exp().mean((1, 2)), others], -1)
                torch.testing.assert_close(paid[len(rows) - 1].double(), share, rtol=0.05, atol=2e-3)
            start += first[0].shape[0]
        naive.append(torch.cat(rows))
    error = (got.double() - naive[0]).abs().max()
    budget = (naive[1].double() - naive[0]).abs().max()
    assert error <= 2 * budget + 1e-5


@pytest.mark.parametrize("length", [1, 40])
def test_what_is_not_seen_would_get_a_finite_share(length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 16) for heads in (6, 2, 2))
    loud = 1000 * query[:, ::3, -1:].repeat(1, 1, 4, 1)  # scores far beyond what an exponential holds
    out, paid = attend(query, key, value, [([(loud, loud, 4, torch.tensor([False] * 4))], None)], None, 0.25, 1)
    assert paid[0].isfinite().all()
    assert paid[0][:, :4].min() > 1
    torch.testing.assert_close(out, attend(query, key, value, [], None, 0.25)[0])


def test_attention_masks() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 16) for heads in (4, 2, 2))
    shown = torch.arange(9) % 3 > 0
    past = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16), 9, shown
    seen, own = torch.rand(2, 7, 9) > 0.5, torch.eye(7, dtype=torch.bool)
    got, _ = attend(query, key, value, [([past], seen)], own, 0.25)
    joined = torch.cat([seen & shown, own.expand(2, -1, -1)], -1)[:, None]
    keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    want = nn.functional.scaled_dot_product_attention(query, keys, values, joined, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(got, want, **CLOSE)
    with_gradient, _ = attend(query.requires_grad_(), key, value, [([past], seen)], own, 0.25)
    torch.testing.assert_close(with_gradient, want, **CLOSE)


def test_rows_with_gradients_need_one_block() -> None:
    query = torch.randn(2, 2, 1, 8, requires_grad=True)
    block = (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), 3, None)
    with pytest.raises(ValueError, match="2 blocks"):
        attend(query, query, query, [([block, block], None)], None, 1.0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_moving_keys_round_trip_and_part_without_position(interleaved: bool) -> None:
    keys = torch.randn(2, 3, 4, 24)
    delta = torch.tensor([[5, -7, 0, 1000]]).expand(2, -1)
    inv_freq = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    moved = move_keys(keys, rotation(delta, inv_freq), interleaved)
    torch.testing.assert_close(move_keys(moved, rotation(-delta, inv_freq), interleaved), keys, rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[..., 16:], keys[..., 16:])
    assert torch.equal(moved[:, :, 2], keys[:, :, 2])
    assert not torch.allclose(moved[:, :, 0, :16], keys[:, :, 0, :16])


def test_kv_counts_bytes() -> None:
    kv = KV([torch.zeros(2, 3, 4, 5)], [torch.zeros(2, 3, 4, 5)])
    assert kv.nbytes == 2 * 120 * 4
    assert (kv.num_rows, kv.length) == (2, 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_partial_attention_by_formula_equals_the_kernel(causal: bool, masked: bool) -> None:
    """The formula serves devices without the kernel; it is tested where there is one."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 16) for heads in (6, 2, 2))
    mask = (torch.rand(2, 9, 9) > 0.3) | torch.eye(9, dtype=torch.bool) if masked and not causal else None
    out, lse = _partial(query, key, value, mask, causal, Scoring(0.25))
    want, want_lse = _partial_by_formula(query, key, value, mask, causal, Scoring(0.25))
    torch.testing.assert_close(out, want, **CLOSE)
    torch.testing.assert_close(lse, want_lse, **CLOSE)


@pytest.mark.parametrize("length", [7, 40])
def test_many_queries_by_the_formula_some_rows_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices without the kernel, whose scores are bounded; masks of rows and what is seen go with their rows."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, heads, length, 16) for heads in (6, 2, 2))
    past = torch.randn(5, 2, 9, 16), torch.randn(5, 2, 9, 16), 9, torch.arange(9) % 3 > 0
    arguments = query, key, value, [([past], torch.rand(5, length, 9) > 0.5)], None, 0.25, 3
    want, want_paid = attend(*arguments)
    monkeypatch.setattr(attention, "_has_flash", lambda *_: False)
    monkeypatch.setattr(attention, "SCORES_BY_FORMULA", 2 * 6 * length * (length + 9))
    calls = []
    formula = attention._partial_by_formula
    monkeypatch.setattr(attention, "_partial_by_formula", lambda q, *rest: calls.append(len(q)) or formula(q, *rest))
    got, paid = attend(*arguments)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(paid[0], want_paid[0], **CLOSE)
    assert calls == [2, 2, 2, 2, 1, 1]  # past and own tokens of two rows, of two, of one


@pytest.mark.parametrize("own", ["causal", "diagonal", "rows"])
@pytest.mark.parametrize("masked", [False, True])
def test_products_with_gradients_equal_the_kernel(own: str, masked: bool) -> None:
    """What 2-byte types take on a CPU, in float64: results and gradients, with a room behind what counts."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = (random(2, heads, 5, 8).requires_grad_() for heads in (4, 2, 2))
    earlier = (random(2, 2, 9, 8), random(2, 2, 9, 8).requires_grad_(), 7, None)
    mask = {
        "causal": None,
        "diagonal": torch.eye(5, dtype=torch.bool),
        "rows": torch.rand(2, 5, 5, generator=generator) > 0.3,
    }[own]
    segment_mask = torch.rand(5, 7, generator=generator) > 0.3 if masked else None
    segments = [([earlier], segment_mask), ([(random(2, 2, 3, 8), random(2, 2, 3, 8), 3, None)], None)]
    results, parts = [], [LayerSegment(*segment) for segment in segments]
    for function in (_attend_joined, by_products):
        out = function(query, _parts(key, value, parts, mask, Scoring(0.3)), 0.3)
        grads = torch.autograd.grad((out * torch.arange(8)).sum(), (query, key, value, earlier[1]))
        results.append((out, *grads))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_the_kernel_for_gpus_gives_causal_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads, num_kv_heads in ((6, 2), (4, 4)):
        query = torch.randn(2, heads, 9, 16, generator=generator)
        key, value = (torch.randn(2, num_kv_heads, 9, 16, generator=generator) for _ in range(2))
        want, _ = _partial_by_formula(query, key, value, None, True, Scoring(0.3))
        torch.testing.assert_close(_causal_by_torch(query, key, value, 0.3), want, **CLOSE)


@pytest.mark.parametrize("length", [QUERY_BLOCK + 1, 3 * QUERY_BLOCK])
def test_blocks_of_queries_give_causal_attention(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 16, generator=generator).bfloat16() for heads in (6, 2, 2))
    want = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, scale=0.3, enable_gqa=True
    )
    got = attend(query, key, value, [], None, 0.3)[0]
    assert torch.equal(got, _causal_by_blocks(query, key, value, Scoring(0.3)))
    scores = (query * 0.3) @ key.repeat_interleave(3, 1).transpose(2, 3)
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    formula = scores.softmax(-1) @ value.repeat_interleave(3, 1)  # in the same type
    assert (got - want).norm() < 1.05 * (formula - want).norm()
    torch.testing.assert_close(
        _causal_by_blocks(query.double(), key.double(), value.double(), Scoring(0.3)).float(), want, **CLOSE
    )
