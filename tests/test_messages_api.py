"""Anthropic's dialect, spoken by its own Python client to a real server, and vLLM's way to tokens."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfWriter

from conftest import byte_tokenizer
from focusllm import FocusLLM
from focusllm.serving.keys import Keys

pytest.importorskip("fastapi")
pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
from test_readers import pdf  # noqa: E402
from test_server import Running, clients_end, running, tiny, user  # noqa: E402, F401

TEXT = "Some years ago I went to sea. A whale is not a fish! Call me Ishmael? " * 6
OLD, NEW = "2023-06-01", "2026-10-21"


def talkative() -> FocusLLM:
    """A model that writes short sentences."""
    llm = tiny()
    letters = byte_tokenizer().convert_tokens_to_ids([*"AB.!", "Ġ"])
    llm.model.generation_config.suppress_tokens = [token for token in range(260) if token not in letters]
    return llm


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(llm=talkative()) as found:
        yield found


def client_of(served: Running, key: str = "none", version: str = OLD) -> Any:
    made = anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{served.port}",
        api_key=key,
        max_retries=0,
        timeout=120,
        default_headers={"anthropic-version": version},
    )
    served.clients.append(made)
    return made


def document(source: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "document", "source": source, "citations": {"enabled": True}, **more}


def plain(text: str = TEXT) -> dict[str, Any]:
    return {"type": "text", "media_type": "text/plain", "data": text}


def about(*documents: dict[str, Any], question: str = "Who?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*documents, {"type": "text", "text": question}]}]


DRAWN = {"temperature": 1.0, "seed": 5}


def ask(served: Running, messages: list[dict[str, Any]], **more: Any) -> Any:
    extra = {**DRAWN, **more.pop("extra_body", {})}
    with client_of(served) as client:
        how = {"model": "tiny", "max_tokens": 40, "messages": messages, **more}
        return client.messages.create(**how, extra_body=extra)


def streamed(served: Running, messages: list[dict[str, Any]], **more: Any) -> tuple[list[Any], Any]:
    how = {"model": "tiny", "max_tokens": 40, "messages": messages, **more}
    with client_of(served) as client, client.messages.stream(**how, extra_body=DRAWN) as stream:
        events = [event for event in stream if event.type not in ("text", "citation")]  # the client's own
        return events, stream.get_final_message()


def blocks_of(message: Any) -> list[dict[str, Any]]:
    return [{name: block.model_dump()[name] for name in ("type", "text", "citations")} for block in message.content]


def test_a_message(served: Running) -> None:
    """Plain text is one block; Claude's newest client and the one before get the same."""
    found = client_of(served, version=NEW).messages.create(model="tiny", max_tokens=9, messages=user("Hi"))
    assert (found.type, found.role, found.model, found.stop_reason) == ("message", "assistant", "tiny", "max_tokens")
    (block,) = found.content
    told = served.client().chat.completions.create(model="tiny", messages=user("Hi"), max_tokens=9)
    assert (block.type, block.text, block.citations) == ("text", told.choices[0].message.content, None)
    assert (found.usage.input_tokens, found.usage.output_tokens) == (told.usage.prompt_tokens, 9)
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    turns = [*user("Hi"), {"role": "assistant", "content": [block.model_dump()]}, *user("And?"), *user("Well?")]
    again = client_of(served).messages.create(model="tiny", max_tokens=9, messages=turns, system=system)
    chat = [
        {"role": "system", "content": "Be brief."},
        *user("Hi"),
        {"role": "assistant", "content": block.text},
        *user("And?\n\nWell?"),
    ]
    same = served.client().chat.completions.create(model="tiny", messages=chat, max_tokens=9)
    assert again.content[0].text == same.choices[0].message.content


