"""Opened chunks: a mask over the base model, which chunks are chosen, and requests that go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, SMALL, build, byte_tokenizer, random_ids
from focusllm import ConfigError, FocusConfig, FocusForCausalLM, FocusLLM
from focusllm.checks.conformance import widen
from focusllm.decoding import opened
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.decoding.opened import budget_of, choose
from focusllm.decoding.request import OpenSpan, Request
from focusllm.memory.chunks import ChunkBlock, Place, document_key, encode
from focusllm.memory.lookup import SURE_HEADS, Heads, Looked, LookupKeys, look, middle_heads
from focusllm.method.opened import Start, look_up, opened_logits, read_start

OPENED = SMALL.replace(far_context="opened", open_tokens=48, chunk_overlap=4)
START = random_ids(5, seed=9)


def dense(model: nn.Module, start: list[int], pieces: list[list[int]], local: list[int]) -> Tensor:
    """Logits of the local tokens by one masked pass of the base model, as transformers itself computes it.

    Every chunk stands behind a start of its own, at the places right before it; the local context sees the first start
    alone, all of the pieces, and itself.
    """
    ids: list[int] = []
    places: list[int] = []
    owners: list[int] = []  # which piece a token belongs to; local tokens to none
    shared: list[bool] = []  # seen by the local context
    place = len(start)
    for number, piece in enumerate(pieces):
        ids += [*start, *piece]
        places += [*range(place - len(start), place), *range(place, place + len(piece))]
        owners += [number] * (len(start) + len(piece))
        shared += [number == 0] * len(start) + [True] * len(piece)
        place += len(piece)
    num_far = len(ids)
    ids, places = ids + local, places + list(range(place, place + len(local)))
    owner, seen = torch.tensor(owners), torch.tensor(shared)
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask[:num_far, :num_far] &= owner[:, None] == owner
    mask[num_far:, :num_far] = seen
    at, least = torch.tensor(places), torch.finfo(next(model.parameters()).dtype).min

    def bias(visible: Tensor) -> Tensor:
        return torch.zeros(visible.shape, dtype=next(model.parameters()).dtype).masked_fill(~visible, least)[None, None]

    bias_of: Any = bias(mask)
    if getattr(model.config, "sliding_window", None) is not None:
        near = bias(mask & (at > at[:, None] - model.config.sliding_window))
        is_mixed = getattr(model.config, "layer_types", None) is not None
        bias_of = {"full_attention": bias_of, "sliding_attention": near} if is_mixed else near
    with torch.no_grad():
        out = model(torch.tensor([ids]), position_ids=at[None], attention_mask=bias_of, use_cache=False).logits
    return out[0, num_far:]


def blocks_of(model: nn.Module, ids: Sequence[int], config: FocusConfig = OPENED) -> list[ChunkBlock]:
    return encode(model, ids, config, start=read_start(model, START), heads=middle_heads(model))


def begin(
    model: nn.Module,
    ids: list[int],
    local: list[int],
    config: FocusConfig = OPENED,
    prompt_length: int | None = None,
) -> tuple[Request, Tensor]:
    request = start_request(model, blocks_of(model, ids, config), local, config, prompt_length)
    return request, prefill(model, request, config)[-1]


def open_ids(request: Request) -> list[list[int]]:
    assert request.opened is not None
    found = []
    for piece in request.opened.spans:
        rows = [row for block in request.blocks for row in block.token_ids.tolist()]
        found.append(rows[piece.chunk][piece.first : piece.stop])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_mask_over_the_base_model(family: str) -> None:
    model = build(family, attention="eager")
    pieces, local = [random_ids(24, 1), random_ids(24, 2), random_ids(10, 3)], random_ids(8, 4)
    got = opened_logits(model, START, [torch.tensor(piece) for piece in pieces], torch.tensor(local), 0)
    torch.testing.assert_close(got, dense(model, START, pieces, local), atol=2e-4, rtol=0)


@pytest.mark.parametrize("window", [7, 40])
@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gemma3_text", "gpt_oss"])
def test_windows_are_the_base_models(family: str, window: int) -> None:
    model = build(family, attention="eager", sliding_window=window)
    pieces, local = [random_ids(24, 1), random_ids(24, 2), random_ids(10, 3)], random_ids(8, 4)
    got = opened_logits(model, START, [torch.tensor(piece) for piece in pieces], torch.tensor(local), 0)
    torch.testing.assert_close(got, dense(model, START, pieces, local), atol=2e-4, rtol=1e-4)
    config = OPENED.replace(chunk_overlap=0)
    request, logits = begin(model, random_ids(100), local, config)
    for _ in range(3):
        want = dense(model, START, open_ids(request), request.local_ids)[-1]
        torch.testing.assert_close(logits, want, atol=2e-4, rtol=1e-4)
        logits = decode(model, [request], [int(logits.argmax())], config)[0]


def test_it_is_a_mask_over_the_base_model_to_the_last_digits() -> None:
    """In float64, of norms and rotary angles too, which transformers itself computes in float32."""
    model = build(dtype=torch.float64)
    widen(model)
    pieces, local = [random_ids(24, 1), random_ids(24, 2)], random_ids(8, 4)
    got = opened_logits(model, START, [torch.tensor(piece) for piece in pieces], torch.tensor(local), 0)
    torch.testing.assert_close(got, dense(model, START, pieces, local), atol=1e-9, rtol=0)


def test_without_a_start(llama: nn.Module) -> None:
    pieces, local = [random_ids(24, 1), random_ids(24, 2)], random_ids(8, 4)
    got = opened_logits(llama, [], [torch.tensor(piece) for piece in pieces], torch.tensor(local), 0)
    torch.testing.assert_close(got, dense(llama, [], pieces, local), atol=2e-4, rtol=0)


def test_a_request_is_the_definition(llama: nn.Module) -> None:
    """Prefill and every step after it, against the base model's masked pass over the same tokens."""
    local = random_ids(8, 4)
    config = OPENED.replace(chunk_overlap=0)
    request, logits = begin(llama, random_ids(100), local, config)
    pieces = open_ids(request)
    assert [len(piece) for piece in pieces] in ([24, 24], [24, 24, 4], [24, 4])
    for _ in range(5):
        want = dense(llama, START, pieces, request.local_ids)[-1]
        torch.testing.assert_close(logits, want, atol=2e-4, rtol=0)
        logits = decode(llama, [request], [int(logits.argmax())], config)[0]
    assert len(request.watched) == 6
    for step in request.watched:
        assert [span.length for span in step.spans] == [len(piece) for piece in pieces]
        assert len(step.opened) == sum(map(len, pieces))
        assert len(step.local) == len(local)
        assert 0 < step.opened.sum() + step.local.sum() <= len(request.blocks[0].lookup_layers)  # at most 1 a layer


