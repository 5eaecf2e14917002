"""Layers with a sliding window, capped scores, learned sinks, frequencies of their own: against the base model's own
eager attention, told by an explicit mask what sees what.

The reference has nothing of the package's but the projections: rows are read at positions that put their candidate
right at its slot, so no key is moved, and masks are made of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from conftest import SMALL, WINDOWED, build, byte_tokenizer, random_ids, with_candidates
from focusllm import AdapterConfig, FocusConfig, FocusForCausalLM, FocusLLM
from focusllm.checks.verify import verify
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.evaluation.methods.full import Full
from focusllm.evaluation.methods.pi import PositionInterpolation
from focusllm.evaluation.methods.snapkv import SnapKV
from focusllm.memory.chunking import cut
from focusllm.memory.chunks import Place, encode
from focusllm.memory.cost import stored_bytes
from focusllm.method import attention, passes
from focusllm.method.adapter import trainable_parameters
from focusllm.method.attention import attend
from focusllm.method.base import CACHE_NAME, layout
from focusllm.method.differentiable import by_formula
from focusllm.method.focus import encode_chunks, focus_logits
from focusllm.method.kv import KV, Segment
from focusllm.method.scoring import Scoring
from focusllm.training.dense import Sample, dense_logits

TEXT = random_ids(24 * 3 + 7 + 20)
FAR, LOCAL = TEXT[:-20], TEXT[-20:]
CHUNKS = [FAR[first:stop] for first, stop in cut(len(FAR), SMALL)]
FORCED = random_ids(5, seed=5)
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
Kept = list[tuple[Tensor, Tensor]]


LIKE_OTHERS = ("vaultgemma", "flint", "mellum")  # nothing in them that none of the others has


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in WINDOWED]
)
def test_family(family: str) -> None:
    if not hasattr(transformers, WINDOWED[family][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {family} yet")
    model = build(family, "eager")
    checks = list(verify(model))
    assert layout(model).window == 10
    assert not [check for check in checks if not check.passed]


def forward(
    model: nn.Module,
    ids: Sequence[int],
    positions: Tensor,
    earlier: Kept | None = None,
    earlier_positions: Tensor | None = None,
    hidden: Tensor | None = None,
    candidate: bool = False,
) -> tuple[Kept, Tensor]:
    """The base model's own eager forward over some tokens: their keys and values, and logits [T, V].

    Args:
        earlier: keys and values [1, K, S, D] a layer, at `earlier_positions`.
        hidden: [T, S + T], what is not seen though it is earlier and inside the window.
        candidate: the last token is projected by the candidate projections.
    """
    cache = DynamicCache()
    for i, (key, value) in enumerate(earlier or []):
        cache.update(key, value, i)
    at = positions if earlier_positions is None else torch.cat([earlier_positions, positions])
    count, length = len(at) - len(ids), len(ids)
    causal = torch.ones(length, len(at), dtype=torch.bool).tril(count)
    if hidden is not None:
        causal &= ~hidden
    near = at > positions[:, None] - model.config.sliding_window
    masks = {
        kind: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        for kind, seen in {"full_attention": causal, "sliding_attention": causal & near}.items()
    }
    is_mixed = getattr(model.config, "layer_types", None) is not None
    own = slice(length - 1, length) if candidate else passes.NO_TOKENS
    token = passes._pass.set(passes.Pass(lambda *_: _[1], own, positions, None))  # which tokens are candidates
    try:
        logits = model(
            input_ids=torch.tensor([ids]),
            position_ids=positions[None],
            attention_mask=masks if is_mixed else masks["sliding_attention"],
            **{CACHE_NAME: cache},
        ).logits[0]
    finally:
        passes._pass.reset(token)
    return [(layer.keys[:, :, count:], layer.values[:, :, count:]) for layer in cache.layers], logits


def candidates_of(model: nn.Module, prompt: list[int], first_slot: int) -> Kept:
    """The candidates of all chunks at their slots, [1, K, R, D] a layer."""
    made = []
    for slot, chunk in enumerate(CHUNKS):
        ids = chunk + prompt
        kept, _ = forward(model, ids, torch.arange(len(ids)) - (len(ids) - 1) + first_slot + slot, candidate=True)
        made.append([(key[:, :, -1:], value[:, :, -1:]) for key, value in kept])
    return joined(made)


def joined(parts: list[Kept]) -> Kept:
    return [tuple(torch.cat([part[i][which] for part in parts], 2) for which in (0, 1)) for i in range(len(parts[0]))]


def cached_reference(
    model: nn.Module, sink: int | None = None, seen: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """Logits [V] after the local context and after every forced token, by the definition of cached decoding.

    Args:
        seen: which candidates the local context and each forced token sees; None: all.
    """
    first, count = int(sink is not None), len(CHUNKS)
    kept: list[Kept] = []
    found, places = [], torch.arange(0)
    for step in range(len(FORCED) + 1):
        slots = torch.arange(count) + first
        made = candidates_of(model, LOCAL[-6:] + FORCED[:step], first)
        ids = ([] if sink is None else [sink]) + LOCAL if step == 0 else FORCED[step - 1 : step]
        begin = first + count + (0 if step == 0 else len(LOCAL) + step - 1)
        at = torch.arange(begin, begin + len(ids))
        earlier_at = torch.cat([slots, places])
        hidden = torch.zeros(len(ids), len(earlier_at) + len(ids), dtype=torch.bool)
        if seen is not None:
            hidden[:, [slot for slot in range(count) if slot not in seen[step]]] = True
        if sink is not None and step == 0:
            at = torch.cat([torch.zeros(1, dtype=torch.long), at[:-1]])
            hidden[0, :count] = True
        new, logits = forward(model, ids, at, joined([made, *kept]), earlier_at, hidden)
        kept, places = [*kept, new], torch.cat([places, at])
        found.append(logits[-1])
    return found


def run(model: nn.Module, config: FocusConfig) -> tuple[list[Tensor], list[list[int]]]:
    """The engine: logits after prefill and every forced token; which candidates were seen for each."""
    request = start_request(model, encode(model, FAR, config), LOCAL, config)
    logits, seen = [prefill(model, request, config)[-1]], [request.refreshed_slots]
    for token in FORCED:
        seen.append(request.refreshed_slots)
        logits.append(decode(model, [request], [token], config)[0])
    return logits, seen


@torch.no_grad()
@pytest.mark.parametrize("window", [5, 27, 200])
@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "granite_swa"])
def test_whole_method_and_cached_decoding_equal_the_masked_base(family: str, window: int) -> None:
    """Windows shorter than a chunk, between a chunk and a row, and longer than all."""
    model = with_candidates(build(family, "eager", sliding_window=window))
    expected = cached_reference(model)
    chunks, prompt = [torch.tensor(chunk) for chunk in CHUNKS], torch.tensor(LOCAL[-6:])
    torch.testing.assert_close(focus_logits(model, chunks, prompt, torch.tensor(LOCAL))[-1], expected[0], **CLOSE)
    for actual, wanted in zip(run(model, SMALL)[0], expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("decoding", "sink"), [("cached", 7), ("exact", None), ("exact", 7)])
def test_sinks_and_exact_decoding(decoding: str, sink: int | None) -> None:
    model = with_candidates(build("gpt_oss", "eager", sliding_window=8), AdapterConfig(sink_token=sink))
    actual = run(model, SMALL.replace(decoding=decoding))[0]
    if decoding == "cached":
        for got, wanted in zip(actual, cached_reference(model, sink), strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)
        return
    for step, got in enumerate(actual):
        chunks, local = [torch.tensor(chunk) for chunk in CHUNKS], torch.tensor(LOCAL + FORCED[:step])
        torch.testing.assert_close(got, focus_logits(model, chunks, local[14:], local)[-1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("sink", [None, 7])
def test_rows_in_buffers_of_their_own(sink: int | None) -> None:
    """Few rows are seen at a time, and change places."""
    model = with_candidates(build("gemma3_text", "eager", sliding_window=9), AdapterConfig(sink_token=sink))
    logits, seen = run(model, SMALL.replace(refresh_rows=1))
    for actual, wanted in zip(logits, cached_reference(model, sink, seen), strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", ["same", "int8"])
def test_keys_and_values_of_other_shapes_in_each_layer(tmp_path: Path, kv_dtype: str) -> None:
    """Kept on disk, and in memory if packed."""
    model = with_candidates(build("mimo_v2_flash", "eager"))
    config = SMALL.replace(kv_dtype=kv_dtype)
    expected = cached_reference(model)[0] if kv_dtype == "same" else run(model, config)[0][0]
    place = Place("disk", tmp_path, "document")
    for blocks in (encode(model, FAR, config, place=place), encode(model, FAR, config, place=place)):
        request = start_request(model, blocks, LOCAL, config)
        torch.testing.assert_close(prefill(model, request, config)[-1], expected, **CLOSE)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.rows"))
    assert size > stored_bytes(model, config, len(FAR))
    layers = layout(model).layers
    assert [(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers] == [
        *((4, 16, 12), (2, 16, 12), (4, 16, 12)),
    ]


@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("sink", [None, 7])
def test_training_computes_what_decoding_does(family: str, sink: int | None) -> None:
    model = with_candidates(build(family, "eager", sliding_window=15), AdapterConfig(rank=4, sink_token=sink))
    chunks = [chunk for chunk in CHUNKS if len(chunk) == 24]
    kv = encode_chunks(model, torch.tensor(chunks))
    sample = Sample(LOCAL + FORCED, len(FORCED), 6)
    shorter = Sample(LOCAL[3:] + FORCED[:2], 2, 4)
    logits = dense_logits(model, kv, [sample, shorter])
    request = start_request(
        model, encode(model, FAR[: len(FAR) - len(CHUNKS[-1]) + SMALL.overlap], SMALL), LOCAL, SMALL
    )
    assert request.num_chunks == len(chunks)
    expected = [prefill(model, request, SMALL)[-1]]
    expected += [decode(model, [request], [token], SMALL)[0] for token in FORCED[:-1]]
    torch.testing.assert_close(logits[: len(FORCED)].detach(), torch.stack(expected), **CLOSE)
    alone = dense_logits(model, kv, [shorter])
    torch.testing.assert_close(logits[len(FORCED) :], alone, **CLOSE)
    logits.logsumexp(-1).sum().backward()
    for name, parameter in trainable_parameters(model).items():  # in later layers the candidates are out of reach
        assert parameter.grad.abs().max() > 0 or not name.startswith("model.layers.0"), name


def test_methods_that_need_full_attention_say_so() -> None:
    llm = FocusLLM(FocusForCausalLM(build("gemma3_text", "eager"), SMALL), byte_tokenizer(), "tiny")
    assert SnapKV(llm).fits(100) == "the base model has layers with a sliding window"
    assert PositionInterpolation(llm).fits(100) == "the base model has several sets of rotary frequencies"
    assert Full(llm).fits(100) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3, 40, attention.QUERY_BLOCK + 9])
@pytest.mark.parametrize("special", ["window", "cap", "sinks", "all"])
def test_attention_with_all_that_a_layer_does(special: str, length: int, dtype: torch.dtype) -> None:
    """Every way that attention goes, against the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 2, 2))
    past = [torch.randn(2, 2, 30, 8, generator=generator) for _ in "kv"]
    wants = {"window", "cap", "sinks"} if special == "all" else {special}
    for held in (24, 0):
        how = Scoring(
            1.5,
            2.0 if "cap" in wants else None,
            torch.randn(4, generator=generator) if "sinks" in wants else None,
            19 if "window" in wants and held + length > 19 else None,
            torch.arange(held, held + length)[None],
        )
        at = torch.arange(held + length)
        sees = at <= at[held:, None]
        if how.window is not None:
            sees &= at > at[held:, None] - how.window
        keys, values = (torch.cat([old[:, :, :held], new], 2) for old, new in zip(past, (key, value), strict=True))
        wide = [x.to(dtype).double() for x in (query, keys, values)]
        want = by_formula(wide[0], [(wide[1], wide[2], sees)], how)
        segments = [([(past[0].to(dtype), past[1].to(dtype), held, None)], None)] if held else []
        got, paid = attend(query.to(dtype), key.to(dtype), value.to(dtype), segments, None, how, int(held > 0))
        error = (got.double() - want).norm() / want.norm()
        assert error < (1e-9 if dtype == torch.float64 else 2e-2)
        if held:
            shares = by_formula(wide[0], [(wide[1], torch.eye(len(at)).double().expand(2, 2, -1, -1), sees)], how)
            torch.testing.assert_close(paid[0].double(), shares[:, :, -1].mean(1), rtol=0.05, atol=2e-3)


def test_segments_that_do_not_fill_the_positions_must_say_theirs() -> None:
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    kept = KV([torch.randn(1, 2, 6, 8)], [torch.randn(1, 2, 6, 8)])
    how = Scoring(1.0, window=3, positions=torch.tensor([[20]]))
    with pytest.raises(ValueError, match="must say their own"):
        attend(query, key, key, [Segment([kept]).layer(0)], None, how)
    places = torch.tensor([1, 2, 3, 17, 18, 19])
    got, _ = attend(query, key, key, [Segment([kept], positions=[places]).layer(0)], None, how)
    near = [torch.cat([kept.keys[0][:, :, 4:], key], 2), torch.cat([kept.values[0][:, :, 4:], key], 2)]
    torch.testing.assert_close(got, by_formula(query, [(*near, None)], Scoring(1.0)))
