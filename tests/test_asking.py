"""Questions: how documents are joined, where answers looked, and what `generate()` is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from conftest import SMALL, asked_about, byte_tokenizer, random_ids
from focusllm import Answer, ConfigError, FocusLLM
from focusllm.decoding.engine import Request, decode, prefill, start_request
from focusllm.documents.extracted import Extracted
from focusllm.documents.text import encode_ids, encode_text, frame_question
from focusllm.memory.chunks import encode
from test_detokenizer import CODE, metaspace_tokenizer, spaced_tokenizer

TEXT = "".join(f"Line {i} of the story tells of thing number {i * 7}.\n" for i in range(12))


def local_text(llm: FocusLLM, *texts: str) -> str:
    documents = [llm.read_text(text) for text in texts]
    return llm.tokenizer.decode(asked_about(llm, documents, "Q?").input_ids)


@pytest.mark.parametrize("before", ["", TEXT])
@pytest.mark.parametrize("plain_below", [None, 10_000])
def test_documents_do_not_run_into_each_other(tiny_llm: FocusLLM, before: str, plain_below: int | None) -> None:
    """However much of the first one is in the local context."""
    tiny_llm.model.focus_config = tiny_llm.config.replace(plain_below=plain_below)
    whole = local_text(tiny_llm, f"{before}is 12", "34 apples", "56")
    assert whole.endswith("is 12\n\n34 apples\n\n56\n\nQ?</s><s>")


def test_the_boundary_counts_in_the_local_context(tiny_llm: FocusLLM) -> None:
    """Two documents that would fill it without the boundary do not fit with it."""
    before, after = frame_question(tiny_llm.tokenizer, "Q?")
    room = tiny_llm.config.local_length - len(before) - len(after)
    chunk = SMALL.chunk_length
    first, second = [tiny_llm.read_text("a" * (room - chunk)), tiny_llm.read_text("b" * chunk)]
    asked = asked_about(tiny_llm, [first, second], "Q?")
    assert len(asked.input_ids) <= tiny_llm.config.local_length
    assert asked.context.far == [(0, 0)]


def test_the_end_of_a_document_can_be_cited(tiny_llm: FocusLLM) -> None:
    """It gets what the most attended of its tokens gets in the local context, measured as a candidate's is."""
    documents = [tiny_llm.read_text(TEXT, name="a"), tiny_llm.read_text(TEXT[:50] * 2, name="b")]
    answer = tiny_llm.ask(documents, "What?", max_new_tokens=1)
    found = {(c.document_index, c.chunk): c for c in answer.citations}
    assert set(found) == {(d, i) for d, document in enumerate(documents) for i in range(len(document.chunks))}
    asked = asked_about(tiny_llm, documents, "What?")
    assert 0 < len(asked.context.near) < len(documents[1].chunks)
    model, config = tiny_llm.model.base, tiny_llm.config
    request = start_request(model, asked.blocks, asked.input_ids, config, asked.prompt_length)
    prefill(model, request, config)
    paid, local = request.paid, request.paid_local
    assert paid is not None
    assert local is not None
    assert 0 < local.sum() < 3  # at most 1 a layer
    near = asked.context.near[-1]
    before = len(asked.input_ids) - asked.num_behind - len(asked.context.token_ids)
    own = local[before + near.start : before + near.end].max()
    seen = sum(local[before + n.start : before + n.end].max() for n in asked.context.near) + paid.sum()
    assert found[near.document, near.chunk].weight == pytest.approx(float(own / seen), rel=1e-4)
    assert sum(c.weight for c in answer.citations) == pytest.approx(1)