def test_requests_of_unequal_length_together(llama: nn.Module) -> None:
    texts = [(random_ids(100), random_ids(8, 4)), (random_ids(40, 5), random_ids(3, 6)), ([], random_ids(6, 7))]
    together = [begin(llama, far, local) for far, local in texts if far]
    alone = [begin(llama, far, local) for far, local in texts if far]
    tokens = [7, 9]
    for _ in range(4):
        got = decode(llama, [request for request, _ in together], tokens, OPENED)
        want = [decode(llama, [request], [token], OPENED)[0] for (request, _), token in zip(alone, tokens, strict=True)]
        torch.testing.assert_close(got, torch.stack(want), atol=2e-5, rtol=1e-4)
        tokens = got.argmax(-1).tolist()


def weighed(tokens: list[Tensor]) -> Looked:
    return Looked(tokens, torch.cat([block.sum(1) for block in tokens]))


def test_neighbours_are_joined_without_their_overlap(llama: nn.Module) -> None:
    blocks = blocks_of(llama, random_ids(100))
    weights = [torch.zeros(block.num_chunks, block.length) for block in blocks]
    weights[0][1], weights[0][2] = 1.0, 2.0
    assert choose(weighed(weights), blocks, OPENED, 48) == [OpenSpan(1, 0, 24), OpenSpan(2, 4, 24)]
    weights[0][0] = 1.5
    assert choose(weighed(weights), blocks, OPENED, 48) == [OpenSpan(0, 0, 24), OpenSpan(2, 0, 24)]


