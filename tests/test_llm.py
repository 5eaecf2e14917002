"""The library's front on a tiny model: read, ask, stream, cite."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from conftest import SMALL, build, byte_tokenizer, random_ids
from focusllm import ConfigError, Document, DocumentError, FocusForCausalLM, FocusLLM, MemoryLimitError, ModelError
from focusllm.decoding.engine import prefill, start_request
from focusllm.documents.text import encode_text, frame_question
from focusllm.memory.cost import _tokens_of_a_request, estimate

TEXT = "".join(f"Line {i} of the story tells of thing number {i * 7}.\n" for i in range(12))
OTHER = "Quite another text about birds, beasts and flowers, told in fewer words than the first one was."


def test_document_knows_where_its_chunks_are(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT, name="story")
    assert document.num_tokens == len(TEXT)
    first, *others = (TEXT[chunk.start : chunk.end] for chunk in document.chunks)
    assert first + "".join(text[SMALL.overlap :] for text in others) == TEXT
    assert document.nbytes == (len(TEXT) + SMALL.overlap * len(others)) * 2 * 3 * 2 * 16 * 4
    assert repr(document) == f"Document('story', {len(TEXT)} tokens, {len(document.chunks)} chunks)"


def test_chunks_of_characters_that_take_several_tokens(tiny_llm: FocusLLM) -> None:
    text = "世界 café " * 20
    document = tiny_llm.read(text)
    assert document.num_tokens == len(text.encode())
    assert document.chunks[0].start == 0
    assert document.chunks[-1].end == len(text)
    assert all(a.end >= b.start for a, b in zip(document.chunks, document.chunks[1:], strict=False))


def test_reading_a_file_a_text_and_token_ids_is_the_same(tiny_llm: FocusLLM, tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    ids = encode_text(tiny_llm.tokenizer, TEXT).token_ids
    answers = [tiny_llm.ask(tiny_llm.read(source), "Why?", max_new_tokens=8) for source in (path, str(path), TEXT, ids)]
    assert len({answer.text for answer in answers}) == 1
    assert [answer.citations[0].document for answer in answers] == ["story.txt", "story.txt", "text", "text"]
    assert tiny_llm.read(ids).text == TEXT


def test_documents_may_be_kept_each_in_another_way(
    tiny_llm: FocusLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path))
    plain = tiny_llm.read(TEXT)
    int8, disk = tiny_llm.read(TEXT, kv_dtype="int8"), tiny_llm.read_text(TEXT, kv_place="disk")
    assert (disk.nbytes, 0 < int8.nbytes < 0.3 * plain.nbytes) == (0, True)
    expected = tiny_llm.ask([plain, plain], "Why?", max_new_tokens=8).text
    assert tiny_llm.ask([plain, disk], "Why?", max_new_tokens=8).text == expected
    assert tiny_llm.ask([int8, disk], "Why?", max_new_tokens=8).num_generated_tokens
    with pytest.raises(ConfigError, match="kv_dtype is 'int2'"):
        tiny_llm.read(TEXT, kv_dtype="int2")  # type: ignore[arg-type]


def test_a_question_that_would_not_fit_is_refused(tiny_llm: FocusLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tiny_llm.read(TEXT)
    cost = estimate(tiny_llm.model.base, tiny_llm.config, 2 * document.num_tokens)
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: cost.rows + cost.scratch)
    tiny_llm.ask(document, "Why?", max_new_tokens=2)
    refused = pytest.raises(MemoryLimitError, match=r"a question about .* chunks needs .* ask about fewer documents")
    with refused:
        tiny_llm.ask([document] * 12, "Why?", max_new_tokens=2)
    with pytest.raises(MemoryLimitError, match=r"fewer tokens than 10,000 \(max_new_tokens\), ask about"):
        tiny_llm.ask(document, "Why?", max_new_tokens=10_000)


def test_odd_questions_and_tokenizers_are_one_sentence(tiny_llm: FocusLLM, model_folder: Path) -> None:
    document = tiny_llm.read(TEXT)
    with pytest.raises(DocumentError, match="the question is not Unicode text"):
        tiny_llm.ask(document, "caf\udce9?")
    (model_folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Newer"}}')
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded"):
        FocusLLM.from_pretrained(model_folder)


def test_settings_are_checked_before_weights_are_loaded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FocusForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match="kv_dtype is 'int5'"):
        FocusLLM.from_pretrained(model_folder, kv_dtype="int5")


def test_what_a_question_takes_is_known_for_many_short_documents(tiny_llm: FocusLLM) -> None:
    documents = [tiny_llm.read("Tell me. " * count) for count in range(9, 15)]
    blocks = [block for document in documents for block in document.blocks]
    config = tiny_llm.config
    request = start_request(tiny_llm.model.base, blocks, random_ids(20), config)
    prefill(tiny_llm.model.base, request, config)
    alike = Counter(length for block in blocks for length in [block.length] * block.num_chunks)
    assert len(alike) > 4
    tokens = _tokens_of_a_request(config, alike, True, 10)
    assert tokens * 2 * 3 * 2 * 16 * 4 == pytest.approx(request.nbytes, rel=0.3)


def test_answer_counts_times_and_citations(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    pieces: list[str] = []
    answer = tiny_llm.ask(document, "What is told?", max_new_tokens=10, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert answer.num_document_tokens == len(TEXT)
    assert 1 <= answer.num_generated_tokens <= 10
    assert 0 < answer.time_to_first_token <= answer.seconds
    assert answer.peak_memory > 0
    assert sum(citation.weight for citation in answer.citations) == pytest.approx(1)
    weights = [citation.weight for citation in answer.citations]
    assert weights == sorted(weights, reverse=True)
    assert all(TEXT[c.start : c.end] == c.text for c in answer.citations)
    assert len(answer.to_dict(2)["citations"]) == 2


def test_citations_follow_the_attention_to_the_candidates(tiny_llm: FocusLLM) -> None:
    """Make one chunk's candidate the only one worth attending to: it must come out first."""
    document = tiny_llm.read(TEXT)
    usual = tiny_llm.ask(document, "What?", max_new_tokens=1).citations
    last = usual[-1].chunk
    with torch.no_grad():
        for value in document.blocks[0].kv.values:
            value[last] *= 30.0
    changed = tiny_llm.ask(document, "What?", max_new_tokens=1).citations
    assert {c.chunk: c.weight for c in changed} != {c.chunk: c.weight for c in usual}


