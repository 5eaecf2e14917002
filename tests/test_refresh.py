"""Focused refresh: only the rows that get attention are advanced, and that is exactly what is computed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import reference
from conftest import SMALL, build, random_ids, with_candidates
from focusllm import AdapterConfig, ConfigError, FocusConfig
from focusllm.decoding import engine
from focusllm.decoding.engine import Request, decode, prefill, start_request
from focusllm.decoding.refresh import RefreshPolicy
from focusllm.memory.chunking import cut, split
from focusllm.memory.chunks import encode

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FOCUSED = SMALL.replace(refresh_rows=2, rechunk=False)
LENGTH = 24 + 5 * SMALL.stride + 20  # six chunks and the local context


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows change places at the least difference at a token, as random models never show a clear one."""
    monkeypatch.setattr(engine, "RefreshPolicy", partial(RefreshPolicy, margin=1.0, memory=0.0))


def begin(model: nn.Module, ids: list[int], config: FocusConfig) -> tuple[Request, torch.Tensor]:
    far, local = split(ids, config)
    request = start_request(model, encode(model, far, config), local, config)
    return request, prefill(model, request, config)[-1]


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize(("length", "sink"), [(LENGTH, None), (LENGTH + 7, None), (LENGTH + 7, 9)])
def test_equals_its_definition_from_scratch(length: int, sink: int | None) -> None:
    llama = with_candidates(build(), AdapterConfig(sink_token=sink))
    ids, generated = random_ids(length), random_ids(9, seed=1)
    far, local = split(ids, FOCUSED)
    chunks = [far[first:stop] for first, stop in cut(len(far), FOCUSED)]
    request, _ = begin(llama, ids, FOCUSED)
    seen = [sorted(request.refreshed_slots)]
    for step, token in enumerate(generated, 1):
        hot = sorted(request.refreshed_slots)
        assert len(hot) == 2 + (len(chunks) - 6)  # the short last chunk is a group of its own
        seen.append(hot)
        logits = decode(llama, [request], [token], FOCUSED)[0]
        expected = reference.focused_logits(llama, chunks, local[-6:], local, generated[:step], seen, sink)
        torch.testing.assert_close(logits, expected, **CLOSE)
    assert len(set(map(tuple, seen))) > 3  # rows did change places
    assert any(rows.parked for rows in request.hot)


@pytest.mark.parametrize(("rows", "sink"), [(2, None), (2, 9), (4, None)])
def test_hot_rows_are_the_last_and_those_that_the_prompt_pays_most_to(rows: int, sink: int | None) -> None:
    llama = with_candidates(build(), AdapterConfig(sink_token=sink))
    config, recent = FOCUSED.replace(refresh_rows=rows), rows // 4
    chosen = set()
    for seed in range(6):
        far, local = split(random_ids(LENGTH, seed), FOCUSED)
        chunks = [far[first:stop] for first, stop in cut(len(far), FOCUSED)]
        request, _ = begin(llama, [*far, *local], config)
        paid = reference.attention_to_candidates(llama, chunks, local[-6:], local, sink)[: 6 - recent]
        assert request.refreshed_slots == sorted([*paid.topk(rows - recent).indices.tolist(), *range(6 - recent, 6)])
        chosen |= set(request.refreshed_slots)
    assert len(chosen) > rows  # not the same for every text


def test_enough_rows_is_every_row(llama: nn.Module) -> None:
    ids, generated = random_ids(120), random_ids(10, seed=1)
    one, _ = begin(llama, ids, SMALL.replace(refresh_rows=None))
    other, _ = begin(llama, ids, SMALL.replace(refresh_rows=4))  # of the full chunks; the last one is shorter
    assert [block.num_chunks for block in other.blocks] == [4, 1]
    assert not other.hot
    for token in generated:
        expected = decode(llama, [one], [token], SMALL.replace(refresh_rows=None))
        assert torch.equal(decode(llama, [other], [token], SMALL.replace(refresh_rows=4)), expected)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("sink", [None, 9])
def test_requests_together_equal_their_single_runs(sink: int | None) -> None:
    """Focused, all rows, the base model alone, and one that is rechunked on the way."""
    llama = with_candidates(build(), AdapterConfig(sink_token=sink))
    config = FOCUSED.replace(rechunk=True)
    texts = [random_ids(n, seed=n) for n in (170, 60, 9, 120)]
    together = [begin(llama, ids, config)[0] for ids in texts]
    alone = [begin(llama, ids, config)[0] for ids in texts]
    for step in range(30):
        tokens = random_ids(len(texts), seed=100 + step)
        logits = decode(llama, together, tokens, config)
        for number, request in enumerate(alone):
            torch.testing.assert_close(logits[number], decode(llama, [request], [tokens[number]], config)[0], **CLOSE)


@pytest.mark.usefixtures("restless")
def test_fork_is_independent(llama: nn.Module) -> None:
    request, _ = begin(llama, random_ids(170), FOCUSED)
    for token in random_ids(5, seed=4):
        decode(llama, [request], [token], FOCUSED)
    twin = request.fork()
    expected = [decode(llama, [request], [token], FOCUSED)[0] for token in (7, 8, 9)]
    for token, logits in zip((7, 8, 9), expected, strict=True):
        assert torch.equal(decode(llama, [twin], [token], FOCUSED)[0], logits)
    assert twin.nbytes == request.nbytes
    assert all(ours is theirs for ours, theirs in zip(twin.tails, request.tails, strict=True))  # read, never written


def test_cold_rows_stay_as_they_are(llama: nn.Module) -> None:
    request, _ = begin(llama, random_ids(170), FOCUSED)
    before = [tensor.clone() for tail in request.tails for tensor in tail.keys]
    for token in random_ids(5, seed=4):
        decode(llama, [request], [token], FOCUSED)
    assert all(torch.equal(a, b) for a, b in zip(before, [t for tail in request.tails for t in tail.keys], strict=True))
    assert [tail.length for tail in request.tails] == [5, 5]


def test_exact_decoding_takes_all_rows(llama: nn.Module) -> None:
    request, _ = begin(llama, random_ids(170), FOCUSED.replace(decoding="exact"))
    assert not request.hot


def test_attention_is_a_running_mean(llama: nn.Module) -> None:
    """Over the prompt's mean, with which rows were chosen, and every token's own."""
    request, _ = begin(llama, random_ids(LENGTH), FOCUSED)
    for token in random_ids(5, seed=4):
        before, total = request.hot[0].attention, request.paid
        decode(llama, [request], [token], FOCUSED)
        torch.testing.assert_close(request.hot[0].attention, 0.95 * before + 0.05 * (request.paid - total))


def test_policy_wants_the_most_attended() -> None:
    policy = RefreshPolicy(rows=2, margin=1.5)
    assert policy.wanted([0.1, 0.9, 0.2, 0.0], hot=[1, 3]) == [(3, 2)]
    assert policy.wanted([0.1, 0.9, 0.2, 0.15], hot=[1, 3]) == []  # not by much
    assert policy.wanted([0.1, 0.9, 0.2, 0.9], hot=[0, 2]) == [(0, 1), (2, 3)]
    assert RefreshPolicy(rows=4).wanted([0.9, 0.1, 0.2, 0.3, 0.0, 0.0], hot=[1, 2, 3, 5]) == [(1, 0)]  # the last stays


def test_number_of_rows_is_checked() -> None:
    with pytest.raises(ConfigError, match="refresh_rows is 0"):
        FocusConfig(refresh_rows=0)