@pytest.mark.parametrize("decoding", ["cached", "exact"])
@pytest.mark.parametrize("refresh_rows", [None, 2])
@pytest.mark.parametrize("bos_token_id", [None, 1])
def test_attention_to_local_tokens_equals_one_local_pass(
    llama, settings, decoding: str, refresh_rows: int | None, bos_token_id: int | None
) -> None:
    """Step by step the same as a pass over all of the local context at once; and kept over a rechunk."""
    config = settings(decoding=decoding, refresh_rows=refresh_rows, bos_token_id=bos_token_id, local_length=12)
    blocks = encode(llama, random_ids(100), config)
    request = start_request(llama, blocks, random_ids(20, 1), config)
    first_ids, count = list(request.local_ids), len(request.local_ids)
    prefill(llama, request, config)
    exact = start_request(llama, blocks, random_ids(20, 1), config.replace(decoding="exact", refresh_rows=None))
    prefill(llama, exact, config.replace(decoding="exact", refresh_rows=None))
    assert request.paid_local is not None
    assert exact.paid_local is not None
    assert request.paid_local.shape == (count,)
    if refresh_rows is None or decoding == "exact":
        torch.testing.assert_close(request.paid_local, exact.paid_local, rtol=1e-4, atol=1e-5)
    for token in random_ids(2, 2):
        before = request.paid_local.clone()
        decode(llama, [request], [token], config)
        assert request.paid_local.shape == (count,)
        assert (request.paid_local > before).all()
    for token in random_ids(3, 3):  # the oldest become a chunk
        decode(llama, [request], [token], config)
    left = request.local_start[1]
    assert left > 0
    before = request.paid_local.clone()
    decode(llama, [request], [70], config)
    grown = request.paid_local - before
    assert (grown[:left] == 0).all()
    assert (grown[left:] > 0).all()
    place = request.local_start[0]
    assert request.local_ids[place : place + count - left] == first_ids[left:]