def test_stops_and_choosing(served: Running) -> None:
    (whole,) = ask(served, user("Hi")).content
    assert ask(served, user("Hi")).content[0].text == whole.text
    assert ask(served, user("Hi"), extra_body={"seed": 6}).content[0].text != whole.text
    likeliest = ask(served, user("Hi"), extra_body={"temperature": 0}).content[0].text
    assert ask(served, user("Hi"), extra_body={"top_k": 1}).content[0].text == likeliest
    assert ask(served, user("Hi"), extra_body={"top_p": 1e-6}).content[0].text == likeliest
    stop = whole.text[7:10]
    stopped = ask(served, user("Hi"), stop_sequences=["nowhere", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == whole.text[: whole.text.index(stop)]
    assert ask(served, user("Hi"), stop_sequences=[whole.text[0]]).content == []


def test_a_stream(served: Running) -> None:
    events, message = streamed(served, user("Hi"))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert len(kinds) > 20
    assert blocks_of(message) == blocks_of(ask(served, user("Hi")))
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 40)
    body = {"model": "tiny", "max_tokens": 2, "messages": user("Hi"), "stream": True}
    raw = served.send("POST", "/v1/messages", json.dumps(body), {"Content-Type": "application/json"})[2].decode()
    told = [event.split("\n") for event in raw.split("\n\n") if event]
    assert [name for name, _ in told][:2] == ["event: message_start", "event: ping"]
    assert all(json.loads(data.removeprefix("data: "))["type"] == name[7:] for name, data in told)


def test_citations_are_those_of_our_sentences(served: Running) -> None:
    """Each sentence a block, with its passages by characters; in a stream, whole, and as chat tells them."""
    texts = TEXT[:70], "Nobody was there. Quite alone. "  # no more sentences than are named
    messages = about(document(plain(texts[0]), title="Book"), document(plain(texts[1])), question="Was a whale alone?")
    found = ask(served, messages)
    told = served.client().chat.completions.create(
        model="tiny",
        messages=user("Was a whale alone?"),
        max_tokens=40,
        temperature=1,
        seed=5,
        extra_body={"documents": [{"title": "Book", "text": texts[0]}, {"text": texts[1]}]},
    )
    message = told.choices[0].message
    assert "".join(block.text for block in found.content) == message.content
    assert len(found.content) == len(message.sentences) > 2
    indexes = set()
    for block, sentence in zip(found.content, message.sentences, strict=True):
        assert block.text.strip() == message.content[sentence["start"] : sentence["end"]]
        assert len(block.citations) == len(sentence["citations"]) > 0
        for citation, known in zip(block.citations, sentence["citations"], strict=True):
            assert citation.type == "char_location"
            span = citation.start_char_index, citation.end_char_index
            assert (citation.document_index, *span) == (known["document_index"], known["start"], known["end"])
            text = messages[0]["content"][citation.document_index]["source"]["data"]
            assert citation.cited_text == text[slice(*span)] == known["text"]
            assert citation.document_title == ("Book" if citation.document_index == 0 else None)
            indexes.add(citation.document_index)
    assert 1 in indexes
    events, whole = streamed(served, messages)
    assert blocks_of(whole) == blocks_of(found)
    kinds = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert kinds.index("citations_delta") < len(kinds) - 1 - kinds[::-1].index("text_delta")  # not all at the end
    assert whole.usage.cache_read_input_tokens > 0.9 * len(texts[0])
    (without,) = ask(served, about({**document(plain()), "citations": {"enabled": False}})).content
    assert without.citations is None


def test_pages_and_blocks_are_cited_as_such(served: Running) -> None:
    pages_of, data = PdfWriter(), io.BytesIO()
    for text in ("A whale swims.", None, "A fish swims, too."):
        pages_of.append(io.BytesIO(pdf(text)))
    pages_of.write(data)
    source = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(data.getvalue()).decode()}
    notes = document(source, title="Notes")
    texts = [{"type": "text", "text": f"Block {number} says so."} for number in range(3)]
    blocks = document({"type": "content", "content": texts}, context="What they say:")
    pages, cut = (
        [citation for block in ask(served, about(one)).content for citation in block.citations]
        for one in (notes, blocks)
    )
    assert {citation.type for citation in pages} == {"page_location"}
    for citation in pages:
        page = 1 if "whale" in citation.cited_text else 3
        assert (citation.start_page_number, citation.end_page_number) == (page, page + 1)
    assert {citation.type for citation in cut} == {"content_block_location"}
    for citation in cut:
        spanned = "\n\n".join(block["text"] for block in texts[citation.start_block_index : citation.end_block_index])
        assert citation.cited_text in spanned