def test_a_small_budget_opens_a_part(llama: nn.Module) -> None:
    blocks = blocks_of(llama, random_ids(100))
    weights = [torch.zeros(block.num_chunks, block.length) for block in blocks]
    weights[0][2, 10:14] = 1.0
    (piece,) = choose(weighed(weights), blocks, OPENED.replace(open_tokens=6), 6)
    assert piece.chunk == 2
    assert piece.length == 6
    assert piece.first <= 10
    assert piece.stop >= 14


def test_weights_are_a_joint_softmax(llama: nn.Module) -> None:
    """Against scores of the unpacked keys; eight bits move them by little. Of a chunk the surest heads count."""
    heads = Heads.of(llama, [(0, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3)])
    start = read_start(llama, START)
    blocks = encode(llama, random_ids(100), OPENED, start=start, heads=heads)
    asked = look_up(llama, start, torch.tensor(random_ids(6, 3)), 40, heads.layers)
    got = look([block.lookup for block in blocks if block.lookup is not None], asked, start)
    each = []
    for layer, head in heads.pairs:
        keys = [start.kv.keys[layer][0, head // 2]]  # type: ignore[union-attr]
        keys += [block.rows(llama, 0, block.num_chunks).keys[layer][:, head // 2].flatten(0, 1) for block in blocks]
        each.append((asked[layer][head] @ torch.cat(keys).T).softmax(-1).mean(0)[len(START) :])
    whole = torch.stack(each)
    torch.testing.assert_close(torch.cat([part.flatten() for part in got.tokens]), whole.sum(0), atol=2e-3, rtol=0.02)
    lengths = [row.numel() for block in got.tokens for row in block]
    masses = torch.stack([part.sum(-1) for part in torch.split(whole, lengths, 1)], 1)  # [heads, R]
    want = masses.sort(0, descending=True).values[:SURE_HEADS].sum(0)
    torch.testing.assert_close(got.chunks, want, atol=2e-3, rtol=0.02)


def test_what_is_asked_for_is_chosen(llama: nn.Module) -> None:
    """A chunk whose keys are what the question's queries are is the one that is opened."""
    blocks = blocks_of(llama, random_ids(100))
    question = random_ids(6, 3)
    config = OPENED.replace(open_tokens=24)
    heads = middle_heads(llama)
    asked = look_up(llama, read_start(llama, START), torch.tensor(question), 24 + len(START), heads.layers)
    lookup = blocks[0].lookup
    assert lookup is not None
    for place, (layer, key_head) in enumerate(heads.key_heads):
        wanted = asked[layer][key_head * 2].mean(0)
        lookup.packed[place, 2, 5] = (wanted / wanted.abs().max() * 127).round().to(torch.int8)
        lookup.scales[place, 2, 5] = 1.0
    request = start_request(llama, blocks, question, config)
    prefill(llama, request, config)
    assert request.opened is not None
    assert [piece.chunk for piece in request.opened.spans] == [2]


def test_looking_again_changes_what_is_open(llama: nn.Module) -> None:
    """The local context's keys move with it: as if read behind the new chunks' places, its values as they were."""
    config = OPENED.replace(look_again=2, open_tokens=24)
    request, logits = begin(llama, random_ids(100), random_ids(8, 4), config)
    seen = []
    for _ in range(12):
        logits = decode(llama, [request], [int(logits.argmax())], config)[0]
        assert torch.isfinite(logits).all()
        assert request.opened is not None
        seen.append(request.opened.looked_at)
    assert seen == [8, 10, 10, 12, 12, 14, 14, 16, 16, 18, 18, 20]


def test_the_local_context_becomes_chunks(llama: nn.Module) -> None:
    """Generation goes on past it; the new chunks are read behind the same start, and can be chosen."""
    request, logits = begin(llama, random_ids(60), random_ids(8, 4))
    for _ in range(OPENED.max_local_length + 5):
        logits = decode(llama, [request], [int(logits.argmax())], OPENED)[0]
    assert request.num_chunks > 3
    assert all(block.start_ids == tuple(START) and block.lookup is not None for block in request.blocks)
    assert len(request.local_ids) < OPENED.max_local_length


def test_a_text_that_outgrows_the_base_model_alone_is_opened(llama: nn.Module) -> None:
    request = start_request(llama, [], random_ids(10), OPENED)
    logits = prefill(llama, request, OPENED)[-1]
    for _ in range(OPENED.max_local_length):
        logits = decode(llama, [request], [int(logits.argmax())], OPENED)[0]
    assert request.opened is not None


def test_a_fork_goes_its_own_way(llama: nn.Module) -> None:
    request, _ = begin(llama, random_ids(100), random_ids(8, 4))
    twin = request.fork()
    decode(llama, [request], [5], OPENED)
    got, want = decode(llama, [twin], [6], OPENED), None
    other, _ = begin(llama, random_ids(100), random_ids(8, 4))
    want = decode(llama, [other], [6], OPENED)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_a_budget_that_the_positions_do_not_hold(llama: nn.Module) -> None:
    config = OPENED.replace(open_tokens=300)
    with pytest.raises(
        ConfigError, match=r"open_tokens 300 .* model.s 256 positions; use an open_tokens of at most 211"
    ):
        begin(llama, random_ids(100), random_ids(8, 4), config)


def test_a_local_context_that_the_positions_do_not_hold(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"up to 255 local tokens take more .* use a smaller local_length"):
        begin(llama, random_ids(100), random_ids(255, 4), OPENED.replace(open_tokens=None))


def test_one_chunk_unless_told_otherwise(llama: nn.Module) -> None:
    """However short it is; and as much of it as there are positions for."""
    config = OPENED.replace(open_tokens=None)
    blocks = blocks_of(llama, random_ids(90), config)  # the last one has 10 tokens
    weights = [torch.zeros(block.num_chunks, block.length) for block in blocks]
    weights[-1][0, 2], weights[0][1, 3] = 2.0, 1.0
    assert choose(weighed(weights), blocks, config, budget_of(config, 200)) == [OpenSpan(4, 0, blocks[-1].length)]
    weights[0][1, 3] = 3.0
    (piece,) = choose(weighed(weights), blocks, config, budget_of(config, 9))
    assert (piece.chunk, piece.length) == (1, 9)


def test_what_repeats_is_not_cut_where_neighbours_are_joined(llama: nn.Module) -> None:
    blocks = blocks_of(llama, [5] * 100)
    weights = [torch.zeros(block.num_chunks, block.length) for block in blocks]
    weights[0][1], weights[0][2] = 1.0, 2.0
    assert choose(weighed(weights), blocks, OPENED, 48) == [OpenSpan(1, 0, 24), OpenSpan(2, 4, 24)]


def test_chunks_that_were_not_read_alike(llama: nn.Module) -> None:
    condensed, opened = encode(llama, random_ids(48), OPENED), blocks_of(llama, random_ids(48, 1))
    for blocks in (condensed, [*condensed, *opened]):
        with pytest.raises(ConfigError, match="were not all read alike to be opened"):
            start_request(llama, blocks, random_ids(8), OPENED)


def test_what_auto_is() -> None:
    config = FocusConfig()
    assert [config.settled(trained).far_context for trained in (True, False)] == ["condensed", "opened"]
    assert config.replace(decoding="exact").settled(False).far_context == "condensed"
    assert FocusConfig.paper().settled(False).far_context == "condensed"
    assert config.replace(far_context="opened").settled(True).is_opened
    with pytest.raises(ConfigError, match="decoding is 'exact', which condenses"):
        config.replace(far_context="opened", decoding="exact")


def test_lookup_keys_are_small(llama: nn.Module) -> None:
    keys = LookupKeys.of(llama, Heads.of(llama, [(1, 0), (1, 1), (2, 3)]), 3, 24, 24, None)
    assert keys.nbytes == 2 * 3 * 24 * (16 + 2)


def test_look_up_keys_are_kept_beside_the_rows(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on disk is chosen from without being read; other heads and damaged files are made anew."""
    ids, heads, start = random_ids(100), middle_heads(llama), read_start(llama, START)
    place = Place("disk", tmp_path, document_key(llama, ids, OPENED, START))

    def read(**how: Any) -> list[ChunkBlock]:
        return encode(llama, ids, OPENED, place=place, **{"start": start, "heads": heads, **how})

    def keys(blocks: list[ChunkBlock]) -> list[Tensor]:
        return [block.lookup.packed for block in blocks if block.lookup is not None]

    first = keys(read())
    files = sorted(tmp_path.glob("*.keys"))
    assert len(files) == len(first) == 2
    with monkeypatch.context() as patched:
        patched.setattr(ChunkBlock, "rows", lambda *_: pytest.fail("rows were read"))
        assert all(map(torch.equal, keys(read()), first))
    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)
    assert all(map(torch.equal, keys(read()), first))
    assert files[0].read_bytes() != damaged
    other = keys(read(heads=Heads.of(llama, [(1, 0)])))
    assert [part.shape[0] for part in other] == [1, 1]


def test_a_document_on_disk_is_asked_with_few_of_its_chunks(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(400)
    place = Place("disk", tmp_path, document_key(llama, ids, OPENED, START))
    blocks = encode(llama, ids, OPENED, place=place, start=read_start(llama, START), heads=middle_heads(llama))
    read: list[int] = []
    rows = ChunkBlock.rows
    monkeypatch.setattr(ChunkBlock, "rows", lambda self, model, a, b: read.append(b - a) or rows(self, model, a, b))
    request = start_request(llama, blocks, random_ids(8, 4), OPENED)
    logits = prefill(llama, request, OPENED)[-1]
    assert sum(read) == 2
    here = blocks_of(llama, ids)
    same = start_request(llama, here, random_ids(8, 4), OPENED)
    torch.testing.assert_close(prefill(llama, same, OPENED)[-1], logits)


def test_documents_and_texts_through_the_front(tmp_path: Path) -> None:
    """A model without candidate projections opens: `ask`, a store, several documents, a long prompt of its own."""
    model = FocusForCausalLM(build(max_position_embeddings=512), OPENED.replace(far_context="auto", local_length=64))
    llm = FocusLLM(model, byte_tokenizer(), "tiny")
    assert model.settings.is_opened
    text = "".join(f"Line {i} of the story tells of thing number {i * 7}.\n" for i in range(12))
    document = llm.read_text(text, store=tmp_path)
    answer = llm.ask(document, "What?", max_new_tokens=6)
    assert answer.text == llm.ask(llm.read_text(text), "What?", max_new_tokens=6).text
    assert sum(citation.weight for citation in answer.citations) == pytest.approx(1)
    assert (
        llm.ask([document, llm.read_text("Another thing. " * 12)], "What?", max_new_tokens=4).num_generated_tokens == 4
    )
    assert llm.continue_text(text, max_new_tokens=4).num_generated_tokens == 4
    condensed = llm.read_text("Short.")
    assert llm.ask(condensed, "What?", max_new_tokens=4).citations == []


def test_documents_are_asked_as_they_were_read() -> None:
    """Settings that changed in between are refused in one sentence, not mixed up."""
    model = FocusForCausalLM(build(max_position_embeddings=512), OPENED.replace(local_length=64))
    llm = FocusLLM(model, byte_tokenizer(), "tiny")
    document = llm.read_text("A story of things. " * 20)
    model.focus_config = model.focus_config.replace(far_context="condensed")
    with pytest.raises(ConfigError, match=r"was read to be opened.* read it again"):
        llm.ask(document, "What?", max_new_tokens=4)


def test_the_question_goes_on_choosing(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """When generated tokens push it out of the local context, it is still looked for, with the newest ones."""
    asked: list[list[int]] = []
    kept = opened.look_up

    def spy(model: nn.Module, start: Start | None, question: Tensor, *more: Any) -> Any:
        asked.append(question.tolist())
        return kept(model, start, question, *more)

    monkeypatch.setattr(opened, "look_up", spy)
    config = OPENED.replace(look_again=3, local_length=12)
    local = random_ids(10, 4)
    for prompt_length in (6, None):
        asked.clear()
        request, _ = begin(llama, random_ids(100), local, config, prompt_length)
        new = random_ids(config.rechunk_length + 12, 8)
        for token in new:
            decode(llama, [request], [token], config)
        assert request.num_chunks > 5
        question = local[-6:] if prompt_length else []
        assert asked[0] == (question or local[-config.prompt_length :])
        most = prompt_length or config.prompt_length
        for found in asked[1:]:
            assert found[: len(question)] == question
            newest = found[len(question) :]
            assert 0 < len(newest) <= most
            assert any(new[i : i + len(newest)] == newest for i in range(len(new))) or not question
        assert len(asked[-1]) == len(question) + most


@pytest.mark.parametrize("with_start", [True, False])
@pytest.mark.parametrize("at_once", [10, 1000])
def test_what_usual_questions_pay_is_subtracted(
    llama: nn.Module, with_start: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a softmax of every question over the start and all chunks at once, which were read in two goes."""
    monkeypatch.setattr("focusllm.memory.lookup.TOKENS_AT_ONCE", at_once)
    heads = Heads.of(llama, [(0, 0), (1, 3), (2, 1), (2, 2), (1, 0)]).asking([random_ids(5, 1), random_ids(7, 2)])
    start = read_start(llama, START) if with_start else None
    num_start = len(START) if with_start else 0
    blocks = [
        block for seed in (3, 4) for block in encode(llama, random_ids(44, seed), OPENED, start=start, heads=heads)
    ]
    lookups = [block.lookup for block in blocks if block.lookup is not None]

    def paid(question: list[int], length: int) -> Tensor:
        """Of each of the question's tokens to each chunk [N, T, R], as it stands behind chunks of so many tokens."""
        asked = look_up(llama, start, torch.tensor(question), num_start + length, heads.layers)
        found = []
        for (layer, head), shared in zip(heads.pairs, heads.shared, strict=True):
            place = heads.key_heads.index((layer, shared))
            before = [start.kv.keys[layer][0, shared]] if start is not None else []
            keys = torch.cat([*before, *(keys.unpacked(place) for keys in lookups)])
            weights = (asked[layer][head] @ keys.T).softmax(-1)[:, num_start:]
            parts = torch.split(weights, [keys.num_rows * keys.length for keys in lookups], -1)
            rows = [part.unflatten(-1, (-1, keys.length)).sum(-1) for part, keys in zip(parts, lookups, strict=True)]
            found.append(torch.cat(rows, -1))
        return torch.stack(found)

    question = random_ids(6, 5)
    asked = look_up(llama, start, torch.tensor(question), num_start + 24, heads.layers)
    got = look(lookups, asked, start).chunks
    usual = torch.cat([paid(list(ids), 24) for ids in heads.usual], 1).mean(1)
    plain = paid(question, 24).mean(1)
    want = (plain - usual).topk(SURE_HEADS, 0).values.sum(0).clamp(min=0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    without = look([replace(keys, heads=replace(heads, usual=())) for keys in lookups], asked, start).chunks
    torch.testing.assert_close(without, plain.topk(SURE_HEADS, 0).values.sum(0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, without)


def test_a_question_that_had_no_chunks_yet_is_what_they_are_chosen_by(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the local context overflows, the first chunks are looked up by it, not by the newest tokens alone."""
    asked: list[list[int]] = []
    kept = opened.look_up

    def spy(model: nn.Module, start: Start | None, question: Tensor, *more: Any) -> Any:
        asked.append(question.tolist())
        return kept(model, start, question, *more)

    monkeypatch.setattr(opened, "look_up", spy)
    config, local = OPENED.replace(local_length=12), random_ids(10, 4)
    request = start_request(llama, [], local, config, 6, middle_heads(llama))
    prefill(llama, request, config)
    for token in random_ids(config.max_local_length, 8):
        decode(llama, [request], [token], config)
    assert request.num_chunks > 0
    assert all(found[:6] == local[-6:] for found in asked)
    assert asked
