"""Questions that follow one another: what the later ones see, and the file in which they are kept."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer
from focusllm import ConfigError, Conversation, DocumentError, FocusLLM
from focusllm.asking import about, turn_length
from focusllm.conversation import load_messages
from focusllm.documents.text import encode_ids, frame_conversation, frame_ids
from focusllm.memory.chunks import ChunkBlock

TEXT = "".join(f"Line {i} of the story tells of thing number {i * 7}.\n" for i in range(12))
SAID = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
Focusllm = Any


def tokens(blocks: list[ChunkBlock]) -> list[int]:
    return [int(token) for block in blocks for row in block.token_ids for token in row]


@pytest.mark.parametrize("chat", [True, False])
def test_the_base_alone_reads_the_document_and_all_that_was_said(tiny_llm: FocusLLM, chat: bool) -> None:
    """Where all fits into the local context, an answer is transformers' own behind document, turns and question."""
    tiny_llm.tokenizer = byte_tokenizer(chat)
    tiny_llm.model.focus_config = tiny_llm.config.replace(local_length=200)
    conversation = tiny_llm.conversation(tiny_llm.read_text("A boat."))
    for question in ("What?", "And?"):
        messages = [*conversation.messages, {"role": "user", "content": question}]
        before, turns, _ = frame_conversation(tiny_llm.tokenizer, messages)
        prompt = torch.tensor([[*before, *encode_ids(tiny_llm.tokenizer, "A boat."), *turns]])
        wanted = tiny_llm.model.base.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answer = conversation.ask(question, max_new_tokens=6)
        assert answer.text == tiny_llm.tokenizer.decode(wanted[0, prompt.shape[1] :], skip_special_tokens=True)
    assert [message["content"] for message in conversation.messages[::2]] == ["What?", "And?"]
    assert conversation.messages[1]["content"] in tiny_llm.tokenizer.decode(turns)


