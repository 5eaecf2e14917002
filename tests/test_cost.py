"""Estimates against what is really held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import SMALL, build, random_ids, with_candidates
from focusllm import MemoryLimitError
from focusllm.cost import check_memory, estimate, free_memory, peak_memory
from focusllm.engine import decode, encode, prefill, start_request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [100, 24 * 8])
def test_estimate_equals_what_is_held(dtype: torch.dtype, length: int) -> None:
    model = with_candidates(build(dtype=dtype))
    cost = estimate(model, SMALL, length, num_new_tokens=10)
    blocks = encode(model, random_ids(length), SMALL)
    assert cost.chunks == sum(block.kv.nbytes for block in blocks)
    assert cost.weights == sum(parameter.nbytes for parameter in model.parameters())
    request = start_request(model, blocks, random_ids(20), SMALL)
    prefill(model, request, SMALL)
    for token in random_ids(10):
        decode(model, [request], [token], SMALL)
    assert cost.rows == pytest.approx(request.nbytes, rel=0.1)
    assert cost.total == cost.weights + cost.chunks + cost.rows + cost.scratch
    assert cost.to_dict()["total"] == cost.total


def test_a_model_that_is_not_loaded(llama: nn.Module) -> None:
    with torch.device("meta"):
        skeleton = build()
    loaded, unloaded = estimate(build(), SMALL, 1000), estimate(skeleton, SMALL, 1000)
    assert (loaded.weights, loaded.chunks, loaded.rows) == (unloaded.weights, unloaded.chunks, unloaded.rows)


def test_what_would_fit_is_named_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    cost = estimate(model, SMALL, 100_000)
    needed = cost.chunks + cost.rows + cost.scratch
    monkeypatch.setattr("focusllm.cost.free_memory", lambda _: int(needed * 0.6))
    with pytest.raises(
        MemoryLimitError, match=r"reading 100,000 tokens needs about .*dtype='bfloat16' or a text of at most"
    ) as error:
        check_memory(model, SMALL, 100_000)
    fitting = int(str(error.value).split("at most ")[1].split(" ")[0].replace(",", ""))
    assert 50_000 < fitting < 70_000
    check_memory(model, SMALL, fitting)
    check_memory(build(dtype=torch.bfloat16), SMALL, 100_000)


def test_fewer_chunks_at_once_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, wide = build(), SMALL.replace(chunks_per_batch=100_000)
    cost = estimate(model, wide, 100_000)
    monkeypatch.setattr("focusllm.cost.free_memory", lambda _: cost.chunks + cost.rows + cost.scratch - 1)
    with pytest.raises(MemoryLimitError, match="chunks_per_batch=1"):
        check_memory(model, wide, 100_000)
    check_memory(model, wide.replace(chunks_per_batch=1), 100_000)


def test_machine_figures() -> None:
    assert free_memory(torch.device("cpu")) > 0
    assert peak_memory(torch.device("cpu")) > 10_000_000
