"""Estimates against what is really held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import SMALL, build, random_ids, with_candidates
from focusllm import ConfigError, MemoryLimitError
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.machine import memory_limits
from focusllm.memory.chunks import Place, encode, tokens_at_once
from focusllm.memory.cost import (
    check_read,
    estimate,
    find_place,
    forget_peak_memory,
    free_memory,
    peak_memory,
    total_memory,
)
from focusllm.memory.lookup import Heads
from focusllm.method.base import layout
from focusllm.method.packed import pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [100, 24 * 8])
@pytest.mark.parametrize("overlap", [0, 6])
@pytest.mark.parametrize(("kv_dtype", "refresh_rows"), [("same", 8), ("same", 3), ("int8", 12)])
def test_estimate_equals_what_is_held(
    dtype: torch.dtype, length: int, overlap: int, kv_dtype: str, refresh_rows: int
) -> None:
    model = with_candidates(build(dtype=dtype))
    config = SMALL.replace(chunk_overlap=overlap, kv_dtype=kv_dtype, refresh_rows=refresh_rows)
    cost = estimate(model, config, length, num_new_tokens=10)
    blocks = encode(model, random_ids(length), config)
    assert cost.chunks == sum(block.kv.nbytes for block in blocks)
    assert cost.weights == sum(parameter.nbytes for parameter in model.parameters())
    request = start_request(model, blocks, random_ids(20), config)
    prefill(model, request, config)
    for token in random_ids(10):
        decode(model, [request], [token], config)
    assert cost.rows == pytest.approx(request.nbytes, rel=0.1)
    assert cost.total == cost.weights + cost.chunks + cost.rows + cost.scratch
    assert cost.to_dict()["total"] == cost.total


@pytest.mark.parametrize("usual", [False, True])
@pytest.mark.parametrize("kv_place", ["device", "disk"])
def test_what_opened_chunks_are_chosen_by_counts(usual: bool, kv_place: str, tmp_path: Path) -> None:
    """By the heads that choose, wherever the chunks lie."""
    model, config = build(), SMALL.replace(far_context="opened", chunk_overlap=0)
    heads = Heads.of(model, [(0, 0), (0, 1), (1, 3)]).asking([[5, 6], [7]] if usual else [])
    cost = estimate(model, config, 24 * 8, place=kv_place, heads=heads)
    blocks = encode(model, random_ids(24 * 8), config, place=Place(kv_place, tmp_path), heads=heads)
    held = [block.lookup.nbytes for block in blocks if block.lookup is not None]
    in_memory = sum(block.kv.nbytes for block in blocks) if kv_place == "device" else 0
    assert cost.chunks == in_memory + sum(held) - blocks[0].lookup.usual_start.nbytes  # type: ignore[union-attr]


def test_of_opened_chunks_on_disk_only_what_is_opened_is_brought() -> None:
    model, config = build(), SMALL.replace(far_context="opened", chunks_per_batch=8)
    heads = Heads.of(model, [(0, 0)])
    per_token = layout(model).kv_bytes_per_token * 4
    many = estimate(model, config, 24 * 8, place="disk", heads=heads)
    condensed = estimate(model, config.replace(far_context="condensed"), 24 * 8, place="disk")
    assert condensed.scratch - many.scratch >= 7 * 24 * per_token
    opening = config.replace(open_tokens=4 * config.chunk_length)
    more = estimate(model, opening, 24 * 8, place="disk", heads=heads)
    assert more.scratch - many.scratch >= 3 * 24 * per_token


@pytest.mark.parametrize("refresh_rows", [2, 12])
def test_what_is_generated_becomes_chunks_and_does_not_stay_behind_every_row(refresh_rows: int) -> None:
    model = with_candidates(build())
    config = SMALL.replace(chunk_overlap=0, refresh_rows=refresh_rows)
    request = start_request(model, encode(model, random_ids(24 * 8), config), random_ids(20), config)
    prefill(model, request, config)
    generated = random_ids(100)  # more than the local context ever holds, and no more positions than there are
    for token in generated:
        decode(model, [request], [token], config)
    made = sum(block.kv.nbytes for block in request.blocks[1:])
    assert made
    held = estimate(model, config, 24 * 8, num_new_tokens=len(generated)).rows
    assert held == pytest.approx(request.nbytes + made, rel=0.1)


def test_only_the_place_that_is_taken_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("focusllm.memory.cost.free_disk", lambda _: pytest.fail("it was looked at"))
    assert find_place(build(), SMALL, 1000, tmp_path) == "device"


def test_a_model_that_is_not_loaded(llama: nn.Module) -> None:
    with torch.device("meta"):
        skeleton = build()
    model = build()
    pack(model)  # as loading does
    loaded, unloaded = estimate(model, SMALL, 1000), estimate(skeleton, SMALL, 1000)
    assert (loaded.weights, loaded.chunks, loaded.rows) == (unloaded.weights, unloaded.chunks, unloaded.rows)
    assert loaded.runtime == 0
    assert unloaded.runtime > 10_000_000
    assert unloaded.total == unloaded.runtime + unloaded.weights + unloaded.new


def test_weights_that_are_not_loaded_need_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with torch.device("meta"):
        skeleton = build(max_position_embeddings=10_000)
    here = SMALL.replace(kv_place="device")
    cost = estimate(skeleton, here, 1000)
    assert cost.needed == cost.weights + cost.new
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: cost.needed - 1)
    assert find_place(skeleton, here, 1000, tmp_path) is None
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: cost.needed)
    assert find_place(skeleton, here, 1000, tmp_path) == "device"


def test_a_model_that_will_be_on_a_gpu_may_keep_chunks_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with torch.device("meta"):
        skeleton = build(max_position_embeddings=10_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: 10**9)
    assert find_place(skeleton, SMALL.replace(kv_place="host"), 1000, tmp_path) == "host"


def test_what_would_fit_is_named_and_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, here = build(max_position_embeddings=10_000), SMALL.replace(kv_place="device", chunk_length=500)
    cost = estimate(model, here, 100_000)
    needed = cost.chunks + cost.rows + cost.scratch
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: int(needed * 0.6))
    with pytest.raises(
        MemoryLimitError,
        match=r"100,000 tokens needs about .*kv_place='disk' or kv_dtype='int8' or dtype='bfloat16' or a text",
    ) as error:
        check_read(model, here, 100_000, tmp_path)
    fitting = int(str(error.value).split("at most ")[1].split(" ")[0].replace(",", ""))
    assert 50_000 < fitting < 70_000
    half = build(dtype=torch.bfloat16, max_position_embeddings=10_000)
    assert check_read(model, here, fitting, tmp_path) == "device"
    assert check_read(half, here, 100_000, tmp_path) == "device"
    assert check_read(model, here.replace(kv_dtype="int8"), 100_000, tmp_path) == "device"
    assert check_read(model, here.replace(kv_place="auto"), 100_000, tmp_path) == "disk"


def test_fewer_chunks_at_once_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("focusllm.memory.chunks.CPU_TOKENS_AT_ONCE", 2**40)  # as on a GPU
    model = build(max_position_embeddings=10_000)
    wide = SMALL.replace(chunks_per_batch=100_000, kv_place="device")
    cost = estimate(model, wide, 100_000)
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: cost.chunks + cost.rows + cost.scratch - 1)
    with pytest.raises(MemoryLimitError, match="chunks_per_batch=1"):
        check_read(model, wide, 100_000, tmp_path)
    assert check_read(model, wide.replace(chunks_per_batch=1), 100_000, tmp_path) == "device"


def test_a_pass_on_a_cpu_has_few_tokens() -> None:
    model = build(max_position_embeddings=10_000)
    wide = SMALL.replace(chunk_length=512, chunks_per_batch=8)
    assert [tokens_at_once(wide, torch.device(name)) for name in ("cpu", "cuda")] == [2048, 4096]
    few, many = (estimate(model, wide.replace(chunks_per_batch=count), 100_000).scratch for count in (4, 8))
    one = estimate(model, wide.replace(chunks_per_batch=1), 100_000).scratch
    assert few == many == 4 * one
    long = SMALL.replace(chunk_length=4096, chunks_per_batch=2)  # read all the same
    assert estimate(model, long, 100_000).scratch == 2 * many


@pytest.mark.parametrize("hierarchy", ["", "memory"])
def test_limits_of_control_groups(tmp_path: Path, hierarchy: str) -> None:
    names = ["memory.limit_in_bytes", "memory.usage_in_bytes"] if hierarchy else ["memory.max", "memory.current"]
    droppable = "total_inactive_file" if hierarchy else "inactive_file"

    def group(path: str, most: object, used: int) -> None:
        folder = tmp_path / "sys/fs/cgroup" / hierarchy / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (most, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{droppable} 100\n")

    assert memory_limits(tmp_path) == []  # no control groups at all
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = f"9:name=systemd:/\n4:cpu,{hierarchy}:/jobs/one\n" if hierarchy else "0::/jobs/one\n"
    (tmp_path / "proc/self/cgroup").write_text(lines)
    group("jobs", 5000, 700)
    group("jobs/one", 2**63 if hierarchy else "max", 300)
    limits = memory_limits(tmp_path)
    assert limits[-1] == (5000, 600)
    assert all(most == 2**63 for most, _ in limits[:-1])


def test_a_container_has_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focusllm.memory.cost.memory_limits", lambda: [(10**6, 10**5)])
    assert free_memory(torch.device("cpu")) == 900_000
    assert total_memory(torch.device("cpu")) == 10**6


def test_too_many_chunks_are_said_before_too_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: 0)
    with pytest.raises(ConfigError, match="chunks need"):
        check_read(build(), SMALL, 10**6, tmp_path)
    with pytest.raises(MemoryLimitError, match="use a machine with more room"):
        check_read(build(), SMALL, 1000, tmp_path)


def test_machine_figures() -> None:
    assert free_memory(torch.device("cpu")) > 0
    assert peak_memory(torch.device("cpu")) > 10_000_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets")
def test_the_peak_is_that_since_it_was_forgotten() -> None:
    device = torch.device("cpu")
    forget_peak_memory(device)  # what other tests held
    torch.ones(2**26)  # 256 MiB, gone at once
    before = peak_memory(device)
    forget_peak_memory(device)
    assert peak_memory(device) < before - 2**27
    torch.ones(2**26)
    assert peak_memory(device) > before - 2**27
