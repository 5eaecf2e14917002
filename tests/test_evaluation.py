"""Evaluation: every method on tiny models."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F

from conftest import SMALL, build, byte_tokenizer, random_ids, with_candidates
from focusllm import AdapterConfig, FocusForCausalLM, FocusLLM
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.documents.words import WordIndex
from focusllm.errors import ConfigError
from focusllm.evaluation.example import Example, LossExample
from focusllm.evaluation.methods import NAMES
from focusllm.evaluation.methods import build as build_method
from focusllm.evaluation.methods.snapkv import NEIGHBOURS, Compressed
from focusllm.evaluation.methods.streaming import Stream
from focusllm.memory.chunk_cache import ChunkCache, LastText
from focusllm.memory.chunking import cut
from focusllm.memory.chunks import encode
from focusllm.memory.store import Packed
from focusllm.method.base import CACHE_NAME

TEXT = "A whale is not a fish, and the sea is wide. " * 12
LONG = Example("long", "Read this.\n", TEXT, "\nWhat is wide?", ("the sea",), max_new_tokens=6)
SHORT = dataclasses.replace(LONG, context="The sea is wide.")


def loss_example(length: int, labels: int = 12) -> LossExample:
    return LossExample("text", tuple(random_ids(length)), labels)


def base_loss(llm: FocusLLM, ids: tuple[int, ...], labels: int) -> float:
    logits = llm.model.base(torch.tensor([ids]))[0][0, :-1]
    return float(F.cross_entropy(logits[-labels:], torch.tensor(ids[-labels:]), reduction="sum"))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_predicts_and_measures(name: str, llm: FocusLLM) -> None:
    method = build_method(name, llm)
    example, text = (SHORT, loss_example(120)) if name in ("full", "snapkv") else (LONG, loss_example(400))
    assert method.fits(method.num_tokens(example)) is None
    prediction = method.generate(example)
    assert prediction.text
    assert 0 < prediction.first_token_seconds <= prediction.seconds
    assert method.generate(example).text == prediction.text
    nats, labels = method.loss(text)
    assert labels == 12
    assert 0 < nats / labels < 12
    assert method.loss(text) == (nats, labels)


@pytest.mark.parametrize("name", NAMES)
def test_short_text_is_the_base_models(name: str, llm: FocusLLM) -> None:
    short = dataclasses.replace(SHORT, context="Wide.", before="", after="?", max_new_tokens=5)
    method = build_method(name, llm)
    prompt = torch.tensor([method.prompt(short).ids])
    expected = llm.model.base.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
    assert method.generate(short).text == llm.tokenizer.decode(expected, skip_special_tokens=True)
    text = loss_example(40)
    assert method.loss(text)[0] == pytest.approx(base_loss(llm, text.text_ids, 12), abs=1e-4)


def test_full_refuses_what_the_positions_do_not_hold(llm: FocusLLM) -> None:
    assert "256 positions" in build_method("full", llm).fits(257)
    assert build_method("full", llm).fits(256) is None


@pytest.mark.parametrize("overlap", [0, 7])
def test_focus_answers_as_ask_does(overlap: int, llm: FocusLLM) -> None:
    llm.model.focus_config = llm.config.replace(chunk_overlap=overlap)
    document = llm.read_text(TEXT)
    expected = llm.ask(document, "What is wide?", max_new_tokens=6).text
    example = dataclasses.replace(LONG, before="", after="\n\nWhat is wide?")
    method = build_method("focus", llm)
    assert method.generate(example).text == expected
    far = method.divide(method.prompt(example))[1]
    stops = [stop for _, stop in cut(document.num_tokens, llm.config)]
    assert len(far) in stops  # a chunk's end: the far chunks are the document's own


@pytest.mark.parametrize(
    "options", ["", "decoding=exact", "chunk_length=31,local_length=50", "chunks_per_batch=1", "chunk_overlap=5"]
)
@pytest.mark.parametrize("sink", [None, 1])
def test_focus_loss_is_that_of_decoding(options: str, sink: int | None, llm: FocusLLM) -> None:
    with_candidates(llm.model.base, AdapterConfig(rank=4, sink_token=sink))
    method = build_method(f"focus:refresh_rows=null,{options}", llm)
    config, ids = method.config, list(loss_example(300).text_ids)
    far, local = ids[: -config.local_length], ids[-config.local_length :]
    request = start_request(llm.model.base, encode(llm.model.base, far, config), local[:-12], config)
    logits = [prefill(llm.model.base, request, config)[-1]]
    logits += [decode(llm.model.base, [request], [token], config)[0] for token in local[-12:-1]]
    expected = F.cross_entropy(torch.stack(logits), torch.tensor(local[-12:]), reduction="sum")
    assert method.loss(loss_example(300))[0] == pytest.approx(float(expected), abs=1e-3)


def test_text_within_the_budget_is_the_base_models_whatever_the_limit(llm: FocusLLM) -> None:
    example = loss_example(60)
    expected = base_loss(llm, example.text_ids, 12)
    assert build_method("focus:plain_below=0,local_length=64", llm).loss(example)[0] == pytest.approx(
        expected, abs=1e-3
    )


def test_focus_takes_many_labels_a_piece_at_a_time(llm: FocusLLM) -> None:
    method = build_method("focus", llm)
    ids = loss_example(300).text_ids
    pieces = [method.loss(LossExample("", ids[:stop], 32))[0] for stop in (268, 300)]
    assert method.loss(LossExample("", ids, 64))[0] == pytest.approx(sum(pieces), abs=1e-4)


def test_chunks_are_read_once_and_bounded(llm: FocusLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from focusllm.memory import chunk_cache

    read: list[int] = []
    read_behind = chunk_cache.read_behind
    monkeypatch.setattr(chunk_cache, "read_behind", lambda *given: read.append(1) or read_behind(*given))
    base = llm.model.base
    cache, config = ChunkCache(base, 2**30), SMALL.replace(chunk_overlap=0)
    first, second = random_ids(24 * 3 + 5), random_ids(24, seed=1)
    blocks = cache.blocks(first, config)
    assert [block.num_chunks for block in blocks] == [3, 1]
    assert len(read) == 4
    again = cache.blocks(second + first, config)
    assert len(read) == 5
    for kept, new in zip(blocks[0].kv.keys, again[0].kv.keys, strict=True):
        assert torch.equal(kept, new[1:])
    small = ChunkCache(base, blocks[0].kv.nbytes // 3 * 2)
    small.blocks(first, config)
    assert small.nbytes <= small.most_bytes
    read.clear()
    small.blocks(first, config)
    assert len(read) == 2  # the first two stayed
    small.blocks(second, config)
    assert len(read) == 3
    assert small.nbytes == small.most_bytes


def test_streaming_is_full_attention_while_the_window_holds_all(llm: FocusLLM) -> None:
    ids = random_ids(60)
    stream = Stream(build_method("streaming", llm))
    expected = llm.model.base(torch.tensor([ids])).logits[0, -9:]
    assert torch.allclose(stream.read(ids, 9), expected, atol=1e-4)


def test_streaming_skips_only_what_cannot_reach(llm: FocusLLM) -> None:
    ids = random_ids(1000)
    method = build_method("streaming", llm)
    whole, stream = Stream(method), Stream(method)
    for start in (0, *range(4, 1000, method.block)):
        logits = whole.advance(ids[start : start + method.block] if start else ids[:4], 1)
    assert torch.allclose(stream.read(ids, 1), logits, atol=1e-4)
    assert whole.kv.length == method.sinks + method.budget
    other = [*ids[:600], *random_ids(400, seed=3)]  # another ending: the window counts
    assert not torch.allclose(Stream(method).read(other, 1), logits, atol=1e-2)


def test_streaming_sees_sinks_and_window_only() -> None:
    model = FocusForCausalLM(with_candidates(build(num_hidden_layers=1)), SMALL.replace(local_length=16))
    method = build_method("streaming", FocusLLM(model, byte_tokenizer(), "tiny"))
    ids = random_ids(100)
    logits = Stream(method).read(ids, 1)
    hidden = [*ids[:4], *random_ids(80, seed=5), *ids[84:]]
    assert torch.allclose(Stream(method).read(hidden, 1), logits, atol=1e-5)
    for place in (0, 84):  # the first sink, the first of the window
        changed = [*ids[:place], (ids[place] + 1) % 250 + 3, *ids[place + 1 :]]
        assert not torch.allclose(Stream(method).read(changed, 1), logits, atol=1e-5)


def tiny_with_budget(budget: int, **changes: int) -> FocusLLM:
    model = FocusForCausalLM(with_candidates(build(**changes)), SMALL.replace(local_length=budget))
    return FocusLLM(model, byte_tokenizer(), "tiny")


@pytest.mark.parametrize("window", [5, 40])
def test_snapkv_keeps_what_a_heads_window_pays_most(window: int) -> None:
    """Against transformers' own attention weights, a head and a token at a time."""
    budget, half = 32, NEIGHBOURS // 2
    llm = tiny_with_budget(budget)
    ids, cache = random_ids(90), Compressed(build_method(f"snapkv:window={window}", llm))
    logits = cache.read(ids)
    base, window = llm.model.base, min(window, budget)
    base.set_attn_implementation("eager")
    whole = base(torch.tensor([ids]), output_attentions=True, use_cache=True)
    assert torch.allclose(logits[0], whole.logits[0, -1], atol=1e-4)
    num_earlier, num_kv_heads = 90 - window, base.config.num_key_value_heads
    group = base.config.num_attention_heads // num_kv_heads
    assert group > 1
    for layer, weights in enumerate(whole.attentions):
        held = whole[CACHE_NAME].layers[layer]
        for head in range(num_kv_heads):
            paid = weights[0, head * group : (head + 1) * group, -window:, :num_earlier].sum((0, 1)).tolist()
            smooth = [sum(paid[max(0, i - half) : i + half + 1]) for i in range(num_earlier)]
            best = sorted(sorted(range(num_earlier), key=lambda i: -smooth[i])[: budget - window])
            seen = [*best, *range(num_earlier, 90)]
            keys, values = cache.kept.keys[layer][0, head], cache.kept.values[layer][0, head]
            nearest = torch.cdist(keys, held.keys[0, head, seen]).argmin(1)
            assert sorted(nearest.tolist()) == list(range(budget))  # the same ones, in any order
            assert torch.allclose(keys, held.keys[0, head, seen][nearest], atol=1e-5)
            assert torch.allclose(values, held.values[0, head, seen][nearest], atol=1e-5)