def test_two_files_of_one_name(tiny_llm: FocusLLM, tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(TEXT.replace("story", folder))
    documents = [tiny_llm.read(tmp_path / folder / "x.txt") for folder in "ab"]
    assert [document.name for document in documents] == ["x.txt", "x.txt"]
    cited = tiny_llm.ask(documents, "What?", max_new_tokens=2).citations
    assert {(c.document, c.document_index) for c in cited} == {("a/x.txt", 0), ("b/x.txt", 1)}
    assert {c.document for c in tiny_llm.ask(documents[0], "What?", max_new_tokens=2).citations} == {"x.txt"}


def test_citations_within_a_folder(tiny_llm: FocusLLM, tmp_path: Path) -> None:
    texts = {f"part{number}.txt": f"Part {number} tells of {number * 7}.\n" * (number + 1) for number in range(6)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    remarks: list[str] = []
    tiny_llm.notify = remarks.append
    document = tiny_llm.read(tmp_path, name="parts")
    assert document.name == "parts"
    assert len(remarks) == 1
    assert "image.png" in remarks[0]
    cited = tiny_llm.ask(document, "What?", max_new_tokens=2).citations
    assert sum(c.weight for c in cited) == pytest.approx(1)
    assert {c.document for c in cited} == set(texts)
    assert all(texts[c.document][c.start : c.end] == c.text for c in cited)
    again = tiny_llm.read_folder(tmp_path / "*.txt")
    assert again.token_ids == document.token_ids


def test_citations_name_the_page(tiny_llm: FocusLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Extracted(TEXT, tuple((start, f"page {start // 100 + 1}") for start in range(0, len(TEXT), 100)))
    monkeypatch.setattr("focusllm.documents.sources.read_file", lambda *_: found)
    cited = tiny_llm.ask(tiny_llm.read(tmp_path / "a.pdf"), "What?", max_new_tokens=2).citations
    for citation in cited:
        first, last = citation.start // 100 + 1, (citation.end - 1) // 100 + 1
        assert citation.part == (f"page {first}" if first == last else f"page {first} to page {last}")
    assert tiny_llm.ask(tiny_llm.read_text(TEXT), "What?", max_new_tokens=2).citations[0].part is None


def test_max_length_counts_the_local_context(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    prompt = tiny_llm.ask(document, "What?", max_new_tokens=1).num_prompt_tokens

    def count(**arguments: object) -> int:
        return tiny_llm.ask(document, "What?", eos_token_id=-1, **arguments).num_generated_tokens

    assert count(max_length=prompt + 3) == 3
    assert count(generation_config=GenerationConfig(max_length=prompt + 4, eos_token_id=None)) == 4
    with pytest.raises(ConfigError, match=rf"max_length is 5, but .* take {prompt} tokens of it; .*{prompt + 1}"):
        count(max_length=5)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        count(max_new_tokens=0)


def test_stop_strings_in_a_generation_config(tiny_llm: FocusLLM) -> None:
    document = tiny_llm.read(TEXT)
    varied = {"max_new_tokens": 24, "eos_token_id": None, "no_repeat_ngram_size": 1, "pad_token_id": 0}
    long = tiny_llm.ask(document, "What?", generation_config=GenerationConfig(**varied)).text
    stop = next(c for c in long[3:] if c not in "\ufffd \n")
    config = GenerationConfig(**varied, stop_strings=[stop])
    assert tiny_llm.ask(document, "What?", generation_config=config).text == long[: long.index(stop, 3) + 1]
    with pytest.raises(ConfigError, match="num_beams is 2"):
        tiny_llm.ask(document, "What?", generation_config=GenerationConfig(num_beams=2))


@pytest.mark.parametrize("make", [spaced_tokenizer, metaspace_tokenizer, byte_tokenizer])
def test_answers_are_what_the_tokenizer_makes_of_their_tokens(
    tiny_llm: FocusLLM, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indentation behind line ends included, which a streamer that starts anew at each line end loses."""
    tiny_llm.tokenizer = tokenizer = make()
    tokens = tokenizer(CODE, add_special_tokens=False).input_ids

    def generate(inputs: Tensor, streamer, cache, **_: object) -> None:
        cache.requests = [Request([], [5])]
        for value in (inputs, *(torch.tensor([token]) for token in tokens)):
            streamer.put(value)
        streamer.end()

    monkeypatch.setattr(tiny_llm.model, "generate", generate)
    pieces: list[str] = []
    answer: Answer = tiny_llm.continue_text("abc", on_text=pieces.append)
    assert "".join(pieces) == answer.text == tokenizer.decode(tokens)
    assert answer.to_dict()["text"] == CODE


def test_prompt_and_text_are_the_whole(tiny_llm: FocusLLM) -> None:
    """White space at the beginning and the end of what is generated stays."""
    space = tiny_llm.tokenizer(" ", add_special_tokens=False).input_ids

    def only_spaces(_: int, __: Tensor) -> list[int]:
        return space

    answer = tiny_llm.continue_text("once", max_new_tokens=3, prefix_allowed_tokens_fn=only_spaces)
    assert answer.text == "   "
    assert (
        tiny_llm.ask(tiny_llm.read_text("once"), "Why?", max_new_tokens=3, prefix_allowed_tokens_fn=only_spaces).text
        == "   "
    )


def test_added_tokens_stay_text_too() -> None:
    """Those that the tokenizer does not call special; but runs of spaces are how some vocabularies write text."""
    tokenizer = byte_tokenizer()
    text = "a </think> b    c [INST] </s> d"
    plain = encode_text(tokenizer, text)
    tokenizer.add_tokens(["</think>", "[INST]"])
    assert encode_text(tokenizer, text) == plain
    assert encode_ids(tokenizer, text) == plain.token_ids
    tokenizer.add_tokens(["   ", "protein"])
    ids = encode_ids(tokenizer, f"{text} protein")
    assert tokenizer.convert_tokens_to_ids("   ") in ids
    assert tokenizer.convert_tokens_to_ids("protein") in ids
    assert not {tokenizer.convert_tokens_to_ids(token) for token in ("</think>", "[INST]", "</s>")} & set(ids)
    assert tokenizer.decode(ids) == f"{text} protein"
    _, after = frame_question(tokenizer, "</think>?")
    assert tokenizer.convert_tokens_to_ids("</think>") not in after


SWITCHED = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def test_switches_of_the_chat_template(tiny_llm: FocusLLM) -> None:
    tiny_llm.tokenizer.chat_template = SWITCHED
    thinking = tiny_llm.frame("Why?")[1]
    off = tiny_llm.frame("Why?", {"enable_thinking": False})[1]
    assert tiny_llm.tokenizer.decode(off) == tiny_llm.tokenizer.decode(thinking) + "<think></think>"
    document = tiny_llm.read_text(TEXT)
    answers = [
        tiny_llm.ask(document, "Why?", max_new_tokens=1, template_kwargs=switches)
        for switches in (None, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    counts = [answer.num_prompt_tokens for answer in answers]
    assert counts[0] == counts[1] != counts[2]
    stream = tiny_llm.stream(document, "Why?", max_new_tokens=1, template_kwargs={"enable_thinking": False})
    assert stream.answer.num_prompt_tokens == counts[2]
    for name in ("enable_thought", "tokenize"):
        with pytest.raises(ConfigError, match=f"chat template has no switch {name}"):
            tiny_llm.ask(document, "Why?", template_kwargs={name: 1})
    tiny_llm.tokenizer.chat_template = "{{ raise_exception('no ' ~ tone ~ ' here') }}"
    with pytest.raises(ConfigError, match=r"chat template fails with tone='x': no x here"):
        tiny_llm.frame("Why?", {"tone": "x"})
    tiny_llm.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template is missing"):
        tiny_llm.frame("Why?", {"enable_thinking": False})


def test_command_line(focusllm, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a pattern and two files of one name; switches; and a seed that holds for every question."""
    for name in ("a/x.txt", "b/x.txt", "b/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT.replace("story", name))
    (tmp_path / "b" / "z.bin").write_bytes(bytes(100))
    monkeypatch.chdir(tmp_path)
    (model_folder / "chat_template.jinja").write_text(SWITCHED)
    common = ("-m", model_folder, "--max-new-tokens", 3, "--json", "--citations", 100)

    sampled = ("-q", "Why?", "-q", "What?", "-q", "Why?", "--temperature", 2, "--seed", 5)
    code, out, err = focusllm("ask", "b", "a/x.txt", *common, *sampled)
    assert code == 0, err
    found = json.loads(out)
    assert "z.bin" in err
    assert [(d["name"], d["num_files"]) for d in found["documents"]] == [("b", 2), ("x.txt", 1)]
    first, _, last = found["answers"]
    assert first["text"] == last["text"]
    assert {(c["document"], c["document_index"]) for c in first["citations"]} == {
        *(("b/x.txt", 0), ("y.txt", 0), ("a/x.txt", 1))
    }
    found = json.loads(focusllm("ask", "a/x.txt", "b/x.txt", "?/y*.txt", *common, "-q", "Why?")[1])
    assert [d["name"] for d in found["documents"]] == ["a/x.txt", "b/x.txt", "?/y*.txt"]
    prompt = found["answers"][0]["num_prompt_tokens"]
    off = ("--template-arg", "enable_thinking=false")
    found = json.loads(focusllm("ask", "a/x.txt", "b/x.txt", "?/y*.txt", *common, "-q", "Why?", *off)[1])
    assert found["answers"][0]["num_prompt_tokens"] != prompt
    code, _, err = focusllm("ask", "a/x.txt", *common, "-q", "Why?", "--template-arg", "thinking")
    assert code == 2
    assert "--template-arg 'thinking' is not NAME=VALUE" in err


def test_switches_that_change_what_opened_chunks_stand_behind(tiny_llm: FocusLLM) -> None:
    """Such a switch needs a document that was read with it; one that changes nothing there does not."""
    tiny_llm.tokenizer.chat_template = (
        "{% if quiet is defined and quiet %}[quiet]{% endif %}[user]{{ messages[0].content }}[end]"
        "{% if short is defined and short %}[short]{% endif %}"
    )
    tiny_llm.model.focus_config = tiny_llm.config.replace(far_context="opened", open_tokens=48)
    plain = tiny_llm.read_text(TEXT)
    quiet = tiny_llm.read_text(TEXT, template_kwargs={"quiet": True})
    assert plain.blocks[0].start_ids != quiet.blocks[0].start_ids
    tiny_llm.ask(plain, "What?", max_new_tokens=1, template_kwargs={"short": True})
    tiny_llm.ask(quiet, "What?", max_new_tokens=1, template_kwargs={"quiet": True, "short": True})
    for document, switches in ((plain, {"quiet": True}), (quiet, {})):
        with pytest.raises(ConfigError, match="read it with the same template_kwargs"):
            tiny_llm.ask(document, "What?", max_new_tokens=1, template_kwargs=switches)
