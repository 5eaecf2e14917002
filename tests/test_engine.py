"""The engine: cutting, state, batches, generation past the local context."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from conftest import SMALL, build, random_ids, with_candidates
from focusllm import ConfigError, FocusConfig
from focusllm.decoding.engine import Request, decode, prefill, start_request
from focusllm.memory.chunking import count_chunks, cut, num_local_chunks, split, steps
from focusllm.memory.chunks import encode
from focusllm.method.base import run_plain
from focusllm.method.focus import focus_logits
from focusllm.method.kv import KV, GrowingKV

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def begin(model: nn.Module, ids: list[int], config: FocusConfig) -> tuple[Request, torch.Tensor]:
    far, local = split(ids, config)
    request = start_request(model, encode(model, far, config), local, config)
    return request, prefill(model, request, config)[-1]


@pytest.mark.parametrize("length", [0, 1, 23, 24, 25, 48, 100])
def test_cut_covers_every_token_once(length: int) -> None:
    bounds = cut(length, SMALL.replace(chunk_overlap=0))
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(length))
    assert all(stop - start == 24 for start, stop in bounds[:-1])


@pytest.mark.parametrize("length", [0, 1, 23, 24, 25, 42, 43, 60, 100])
@pytest.mark.parametrize("overlap", [0, 1, 6, 23])
def test_cut_with_overlap_keeps_short_passages_whole(length: int, overlap: int) -> None:
    config = SMALL.replace(chunk_overlap=overlap)
    bounds = cut(length, config)
    assert count_chunks(length, config) == len(bounds)
    assert all(stop - start == 24 for start, stop in bounds[:-1])
    assert all(later[0] == stop - overlap and later[1] > stop for (_, stop), later in pairwise(bounds))
    for start in range(length):  # a passage of overlap + 1 tokens, or what is left of the text
        stop = min(start + overlap + 1, length)
        assert any(first <= start and stop <= last for first, last in bounds)


def test_overlapping_chunks_are_read_as_they_are_cut(llama: nn.Module) -> None:
    config, ids, seen = SMALL.replace(chunk_overlap=6), random_ids(60), []
    blocks = encode(llama, ids, config, progress=lambda done, total: seen.append((done, total)))
    pieces = [piece for block in blocks for piece in block.token_ids.tolist()]
    assert pieces == [ids[0:24], ids[18:42], ids[36:60]]
    apart = encode(llama, ids[18:42], SMALL)[0].kv
    together = blocks[0].rows(llama, 1, 2)
    for got, want in zip(together.keys + together.values, apart.keys + apart.values, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    assert seen[-1] == (60, 60)
    assert max(done for done, _ in seen) == 60
    expected = focus_logits(llama, [torch.tensor(p) for p in pieces], torch.tensor(ids[-6:]), torch.tensor(ids[-20:]))
    request = start_request(llama, blocks, ids[-20:], config)
    torch.testing.assert_close(prefill(llama, request, config)[-1], expected[-1], **CLOSE)


@pytest.mark.parametrize("length", [1, 19, 20, 21, 44, 100])
def test_split_restores_the_text(length: int) -> None:
    ids = random_ids(length)
    far, local = split(ids, SMALL)
    assert far + local == ids
    assert len(local) == min(length, SMALL.local_length)
    assert (far == []) == (length <= SMALL.local_length)


def test_split_below_a_literal_limit() -> None:
    config = FocusConfig.paper(chunk_length=24, local_length=20, plain_below=50)
    assert split(random_ids(49), config) == ([], random_ids(49))
    assert len(split(random_ids(50), config)[0]) == 30


def test_a_text_below_a_literal_limit_stays_the_base_models(llama: nn.Module) -> None:
    """Also a document below it, and while tokens are generated; from the limit on it is cut as a new text."""
    config = SMALL.replace(plain_below=60)
    assert num_local_chunks([24, 24], 11, config) == 2
    assert num_local_chunks([24, 24], 12, config) == 0
    ids = random_ids(62)
    request, _ = begin(llama, ids[:45], config)
    for token in ids[45:59]:
        logits = decode(llama, [request], [token], config)[0]
        assert not request.blocks
    torch.testing.assert_close(logits, llama(torch.tensor([ids[:59]])).logits[0, -1], **CLOSE)
    logits = decode(llama, [request], ids[59:60], config)[0]
    torch.testing.assert_close(logits, begin(llama, ids[:60], config)[1], rtol=0, atol=0)
    assert request.num_chunks == 2


@pytest.mark.parametrize(
    ("chunk_steps", "others", "expected"), [([24, 24, 5], 10, 1), ([24, 24, 15], 10, 0), ([5, 5], 10, 2), ([], 10, 0)]
)
def test_last_chunks_that_fit_stay_local(chunk_steps: list[int], others: int, expected: int) -> None:
    assert num_local_chunks(chunk_steps, others, SMALL) == expected


def test_what_chunks_share_takes_room_once() -> None:
    config = FocusConfig(chunk_length=12, chunk_overlap=4, local_length=20)
    starts = [start for start, _ in cut(20, config)]
    assert starts == [0, 8]
    assert num_local_chunks(steps(starts, 20), 0, config) == 2  # all 20 tokens fit, though the chunks have 24
    assert num_local_chunks(steps(starts, 20), 1, config) == 1


@pytest.mark.parametrize("decoding", ["cached", "exact"])
def test_requests_of_unequal_length_equal_their_single_runs(llama: nn.Module, decoding: str) -> None:
    """Long, ragged, short (base model alone) and one that overflows its local context, side by side."""
    config = SMALL.replace(decoding=decoding)
    texts = [random_ids(n, seed=n) for n in (120, 61, 9, 20)]
    forced = random_ids(len(texts) * 45, seed=3)
    together = [begin(llama, ids, config) for ids in texts]
    logits = [torch.stack([first for _, first in together])]
    steps = [forced[i : i + len(texts)] for i in range(0, len(forced), len(texts))]
    logits += [decode(llama, [request for request, _ in together], step, config) for step in steps]
    for number, ids in enumerate(texts):
        request, first = begin(llama, ids, config)
        torch.testing.assert_close(logits[0][number], first, rtol=0, atol=0)
        for step, all_logits in zip(steps, logits[1:], strict=True):
            torch.testing.assert_close(all_logits[number], decode(llama, [request], [step[number]], config)[0], **CLOSE)
    assert together[0][0].num_chunks > 5  # it did overflow


def test_text_within_the_local_context_is_the_base_model_bit_for_bit() -> None:
    model = build()
    ids, forced = random_ids(20), random_ids(15, seed=1)
    whole = model(torch.tensor([ids])).logits[0]
    cache = DynamicCache(config=model.config)
    plain = [run_plain(model, torch.tensor([part]), cache, 1)[0, -1] for part in (ids, *([token] for token in forced))]
    with_candidates(model)
    request, first = begin(model, ids, SMALL)
    assert torch.equal(first, plain[0])
    assert torch.equal(prefill(model, request.fork(), SMALL, logits_to_keep=0), whole)
    for token, expected in zip(forced, plain[1:], strict=True):
        assert torch.equal(decode(model, [request], [token], SMALL)[0], expected)


def test_generation_past_the_positions_of_the_base_model(llama: nn.Module) -> None:
    """200 behind 90, of 256 positions: the oldest local tokens become chunks, every token is somewhere once."""
    ids = random_ids(90)
    request, logits = begin(llama, ids, SMALL.replace(chunk_overlap=0))
    for _ in range(200):
        ids.append(int(logits.argmax()))
        logits = decode(llama, [request], ids[-1:], SMALL)[0]
        assert torch.isfinite(logits).all()
        assert len(request.local_ids) <= SMALL.max_local_length
    assert [block.length for block in request.blocks[2:]] == [SMALL.rechunk_length] * (len(request.blocks) - 2)
    chunked = [token for block in request.blocks for row in block.token_ids.tolist() for token in row]
    assert chunked + request.local_ids == ids
    assert max(block.length for block in request.blocks) <= SMALL.chunk_length


def test_overflow_equals_a_new_request_with_these_chunks(llama: nn.Module) -> None:
    request, _ = begin(llama, random_ids(90), SMALL)
    forced = random_ids(60, seed=2)
    overflows = 0
    for token in forced:
        before = request.num_chunks
        logits = decode(llama, [request], [token], SMALL)[0]
        if request.num_chunks > before:
            overflows += 1
            fresh = start_request(llama, request.blocks, request.local_ids, SMALL)
            torch.testing.assert_close(logits, prefill(llama, fresh, SMALL)[-1], rtol=0, atol=0)
    assert overflows >= 2


def test_the_paper_lets_the_local_context_grow_until_the_positions_end(llama: nn.Module) -> None:
    config = FocusConfig.paper(chunk_length=24, local_length=200, plain_below=1, bos_token_id=None)
    request, _ = begin(llama, random_ids(250), config)
    for token in random_ids(53):
        decode(llama, [request], [token], config)
    with pytest.raises(ConfigError, match="needs position 257"):
        decode(llama, [request], [5], config)
    assert request.num_chunks == 3
    assert len(request.local_ids) == 253


def test_a_token_that_is_refused_changes_nothing(llama: nn.Module) -> None:
    """Also not the other requests of the batch, and neither where chunks would be made of the oldest tokens."""
    grows = FocusConfig.paper(chunk_length=24, local_length=200, plain_below=1, bos_token_id=None)
    for config, length in ((grows, 253), (SMALL.replace(chunk_overlap=0), 24 * 216 + SMALL.local_length)):
        full, other = begin(llama, random_ids(length), config)[0], begin(llama, random_ids(60), config)[0]
        room = (253 if config is grows else SMALL.max_local_length - 1) - len(full.local_ids)
        for token in random_ids(room):
            decode(llama, [full], [token], config)
        before = [list(other.local_ids), list(full.local_ids)]
        with pytest.raises(ConfigError):
            decode(llama, [other, full], [5, 6], config)
        assert [other.local_ids, full.local_ids] == before


def test_rows_are_written_in_place(llama: nn.Module) -> None:
    """No copy of whole rows a step: the tensors stay where they are until their room is used up."""
    request, _ = begin(llama, random_ids(120), SMALL)
    places = [tensor.data_ptr() for tail in request.tails for tensor in tail.keys + tail.values]
    chunks = [tensor.data_ptr() for block in request.blocks for tensor in block.kv.keys]
    for token in random_ids(15):
        decode(llama, [request], [token], SMALL)
    assert [tensor.data_ptr() for tail in request.tails for tensor in tail.keys + tail.values] == places
    assert [tensor.data_ptr() for block in request.blocks for tensor in block.kv.keys] == chunks
    assert request.tails[0].length == 5 + 15


def test_growing_keeps_what_is_there() -> None:
    like = KV([torch.zeros(2, 3, 1, 4)], [torch.zeros(2, 3, 1, 4)])
    grown, tokens = GrowingKV(like, 2), []
    for _ in range(150):
        tokens.append(torch.randn(2, 3, 1, 4))
        grown.append(KV([tokens[-1]], [-tokens[-1]]))
    assert torch.equal(grown.filled().keys[0], torch.cat(tokens, 2))
    assert torch.equal(grown.filled().values[0], -torch.cat(tokens, 2))
    assert grown.nbytes == 2 * 2 * 3 * 192 * 4 * 4
    assert grown.keys[0][:, :, 150:].abs().max() == 0


def test_fork_is_independent(llama: nn.Module) -> None:
    request, _ = begin(llama, random_ids(120), SMALL)
    twin = request.fork()
    expected = decode(llama, [request], [7], SMALL)[0]
    decode(llama, [request], [8], SMALL)
    assert torch.equal(decode(llama, [twin], [7], SMALL)[0], expected)
    assert twin.blocks[0].kv is request.blocks[0].kv


def test_progress_counts_every_token(llama: nn.Module) -> None:
    calls: list[tuple[int, int]] = []
    encode(llama, random_ids(24 * 5 + 3), SMALL, lambda done, total: calls.append((done, total)))
    assert calls == [(47, 123), (93, 123), (116, 123), (123, 123)]


def test_shorter_prompt_of_a_request(llama: nn.Module) -> None:
    blocks = encode(llama, random_ids(48), SMALL)
    request = start_request(llama, blocks, random_ids(20, seed=1), SMALL, prompt_length=2)
    prefill(llama, request, SMALL)
    assert request.tails[0].length == 1


def test_attention_paid_to_candidates_is_a_share(llama: nn.Module) -> None:
    request, _ = begin(llama, random_ids(120), SMALL)
    assert request.paid is not None
    assert request.paid.shape == (request.num_chunks,)
    assert 0 < request.paid.sum() <= 3  # at most 1 a layer
    before = request.paid.clone()
    decode(llama, [request], [5], SMALL)
    assert (request.paid > before).all()


def test_empty_local_context(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="local context is empty"):
        start_request(llama, [], [], SMALL)


def test_local_context_beyond_the_positions(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="local context of 300 tokens"):
        start_request(llama, [], random_ids(300), SMALL.replace(local_length=300))