def test_snapkv_goes_on_at_true_positions() -> None:
    """Against the base model with a mask, where one head of one layer makes the choice."""
    llm = tiny_with_budget(32, num_hidden_layers=1, num_key_value_heads=1)
    method, example = build_method("snapkv:window=5", llm), loss_example(100, labels=11)
    cache, ids = Compressed(method), list(example.text_ids)
    cache.read(ids[:89])
    whole = llm.model.base(torch.tensor([ids]), use_cache=True)[CACHE_NAME].layers[0].keys[0, 0]
    seen = torch.cdist(cache.kept.keys[0][0, 0], whole).argmin(1)
    assert len(set(seen.tolist())) == 32
    mask = torch.ones(100, 100, dtype=torch.bool).tril()
    mask[89:, :89] = False
    mask[89:, seen] = True
    logits = llm.model.base(torch.tensor([ids]), attention_mask=mask[None, None]).logits[0]
    assert torch.allclose(cache.advance(ids[89:], 0), logits[89:], atol=1e-4)
    expected = F.cross_entropy(logits[-12:-1], torch.tensor(ids[-11:]), reduction="sum")
    assert method.loss(example)[0] == pytest.approx(float(expected), rel=1e-5)


def test_truncation_keeps_both_ends_and_the_template(llm: FocusLLM) -> None:
    method = build_method("truncate:to=local", llm)
    prompt = method.prompt(LONG)
    chosen = method.choose(prompt, 64 - 6)
    body = chosen[len(prompt.start) : -len(prompt.end)]
    assert len(chosen) == 58
    assert body == [*prompt.body[: len(body) // 2], *prompt.body[len(prompt.body) - (len(body) + 1) // 2 :]]


@pytest.mark.parametrize("chat", [True, False])
def test_answers_begin_as_the_task_says(chat: bool, llm: FocusLLM) -> None:
    """Behind the chat template's last token; without a template behind the question. A length counts it."""
    method = build_method("full", llm)
    plain = dataclasses.replace(LONG, chat=chat)
    begun = dataclasses.replace(plain, answer_prefix=" The word is")
    text = llm.tokenizer.decode(method.prompt(plain).ids)
    assert llm.tokenizer.decode(method.prompt(begun).ids) == text + ("The word is" if chat else " The word is")
    assert method.num_tokens(begun) > method.num_tokens(plain)


def test_retrieval_finds_the_passage(llm: FocusLLM) -> None:
    context = (
        "Nothing to see on this page at all. " * 10 + "The harbour of Zanzibar opens at nine. " + "And so on. " * 30
    )
    example = dataclasses.replace(LONG, context=context, before="", after="\nWhen does Zanzibar open?")
    method = build_method("retrieval:passage=40", llm)
    prompt = method.prompt(example)
    text = method.decode(method.choose(prompt, 200))
    assert "Zanzibar opens" in text.replace("?", "")
    assert len(method.choose(prompt, 200)) <= 200


def test_retrieval_finds_what_lies_across_two_passages(llm: FocusLLM) -> None:
    fact, filler = " Zanzibar opens at nine.", "Quite so. " * 59
    assert len(filler) % 60 == 50  # the fact begins ten tokens before the end of a passage
    example = dataclasses.replace(
        LONG, context=filler + fact + " And so on." * 60, before="", after="\nZanzibar at nine?"
    )
    method = build_method("retrieval:passage=60", llm)
    prompt = method.prompt(example)
    room = 70 + len(prompt.ids) - len(prompt.context)  # for one passage
    chosen = method.choose(prompt, room)
    assert fact in method.decode(chosen)
    assert len(chosen) <= room


def test_retrieval_may_be_held_to_the_local_budget(llm: FocusLLM) -> None:
    method = build_method("retrieval:passage=8,to=local", llm)
    chosen = method.choose(method.prompt(LONG), method.size - LONG.max_new_tokens)
    assert len(chosen) + LONG.max_new_tokens <= llm.config.local_length == method.size
    text = loss_example(400, labels=12)
    chosen_text = method.choose_text(text)
    assert len(chosen_text) <= llm.config.local_length + 1
    assert tuple(chosen_text[-13:]) == text.text_ids[-13:]


def test_retrieval_searches_text_without_spaces() -> None:
    scores = WordIndex(["今天天气很好。", "法国的首都是巴黎。", "a whale"]).scores("首都在哪里?")
    assert scores.argmax() == 1
    assert scores[2] == 0


def test_retrieval_searches_with_the_question_alone(llm: FocusLLM) -> None:
    method = build_method("retrieval", llm)
    assert method.prompt(LONG).query == "\nWhat is wide?"
    assert method.prompt(dataclasses.replace(LONG, after=" ")).query == "Read this.\n"


def test_an_answer_that_may_not_be_empty_begins_with_something_else(llm: FocusLLM) -> None:
    method = build_method("full", llm)
    first = int(method.start(method.prompt(SHORT), 6)[0].argmax())
    method.ends.add(first)
    assert method.generate(SHORT).text == ""
    assert method.generate(dataclasses.replace(SHORT, never_empty=True)).text
    stop = method.decode([first])
    method.ends.remove(first)
    assert method.generate(dataclasses.replace(SHORT, stop=(stop,))).text == ""
    assert method.generate(dataclasses.replace(SHORT, stop=(stop,), never_empty=True)).text


def test_stop_strings_in_front_of_such_an_answer_are_left_out(llm: FocusLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first token may be two line breaks, which is not the line break that ends an answer."""
    method, texts = build_method("full", llm), {40: "\n\n", 41: "Yes", 42: "\n", 43: "no"}
    monkeypatch.setattr(method, "decode", lambda made: "".join(texts[token] for token in made))
    monkeypatch.setattr(method, "_stops", lambda example: {42})
    one_hot = torch.eye(256)
    example = dataclasses.replace(SHORT, stop=("\n",), never_empty=True)
    for rest, expected in (((41, 42, 43), "Yes"), ((42, 43, 43), ""), ((41, 40, 43), "Yes")):
        left = iter(rest)
        monkeypatch.setattr(method, "start", lambda *_, left=left: (one_hot[40], lambda _: one_hot[next(left)]))
        assert method.generate(example).text == expected


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
def test_scaled_positions_are_those_of_transformers(name: str, llm: FocusLLM) -> None:
    text = loss_example(512 + 1)
    base = llm.model.base
    before = base.model.rotary_emb
    nats = build_method(name, llm).loss(text)[0]
    assert base.model.rotary_emb is before
    changes = {
        "pi": {"rope_type": "linear", "factor": 2.0},
        "ntk": {"rope_type": "default", "rope_theta": 1e4 * 2.0 ** (16 / 14)},
        "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
    }[name]
    other = build(rope_parameters={"rope_theta": 1e4, **changes})
    expected = base_loss(FocusLLM(FocusForCausalLM(other, SMALL), byte_tokenizer(), ""), text.text_ids, 12)
    assert nats == pytest.approx(expected, abs=1e-3)
    assert nats != pytest.approx(base_loss(llm, text.text_ids, 12), abs=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("focs", "did you mean focus"),
        ("full:x=1", "full has no option x"),
        ("focus:chunk_length", "name=value"),
        ("truncate:to=nowhere", "base or local"),
        ("retrieval:passage=0", "passage is 0; it must be a whole number of at least 2"),
        ("streaming:sinks=many", "sinks is 'many'; it must be a whole number of at least 0"),
        ("pi:factor=0.5", "factor is 0.5; it must be a number of at least 1"),
        ("focus:kv_place=disk", "kv_place is 'disk', but what is measured is kept on the device"),
    ],
)
def test_bad_methods_are_refused(spec: str, message: str, llm: FocusLLM) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(spec, llm)


@pytest.mark.parametrize("spec", ["truncate:to=local", "retrieval"])
def test_no_room_for_the_prompt_is_said(spec: str, llm: FocusLLM) -> None:
    long_answer = dataclasses.replace(LONG, max_new_tokens=300)
    with pytest.raises(ConfigError, match=r"are left (for the prompt|beside the answer)"):
        build_method(spec, llm).generate(long_answer)


def test_more_labels_than_tokens_are_refused(llm: FocusLLM) -> None:
    with pytest.raises(ConfigError, match="100 labels are more than the 64 tokens"):
        build_method("truncate:to=local", llm).loss(loss_example(400, labels=100))


def test_the_last_text_is_kept_where_it_is_used(llm: FocusLLM) -> None:
    config, last = SMALL.replace(chunk_overlap=0), LastText(llm.model.base)
    first, second = random_ids(24 * 3 + 5), random_ids(24 * 2, seed=1)
    blocks = last.blocks(first + first[:24], config)
    assert (last.num_asked, last.num_read) == (5, 5)
    again = last.blocks(first[: 24 * 2], config)  # a beginning: as a document with one more chunk in the local context
    assert (last.num_asked, last.num_read) == (7, 5)
    assert again[0].num_chunks == 2
    assert again[0].resident.keys[0].data_ptr() == blocks[0].resident.keys[0].data_ptr()
    mixed = last.blocks(second + first[:24] + first[:24], config)[0].resident
    assert (last.num_asked, last.num_read) == (11, 8)  # what repeats is read once
    for kept, new in zip(blocks[0].resident.keys, mixed.keys, strict=True):
        assert torch.equal(kept[0], new[2])
        assert torch.equal(kept[0], new[3])
    packed = last.blocks(second, config.replace(kv_dtype="int8"))
    assert last.num_read == 10
    assert isinstance(packed[0].kv, Packed)
    last.clear()
    last.blocks(second, config)
    assert last.num_read == 12


def test_the_last_text_makes_room_before_the_next_is_read(llm: FocusLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from focusllm.memory import chunk_cache

    last, config = LastText(llm.model.base), SMALL
    kept = weakref.ref(last.blocks(random_ids(80), config)[0].kv)
    read_behind, alive = chunk_cache.read_behind, []
    monkeypatch.setattr(
        chunk_cache, "read_behind", lambda *given: alive.append(kept() is not None) or read_behind(*given)
    )
    last.blocks(random_ids(80, seed=1), config)
    assert alive == [False] * 4


def test_labels_over_a_whole_text_read_every_full_chunk_once(llm: FocusLLM) -> None:
    method = build_method("focus", llm)
    example = loss_example(400, labels=390)
    found, _ = method.loss(example)
    size = method.budget // 2
    stops = range(10 + size, 400 + size, size)
    full = len(cut(400 - method.budget, method.config)) - 1
    assert full < method.chunks.num_read <= full + len(stops) < method.chunks.num_asked / 2
    pieces = [(example.text_ids[: min(stop, 400)], min(stop, 400) - stop + size) for stop in stops]
    alone = [build_method("focus", llm).loss(LossExample("", ids, labels))[0] for ids, labels in pieces]
    assert sum(alone) == pytest.approx(found, rel=1e-5)


def test_a_second_question_reads_nothing(llm: FocusLLM) -> None:
    method = build_method("focus", llm)
    method.generate(LONG)
    count = method.chunks.num_read
    method.generate(dataclasses.replace(LONG, after="\nWhat is not a fish?"))
    assert method.chunks.num_read == count > 3