def test_short_document_is_the_base_model_with_the_chat_template(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read("A short one.")
    answer = tiny_llm.ask(document, "What?", max_new_tokens=12)
    ids = tiny_llm.tokenizer("<s>A short one.\n\nWhat?</s><s>", return_tensors="pt").input_ids
    plain = build(max_position_embeddings=512).generate(ids, max_new_tokens=12, do_sample=False)
    assert answer.text == tiny_llm.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.citations == []


def test_several_documents_in_either_order(tiny_llm: FocusLLM) -> None:
    a, b = tiny_llm.read(TEXT, name="a"), tiny_llm.read(OTHER, name="b")
    kept = [id(block.kv) for block in a.blocks + b.blocks]
    for order in ([a, b], [b, a]):
        joined = tiny_llm.ask(order, "What?", max_new_tokens=8)
        assert {citation.document for citation in joined.citations} <= {"a", "b"}
        assert joined.num_document_tokens == len(TEXT) + len(OTHER)
        cited = {(c.document, c.chunk) for c in joined.citations}
        first = order[0]
        assert {(first.name, i) for i in range(len(first.chunks))} <= cited
    assert [id(block.kv) for block in a.blocks + b.blocks] == kept


def test_two_halves_equal_the_whole(tiny_llm: FocusLLM) -> None:
    """Two documents cut at a chunk's end are the same rows as one document, what chunks share in both of them."""
    cut = 10 * SMALL.stride
    halves = [tiny_llm.read(TEXT[: cut + SMALL.overlap]), tiny_llm.read(TEXT[cut:])]
    whole = tiny_llm.ask(tiny_llm.read(TEXT), "What?", max_new_tokens=16)
    both = tiny_llm.ask(halves, "What?", max_new_tokens=16)
    assert both.text == whole.text
    assert [c.weight for c in both.citations] == pytest.approx([c.weight for c in whole.citations], rel=1e-4)


def test_answer_longer_than_the_local_context(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    answer = tiny_llm.ask(document, "What?", max_new_tokens=150, eos_token_id=-1)
    assert answer.num_generated_tokens == 150
    assert {c.chunk for c in answer.citations} <= set(range(len(document.chunks)))


def test_stream_equals_ask(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    stream = tiny_llm.stream(document, "What?", max_new_tokens=12)
    pieces = list(stream)
    assert stream.answer.text == "".join(pieces) == tiny_llm.ask(document, "What?", max_new_tokens=12).text
    assert tiny_llm.stream(document, "What?", max_new_tokens=12).answer.text == stream.answer.text


def test_closed_stream_stops(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    stream = tiny_llm.stream(document, "What?", max_new_tokens=5000, eos_token_id=-1)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.answer.num_generated_tokens < 5000
    assert not stream._thread.is_alive()


def test_dropped_stream_stops(tiny_llm: FocusLLM) -> None:
    stream = tiny_llm.stream(tiny_llm.read(TEXT), "What?", max_new_tokens=100_000, eos_token_id=-1)
    next(stream)
    thread = stream._thread
    del stream
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_error_while_streaming_reaches_the_reader(tiny_llm: FocusLLM) -> None:
    stream = tiny_llm.stream(tiny_llm.read(TEXT), "What?", no_such_argument=1)
    with pytest.raises(ValueError, match="no_such_argument"):
        next(stream)


def test_sampling_arguments_and_stop_strings(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    varied = {"max_new_tokens": 24, "eos_token_id": -1, "no_repeat_ngram_size": 1}
    long = tiny_llm.ask(document, "What?", **varied)
    stop = next(c for c in long.text[3:] if c not in "\ufffd \n")
    assert tiny_llm.ask(document, "What?", **varied, stop_strings=[stop]).text.endswith(stop)
    warm = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 10}
    torch.manual_seed(1)
    first = tiny_llm.ask(document, "What?", **warm).text
    torch.manual_seed(1)
    assert tiny_llm.ask(document, "What?", **warm).text == first


def test_control_tokens_in_a_document_stay_text(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read("one </s><s> two")
    assert not {0, 1, 2} & set(document.token_ids)
    before, after = frame_question(tiny_llm.tokenizer, "</s>?")
    assert before == [1]
    assert after.count(2) == 1


def test_question_without_chat_template() -> None:
    before, after = frame_question(byte_tokenizer(chat=False), "Why?")
    assert before == []
    assert byte_tokenizer().decode(after) == "\n\nQuestion: Why?\nAnswer:"


def test_continue_text_equals_generate(tiny_llm: FocusLLM) -> None:
    answer = tiny_llm.continue_text(TEXT, max_new_tokens=10)
    ids = torch.tensor([encode_text(tiny_llm.tokenizer, TEXT).token_ids])
    plain = tiny_llm.model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert answer.text == tiny_llm.tokenizer.decode(plain, skip_special_tokens=True)


def test_progress_function(tiny_llm: FocusLLM, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int]] = []
    tiny_llm.read(TEXT, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(TEXT), len(TEXT))
    tiny_llm.read(TEXT, progress=True)
    assert "Reading: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "has no text"),
        ("  \n ", "has no text"),
        ([], "gives no tokens"),
        ([3, 99999], "token id 99999"),
        ([-1], "token id -1"),
        (Path("nowhere.txt"), "there is no file"),
        ("nowhere.txt", "there is no file"),
    ],
)
def test_bad_documents(tiny_llm: FocusLLM, source: object, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        tiny_llm.read(source)


def test_a_text_that_looks_like_a_path(tiny_llm: FocusLLM) -> None:
    assert tiny_llm.read_text("/etc/passwd", name="odd").text == "/etc/passwd"


def test_short_and_long_texts_in_two_threads(tiny_llm: FocusLLM) -> None:
    """The base model alone and passes of ours take turns."""
    document = tiny_llm.read(TEXT)
    expected = tiny_llm.continue_text("short", max_new_tokens=6).text
    stream = tiny_llm.stream(document, "What?", max_new_tokens=150, eos_token_id=-1)
    assert {tiny_llm.continue_text("short", max_new_tokens=6).text for _ in range(20)} == {expected}
    stream.close()


def test_too_many_chunks_are_refused_before_reading(tiny_llm: FocusLLM) -> None:
    calls: list[tuple[int, int]] = []
    tiny_llm.model.focus_config = tiny_llm.config.replace(chunk_length=2)
    with pytest.raises(ConfigError, match="use a chunk_length of at least"):
        tiny_llm.read(TEXT * 4, progress=lambda done, total: calls.append((done, total)))
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_beams": 2}, "num_beams is 2"), ({"streamer": None}, "streamer is set by ask itself")],
)
def test_arguments_that_do_not_fit_an_answer(tiny_llm: FocusLLM, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_llm.ask(tiny_llm.read(TEXT), "What?", **arguments)


def test_generation_config_is_taken(tiny_llm: FocusLLM) -> None:
    config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert tiny_llm.ask(tiny_llm.read(TEXT), "What?", generation_config=config).num_generated_tokens == 3


def test_documents_can_be_compared_and_kept_in_sets(tiny_llm: FocusLLM) -> None:
    a, b = tiny_llm.read(TEXT), tiny_llm.read(TEXT)
    assert a != b
    assert len({a, b, a}) == 2


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(tiny_llm: FocusLLM, question: str) -> None:
    with pytest.raises(DocumentError, match="question is empty"):
        tiny_llm.ask(tiny_llm.read(TEXT), question)


def test_question_longer_than_the_local_context(tiny_llm: FocusLLM) -> None:
    with pytest.raises(DocumentError, match=r"takes 105 tokens .* holds 64.*at least 105"):
        tiny_llm.ask(tiny_llm.read(TEXT), "x" * 100)


def test_document_of_another_reader(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    tiny_llm.model.focus_config = tiny_llm.config.replace(chunk_length=30)
    with pytest.raises(ConfigError, match="read it again"):
        tiny_llm.ask(document, "What?")
    with pytest.raises(ConfigError, match="there are no documents"):
        tiny_llm.ask([], "What?")


def test_not_enough_memory_is_said_before(tiny_llm: FocusLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: 2_000_000)
    with pytest.raises(MemoryLimitError, match=r"are free; use .*a text of at most"):
        tiny_llm.read(TEXT * 15)


def test_from_pretrained(model_folder: Path, tiny_llm: FocusLLM) -> None:
    loaded = FocusLLM.from_pretrained(model_folder, device="cpu")
    assert loaded.config == tiny_llm.config
    assert loaded.has_trained_candidates
    expected = tiny_llm.ask(tiny_llm.read(TEXT), "What?", max_new_tokens=8)
    assert loaded.ask(loaded.read(TEXT), "What?", max_new_tokens=8).text == expected.text
    assert FocusLLM.from_pretrained(model_folder, chunk_length=30, dtype="bfloat16").config.chunk_length == 30


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float7"}, ConfigError, "dtype is 'float7'"),
        ({"device": "tpu9"}, ConfigError, "device is 'tpu9'"),
        ({"device": "cuda:99"}, ConfigError, "device is 'cuda:99', which cannot be used"),
        ({"chunk_length": 5000}, ConfigError, "base model has 512; use a chunk_length of at most 384"),
        ({"window": 1}, ConfigError, "unknown setting window"),
        ({"model": "/nowhere/at/all"}, ModelError, "cannot be loaded"),
    ],
)
def test_bad_arguments(model_folder: Path, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FocusLLM.from_pretrained(**{"model": model_folder, **arguments})


def test_documents_are_not_changed_by_questions(tiny_llm: FocusLLM) -> None:
    document: Document = tiny_llm.read(TEXT)
    before = [tensor.clone() for block in document.blocks for tensor in block.kv.keys + block.kv.values]
    tiny_llm.ask(document, "What?", max_new_tokens=100, eos_token_id=-1)
    after = [tensor for block in document.blocks for tensor in block.kv.keys + block.kv.values]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("has_instructions", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_the_type_that_is_fast(
    has_instructions: bool,
    expected: torch.dtype,
    model_folder: Path,
    tiny_llm: FocusLLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint's own 16-bit type only on a CPU with instructions for it."""
    tiny_llm.model.to(torch.bfloat16)
    tiny_llm.save_pretrained(model_folder)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": has_instructions})
    assert FocusLLM.from_pretrained(model_folder).model.dtype == expected
    assert FocusLLM.from_pretrained(model_folder, dtype="bfloat16").model.dtype == torch.bfloat16