def test_tokens_are_counted(served: Running) -> None:
    client = client_of(served)
    for messages in (user("Hi"), about(document(plain(), context="A book."))):
        counted = client.messages.count_tokens(model="tiny", messages=messages, system="Be brief.")
        usage = client.messages.create(model="tiny", max_tokens=1, messages=messages, system="Be brief.").usage
        read = usage.cache_read_input_tokens + usage.cache_creation_input_tokens
        assert counted.input_tokens == usage.input_tokens + read
    assert counted.input_tokens > len(TEXT)


GOOD: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "messages": user("Hi")}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "not valid JSON"),
    (b'{"model": "\xff"}', 400, "body"),
    (b"[" * 100_000, 400, ""),
    ([], 400, "dictionary"),
    ({}, 400, "model: Field required"),
    ({**GOOD, "model": "other"}, 404, "'other' does not exist"),
    ({"model": "tiny", "messages": user("Hi")}, 400, "max_tokens: Field required"),
    ({**GOOD, "max_tokens": 0}, 400, "greater than or equal to 1"),
    ({**GOOD, "max_tokens": 10**30}, 400, "at most 4096"),
    ({**GOOD, "max_tokens": "5"}, 400, "valid integer"),
    ({**GOOD, "messages": []}, 400, "at least 1"),
    ({**GOOD, "messages": [{"role": "king", "content": "Hi"}]}, 400, "'user'"),
    ({**GOOD, "messages": user("a \ud800")}, 400, "not Unicode text"),
    ({**GOOD, "messages": [*user("Hi"), {"role": "assistant", "content": "I"}]}, 400, "must be the user's"),
    ({**GOOD, "messages": about(IMAGE)}, 400, "'image' are not supported"),
    ({**GOOD, "messages": about({"type": "tool_result"})}, 400, "'tool_result' are not supported"),
    ({**GOOD, "messages": about({"type": 5})}, 400, "messages.0.content"),
    ({**GOOD, "messages": about(document({"type": "url", "url": "http://x/y"}))}, 400, "fetches nothing"),
    ({**GOOD, "messages": about(document({"type": "file", "file_id": "x"}))}, 400, "keeps no files"),
    ({**GOOD, "messages": about(document(plain(" \n")))}, 400, "no text in it"),
    ({**GOOD, "messages": about(document(plain("a \udc00")))}, 400, "not Unicode"),
    ({**GOOD, "messages": about(document({"type": "content", "content": []}))}, 400, "at least 1"),
    ({**GOOD, "messages": about(document({**plain(), "type": "base64"}))}, 400, "application/pdf"),
    ({**GOOD, "messages": [{"role": "assistant", "content": [document(plain())]}, *user("?")]}, 400, "of the user"),
    (
        {**GOOD, "messages": about(document(plain()), document(plain(), citations={"enabled": False}))},
        *(400, "for all or none"),
    ),
    ({**GOOD, "tools": [{"name": "x"}]}, 400, "tools is not supported"),
    ({**GOOD, "thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "thinking is not supported"),
    ({**GOOD, "mcp_servers": [{}]}, 400, "mcp_servers is not supported"),
    ({**GOOD, "temperature": 1.5}, 400, "less than or equal to 1"),
    ({**GOOD, "temperature": float("inf")}, 400, "finite"),
    ({**GOOD, "stop_sequences": [" "]}, 400, "more than white space"),
    ({**GOOD, "system": 5}, 400, "system"),
    ({**GOOD, "colour": "red"}, 400, "colour"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_requests(served: Running, number: int) -> None:
    body, status, words = BAD[number]
    found, answer = served.post("/v1/messages", body)
    assert (found, answer["type"]) == (status, "error")
    assert answer["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert answer["request_id"].startswith("req_")


@pytest.mark.parametrize("data", ["%%%", base64.b64encode(b"hello").decode(), base64.b64encode(b"%PDF-1.7 x").decode()])
def test_bad_pdfs(served: Running, data: str) -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": data}
    status, answer = served.post("/v1/messages", {**GOOD, "messages": about(document(source))})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "PDF" in answer["error"]["message"] or "base64" in answer["error"]["message"]


def test_versions(served: Running) -> None:
    client = client_of(served, version=NEW)
    for name in ("temperature", "top_p", "top_k"):
        with pytest.raises(anthropic.BadRequestError, match=f"{name} is not in version"):
            client.messages.create(**GOOD, extra_body={name: 1})
    cited = [{"role": "user", "content": [{"type": "text", "text": "Hi", "citations": [{"type": "char_location"}]}]}]
    with pytest.raises(anthropic.BadRequestError, match="not in the user's"):
        client.messages.create(**{**GOOD, "messages": cited})
    assert client_of(served).messages.create(**{**GOOD, "messages": cited}).content
    with pytest.raises(anthropic.BadRequestError, match="'1999-01-01' is not supported"):
        client_of(served, version="1999-01-01").messages.create(**GOOD)


def test_the_gate_speaks_the_dialect(tmp_path: Path) -> None:
    key = Keys.create(tmp_path / "keys", "ann")
    with running(Keys.load(tmp_path / "keys"), max_body=2000, max_running=1, max_waiting=1) as locked:
        with pytest.raises(anthropic.AuthenticationError, match="not known here") as refused:
            client_of(locked).messages.create(**GOOD)
        assert refused.value.body["error"]["type"] == "authentication_error"
        assert refused.value.request_id == refused.value.body["request_id"]
        for header in ({"X-Api-Key": key}, {"Authorization": f"Bearer {key}"}):
            headers = {"Content-Type": "application/json", **header}
            assert locked.send("POST", "/v1/messages", json.dumps(GOOD), headers)[0] == 200
        client = client_of(locked, key)
        with pytest.raises(anthropic.APIStatusError) as large:
            client.messages.create(**{**GOOD, "messages": user("x" * 5000)})
        assert (large.value.status_code, large.value.body["error"]["type"]) == (413, "request_too_large")
        streams = [client.messages.create(**{**GOOD, "max_tokens": 4096}, stream=True)]
        next(iter(streams[0]))
        streams.append(client.messages.create(**{**GOOD, "max_tokens": 4096}, stream=True))
        with pytest.raises(anthropic.RateLimitError, match="1 requests are waiting") as busy:
            client.messages.create(**GOOD)
        assert busy.value.body["error"]["type"] == "rate_limit_error"
        assert int(busy.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        status, _, body = locked.send("GET", "/v1/messages", headers={"X-Api-Key": key})
        assert (status, json.loads(body)["type"]) == (405, "error")


def test_a_server_that_stops_says_so_in_the_stream() -> None:
    with running() as found:
        stream = client_of(found).messages.create(**{**GOOD, "max_tokens": 4096}, stream=True)
        next(iter(stream))
    with pytest.raises(anthropic.APIError, match="stopped before this was complete"):
        list(stream)


def test_tokens(served: Running) -> None:
    """As vLLM's server gives them, there and back."""
    tokenizer = byte_tokenizer()
    status, found = served.post("/tokenize", {"prompt": "Hé!", "return_token_strs": True})
    assert (status, found["tokens"]) == (200, tokenizer("Hé!").input_ids)
    assert (found["count"], found["max_model_len"], found["token_strs"][0]) == (4, 10**6, "H")
    assert served.post("/detokenize", {"model": "tiny", "tokens": found["tokens"]})[1] == {"prompt": "Hé!"}
    chat = served.post("/tokenize", {"messages": user("Hi</s>"), "add_generation_prompt": True})[1]
    usage = served.client().chat.completions.create(model="tiny", messages=user("Hi</s>"), max_tokens=1).usage
    assert chat["count"] == usage.prompt_tokens
    assert chat["token_strs"] is None
    assert served.post("/tokenize", {"prompt": ""})[1]["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", b"{", 400),
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": user("b")}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"prompt": "\ud800"}, 400),
        ("/tokenize", {"messages": user("b"), "add_generation_prompt": False}, 400),
        ("/detokenize", {"tokens": [260]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": "abc"}, 400),
        ("/detokenize", {"tokens": [10**30]}, 400),
    ],
)
def test_bad_tokens(served: Running, path: str, body: Any, status: int) -> None:
    found, answer = served.post(path, body)
    assert found == status
    assert answer["error"]["message"]