@pytest.mark.parametrize("far_context", ["opened", "condensed"])
def test_older_turns_become_chunks_that_are_read_once(
    tiny_llm: FocusLLM, far_context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of what was said is in a chunk behind the document's or in the local context, in order."""
    tiny_llm.model.focus_config = tiny_llm.config.replace(far_context=far_context)
    document, read = tiny_llm.read_text(TEXT), list[list[int]]()
    encode = tiny_llm.model.encode
    monkeypatch.setattr(tiny_llm.model, "encode", lambda ids, *rest: read.append(list(ids)) or encode(ids, *rest))
    conversation, step = tiny_llm.conversation(document), turn_length(tiny_llm.config)
    for number in range(6):
        messages = [*conversation.messages, {"role": "user", "content": f"Nr. {number}?"}]
        conversation.ask(f"Nr. {number}?", max_new_tokens=5)
    _, turns, _ = frame_conversation(tiny_llm.tokenizer, messages)
    assert len(read) >= 2
    assert all(len(piece) == step for piece in read)
    far = [token for piece in read for token in piece]
    assert far == turns[: len(far)]
    assert len(turns) - len(far) <= tiny_llm.config.local_length


def test_the_chunks_of_turns_stand_behind_the_documents(tiny_llm: FocusLLM) -> None:
    """A question in a document's words opens the document, whatever was said."""
    tiny_llm.model.focus_config = tiny_llm.config.replace(far_context="opened", chunk_overlap=0)
    said = [*SAID] * 8
    conversation = tiny_llm.conversation(tiny_llm.read_text(TEXT, name="story"), said)
    seen = list[list[ChunkBlock]]()
    model = tiny_llm.model
    generate = model.generate
    model.generate = lambda *a, cache, **k: (seen.append(cache.blocks), generate(*a, cache=cache, **k))[1]  # type: ignore
    answer = conversation.ask("Thing number 77?", max_new_tokens=4)
    _, turns, _ = frame_conversation(tiny_llm.tokenizer, [*said, {"role": "user", "content": "Thing number 77?"}])
    ids, step = tokens(seen[0]), turn_length(tiny_llm.config)
    num_far = len(ids) - len(conversation.documents[0].token_ids)
    assert num_far > 0
    assert num_far % step == 0
    assert ids == [*conversation.documents[0].token_ids, *turns[:num_far]]
    assert {citation.document for citation in answer.citations} == {"story"}


def test_a_conversation_goes_on_from_its_file(tiny_llm: FocusLLM, tmp_path: Path) -> None:
    document, path = tiny_llm.read_text(TEXT), tmp_path / "talk.json"
    conversation = tiny_llm.conversation(document)
    conversation.ask("Who?", max_new_tokens=5)
    conversation.save(path)
    again = tiny_llm.conversation(document, load_messages(path))
    assert again.messages == conversation.messages
    assert again.ask("And?", max_new_tokens=5).text == conversation.ask("And?", max_new_tokens=5).text
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_a_question_that_fails_leaves_the_conversation_as_it_was(tiny_llm: FocusLLM) -> None:
    conversation = tiny_llm.conversation(tiny_llm.read_text(TEXT), SAID)
    with pytest.raises(DocumentError, match=r"beside \d+ of what was said before; ask a shorter one"):
        conversation.ask("o" * tiny_llm.config.local_length)
    with pytest.raises(DocumentError, match="the question is empty"):
        conversation.ask(" ")
    assert conversation.messages == SAID


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "it is not JSON"),
        ("[]", "no conversation of this version"),
        ('{"focusllm_conversation": 2, "messages": []}', "no conversation of this version"),
        (json.dumps({"focusllm_conversation": 1, "messages": SAID[1:]}), "message 1 .* is not what the user said"),
        (json.dumps({"focusllm_conversation": 1, "messages": SAID[:1]}), "ends with a question"),
        (json.dumps({"focusllm_conversation": 1, "messages": "ab"}), "message 1"),
        (json.dumps({"focusllm_conversation": 1}), "message 1"),
        (json.dumps({"focusllm_conversation": 1, "messages": [SAID[0], {"role": "assistant"}]}), "message 2"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_messages(path)
    with pytest.raises(ConfigError, match=r"other\.json cannot be read \(No such file"):
        load_messages(tmp_path / "other.json")


def test_typed_questions_are_a_conversation(
    focusllm: Focusllm, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of -q are, in a file; others stand alone."""
    book, talk = tmp_path / "book.txt", tmp_path / "talk.json"
    book.write_text(TEXT)
    asked = list[list[str]]()
    decoder = Conversation.decoder

    def counted(self: Conversation, question: str, **generate: Any) -> Any:
        asked.append([message["content"] for message in self.messages[::2]] + [question])
        return decoder(self, question, **generate)

    monkeypatch.setattr(Conversation, "decoder", counted)

    def run(*arguments: str, typed: str = "") -> list[list[str]]:
        asked.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        status, _, told = focusllm("ask", book, "--model", model_folder, "--max-new-tokens", "3", *arguments)
        assert not status, told
        return list(asked)

    assert run(typed="Who?\nAnd?\n\n") == [["Who?"], ["Who?", "And?"]]
    assert run("--alone", typed="Who?\nAnd?\n\n") == [["Who?"], ["And?"]]
    assert run("-q", "Who?", "-q", "And?") == [["Who?"], ["And?"]]
    assert run("-q", "Who?", "--conversation", str(talk)) == [["Who?"]]
    assert run("-q", "And?", "--conversation", str(talk)) == [["Who?", "And?"]]
    assert json.loads(talk.read_text())["documents"] == ["book.txt"]
    status, _, told = focusllm("ask", book, "--model", model_folder, "--alone", "--conversation", talk)
    assert status
    assert "contradict each other" in told


def test_a_short_document_is_far_when_turns_are(tiny_llm: FocusLLM) -> None:
    """So that nothing of it stands behind what was said, and the start is there once."""
    tiny_llm.model.focus_config = tiny_llm.config.replace(far_context="opened", chunk_overlap=0)
    document = tiny_llm.read_text("A boat.", name="note")
    for count in range(1, 9):
        said = [*SAID] * count
        messages = [*said, {"role": "user", "content": "Boat?"}]
        _, turns, _ = frame_conversation(tiny_llm.tokenizer, messages)
        far = list[list[int]]()

        def read(token_ids: list[int], start_ids: list[int], far: list[list[int]] = far) -> list[ChunkBlock]:
            far.append(token_ids)
            return tiny_llm.model.encode(token_ids, start_ids=start_ids)

        asked = about([document], tiny_llm.tokenizer, tiny_llm.config, messages, read)
        if far:
            assert asked.input_ids == turns[sum(map(len, far)) :]
            assert tokens(asked.blocks) == [*document.token_ids, *(token for piece in far for token in piece)]
        else:
            assert asked.input_ids[-len(turns) :] == turns
    assert far


def test_threads_that_tokenize_documents_leave_the_template_alone() -> None:
    """How a text is split is kept in the tokenizer while it works: one at a time, or `<s>` becomes three tokens."""
    tokenizer = byte_tokenizer()
    wanted, is_done = frame_ids(tokenizer), threading.Event()

    def read() -> None:
        while not is_done.is_set():
            encode_ids(tokenizer, "<s>a text</s>")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    found = [frame_ids(tokenizer) for _ in range(1000)]
    is_done.set()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 1000
