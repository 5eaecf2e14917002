"""OpenAI's /v1/responses, spoken by its own clients to a real server."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from focusllm import Library
from focusllm.serving.api_errors import ApiError
from focusllm.serving.keys import Keys

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from focusllm.serving.response_store import ResponseStore  # noqa: E402
from focusllm.serving.responses_schema import Item  # noqa: E402
from test_messages_api import talkative  # noqa: E402
from test_server import Running, clients_end, running, user  # noqa: E402, F401

TEXT = "Some years ago I went to sea. A whale is not a fish! Call me Ishmael? "
DRAWN = {"temperature": 1.0, "extra_body": {"seed": 5}}
NODE_MODULES = os.environ.get("OPENAI_NODE_MODULES", "")
"""A folder `node_modules` with the npm package `openai`."""


OTHER = "Nobody was there. Quite alone. "


@dataclass
class Kept:
    """What was uploaded: a file, and one in a vector store."""

    file: str
    searched: str
    store: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    llm = talkative()
    with running(library=Library(tmp_path_factory.mktemp("files") / "library", llm), llm=llm) as found:
        yield found


@pytest.fixture(scope="module")
def kept(served: Running) -> Kept:
    client = served.client()
    names = [
        client.files.create(file=(f"{name}.txt", text.encode()), purpose="assistants").id
        for name, text in (("book", TEXT), ("other", OTHER))
    ]
    store = client.vector_stores.create(name="some")
    client.vector_stores.files.create_and_poll(names[1], vector_store_id=store.id, poll_interval_ms=50)
    return Kept(*names, store.id)


def ask(served: Running, given: Any, **more: Any) -> Any:
    how = {"model": "tiny", "input": given, "max_output_tokens": 30, **DRAWN, **more}
    with served.client() as client:
        return client.responses.create(**how)


def chat(served: Running, messages: list[dict[str, Any]], count: int = 30) -> str:
    with served.client() as client:
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=count, **DRAWN)
    return answer.choices[0].message.content


def test_a_response(served: Running) -> None:
    found = ask(served, "Hi", instructions="Be brief.", metadata={"a": "b"})
    system = {"role": "system", "content": "Be brief."}
    assert found.output_text == chat(served, [system, *user("Hi")])
    assert (found.object, found.status, found.incomplete_details.reason) == (
        *("response", "incomplete"),
        "max_output_tokens",
    )
    assert (found.instructions, found.metadata, found.error) == ("Be brief.", {"a": "b"}, None)
    usage = found.usage
    assert (usage.output_tokens, usage.total_tokens) == (30, usage.input_tokens + 30)
    assert (
        usage.input_tokens_details.cached_tokens + usage.input_tokens_details.cache_write_tokens <= usage.input_tokens
    )
    parts = [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]
    items = [{"role": "developer", "content": "Be brief."}, {"type": "message", "role": "user", "content": parts}]
    assert ask(served, items).output_text == found.output_text


def test_a_conversation_goes_on_by_an_id(served: Running) -> None:
    client = served.client()
    first = ask(served, "Hi", instructions="Be brief.")
    second = ask(served, "And?", previous_response_id=first.id)
    turns = [*user("Hi"), {"role": "assistant", "content": first.output_text}, *user("And?")]
    assert second.output_text == chat(served, turns)
    assert second.previous_response_id == first.id
    same = ask(served, [*user("Hi"), *(item.model_dump() for item in first.output), *user("And?")])
    assert same.output_text == second.output_text
    client.responses.delete(first.id)
    third = ask(served, "Well?", previous_response_id=second.id)
    turns += [{"role": "assistant", "content": second.output_text}, *user("Well?")]
    assert third.output_text == chat(served, turns)
    with pytest.raises(openai.NotFoundError, match="not found") as gone:
        ask(served, "And?", previous_response_id=first.id)
    assert (gone.value.param, gone.value.code) == ("previous_response_id", "previous_response_not_found")


def test_responses_can_be_looked_up(served: Running) -> None:
    client = served.client()
    found = ask(served, [*user("One"), {"role": "assistant", "content": "Two"}, *user("Three")])
    assert client.responses.retrieve(found.id).model_dump() == found.model_dump()
    items = list(client.responses.input_items.list(found.id, limit=2))  # two pages
    assert [item.content[0].text for item in items] == ["Three", "Two", "One"]
    ordered = client.responses.input_items.list(found.id, order="asc")
    assert [item.role for item in ordered] == ["user", "assistant", "user"]
    client.responses.delete(found.id)
    unkept = ask(served, "Hi", store=False)
    for name in (found.id, unkept.id, "resp_x"):
        for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(name)


def test_a_stream(served: Running) -> None:
    with served.client().responses.stream(model="tiny", input="Hi", max_output_tokens=30, **DRAWN) as stream:
        events = list(stream)
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert len(kinds) > 20
    whole = ask(served, "Hi")
    assert final.output_text == whole.output_text == "".join(event.delta for event in events[4:-4])
    assert final.usage.output_tokens == 30
    assert served.client().responses.retrieve(final.id).output_text == final.output_text
    raw = list(served.client().responses.create(model="tiny", input="Hi", max_output_tokens=30, stream=True, **DRAWN))
    assert [event.type for event in raw] == [event.type for event in events]


def test_an_answer_that_ends_by_itself_is_complete() -> None:
    llm = talkative()
    llm.model.generation_config.suppress_tokens.remove(llm.model.generation_config.eos_token_id)
    with running(llm=llm) as found, found.client() as client:
        whole = client.responses.create(model="tiny", input="Hi", **DRAWN)
        assert (whole.status, whole.incomplete_details) == ("completed", None)
        assert whole.usage.output_tokens < 1024
        with client.responses.stream(model="tiny", input="Hi", **DRAWN) as stream:
            assert stream.get_final_response().output_text == whole.output_text


def test_files_are_asked_and_cited(served: Running, kept: Kept) -> None:
    """By their bytes, by their id, and by a search in a vector store."""
    data = base64.b64encode(TEXT.encode()).decode()
    sent = {"type": "input_file", "filename": "book.txt", "file_data": data}
    question = {"type": "input_text", "text": "Was a whale alone?"}
    found = ask(served, [{"role": "user", "content": [sent, question]}])
    told = served.client().chat.completions.create(
        model="tiny",
        messages=user("Was a whale alone?"),
        max_tokens=30,
        temperature=1,
        extra_body={"seed": 5, "documents": [{"title": "book.txt", "text": TEXT}]},
    )
    message = told.choices[0].message
    assert found.output_text == message.content
    (part,) = found.output[0].content
    assert len(part.annotations) == len(message.sentences) > 1
    for annotation, sentence in zip(part.annotations, message.sentences, strict=True):
        assert (annotation.type, annotation.file_id, annotation.filename) == ("file_citation", *["book.txt"] * 2)
        assert annotation.index == sentence["end"]
        start, end = annotation.passage["start"], annotation.passage["end"]
        assert annotation.passage["text"] == TEXT[start:end] == sentence["citations"][0]["text"]
    address = {**sent, "file_data": f"data:text/plain;base64,{data}"}
    assert ask(served, [{"role": "user", "content": [address, question]}]).output_text == found.output_text
    by_id = ask(served, [{"role": "user", "content": [{"type": "input_file", "file_id": kept.file}, question]}])
    names = {(annotation.file_id, annotation.filename) for annotation in by_id.output[0].content[0].annotations}
    assert names == {(kept.file, "book.txt")}
    again = ask(served, "And the sea?", previous_response_id=by_id.id)
    assert again.output[0].content[0].annotations  # the file is asked again
    assert again.usage.input_tokens > len(TEXT)


def test_a_search_in_vector_stores(served: Running, kept: Kept) -> None:
    how: dict[str, Any] = {"tools": [{"type": "file_search", "vector_store_ids": [kept.store], "max_num_results": 1}]}
    search, message = ask(served, "Who was there?", **how, include=["file_search_call.results"]).output
    assert (search.type, search.status, search.queries) == ("file_search_call", "completed", ["Who was there?"])
    (result,) = search.results
    assert (result.file_id, result.filename) == (kept.searched, "other.txt")
    assert 0 < result.score <= 1
    span = slice(int(result.attributes["start"]), int(result.attributes["end"]))
    assert result.text == OTHER[span]
    assert message.content[0].annotations
    unasked, same = ask(served, "Who was there?", **how).output
    assert unasked.results is None
    assert same.content == message.content
    with served.client().responses.stream(
        model="tiny", input="Who was there?", max_output_tokens=30, **DRAWN, **how
    ) as stream:
        events = list(stream)
    kinds, final = [event.type.removeprefix("response.") for event in events], events[-1].response
    assert [kind for kind in kinds if "search" in kind] == [
        f"file_search_call.{state}" for state in ("in_progress", "searching", "completed")
    ]
    assert kinds.index("file_search_call.completed") < kinds.index("output_text.delta")
    assert kinds.count("output_text.annotation.added") == len(message.content[0].annotations)
    assert kinds.count("output_item.done") == 2
    assert final.output[1].content[0].text == message.content[0].text
    went_on = ask(served, [*user("Hi"), search.model_dump(), message.model_dump(), *user("And?")])
    assert went_on.output_text


def test_progress_of_a_long_read(served: Running) -> None:
    body = {"model": "tiny", "input": TEXT[::-1] * 8, "max_output_tokens": 2, "stream": True, "return_progress": True}
    raw = served.send("POST", "/v1/responses", json.dumps(body), {"Content-Type": "application/json"})[2].decode()
    told = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
    progress = [event["prompt_progress"] for event in told if "prompt_progress" in event]
    assert [one["processed"] for one in progress] == sorted({one["processed"] for one in progress})
    assert progress[-1]["processed"] == progress[0]["total"] > 400


GOOD: dict[str, Any] = {"model": "tiny", "input": "Hi", "max_output_tokens": 1}


def of_parts(*parts: Any) -> dict[str, Any]:
    return {**GOOD, "input": [{"role": "user", "content": list(parts)}]}


def a_file(**fields: Any) -> dict[str, Any]:
    return of_parts({"type": "input_file", **fields})


BAD: list[tuple[Any, int, str, str | None]] = [
    (b"{", 400, "not valid JSON", None),
    (b'{"model": "\xff"}', 400, "body", None),
    (b"[" * 100_000, 400, "", None),
    ({}, 400, "Field required", "model"),
    ({**GOOD, "model": "other"}, 404, "'other' does not exist", "model"),
    ({**GOOD, "input": []}, 400, "at least 1", "input"),
    ({**GOOD, "input": 5}, 400, "valid", "input"),
    ({**GOOD, "input": "a \ud800"}, 400, "not Unicode", "input"),
    ({**GOOD, "input": [{"role": "king", "content": "Hi"}]}, 400, "'user'", "input.0.role"),
    ({**GOOD, "input": [{"role": "user"}]}, 400, "is missing", "input"),
    ({**GOOD, "input": [{"type": "function_call_output"}]}, 400, "'function_call_output' are not supported", "input"),
    ({**GOOD, "input": [{"type": {}}]}, 400, "", None),
    ({**GOOD, "input": [{"type": "file_search_call"}]}, 400, "input has no message", "input"),
    (of_parts({"type": "input_image", "image_url": "x"}), 400, "'input_image' are not supported", "input"),
    (a_file(file_url="http://x"), 400, "fetches nothing", "input"),
    (a_file(), 400, "one of them", "input"),
    (a_file(file_id="file-1", file_data="eA=="), 400, "one of them", "input"),
    (a_file(file_id="file-9"), 404, "There is no file 'file-9'", "file_id"),
    (a_file(file_data="%%%"), 400, "not base64", "input"),
    (a_file(file_data="data:text/plain,abc"), 400, "not base64", "input"),
    (a_file(file_data="eA==", filename="x.pdf"), 400, "not a PDF", "input"),
    (a_file(file_data=base64.b64encode(b"\0\1\2\xff" * 99).decode(), filename="x.txt"), 400, "x.txt", "input"),
    (a_file(file_data="IA=="), 400, "no text in it", "input"),
    ({**GOOD, "previous_response_id": "resp_x"}, 404, "not found", "previous_response_id"),
    ({**GOOD, "max_output_tokens": 0}, 400, "greater than or equal to 1", "max_output_tokens"),
    ({**GOOD, "max_output_tokens": 10**30}, 400, "at most 4096", "max_output_tokens"),
    ({**GOOD, "temperature": 3}, 400, "less than or equal to 2", "temperature"),
    ({**GOOD, "include": ["reasoning.encrypted_content"]}, 400, "include has", "include"),
    ({**GOOD, "tools": [{"type": "web_search"}]}, 400, "'web_search' are not supported", "tools"),
    (
        {**GOOD, "tools": [{"type": "file_search", "vector_store_ids": []}]},
        400,
        "at least 1",
        "tools.0.vector_store_ids",
    ),
    (
        {**GOOD, "tools": [{"type": "file_search", "vector_store_ids": ["vs-9"]}]},
        404,
        "There is no vector store",
        "vector_store_id",
    ),
    ({**GOOD, "tool_choice": "required"}, 400, "tool_choice is not supported", "tool_choice"),
    ({**GOOD, "background": True}, 400, "background is not supported", "background"),
    ({**GOOD, "conversation": "c"}, 400, "conversation is not supported", "conversation"),
    ({**GOOD, "text": {"format": {"type": "json_object"}}}, 400, "text is not supported", "text"),
    ({**GOOD, "metadata": {"a": 1}}, 400, "valid string", "metadata.a"),
    ({**GOOD, "colour": "red"}, 400, "Unrecognized", "colour"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_requests(served: Running, number: int) -> None:
    body, status, words, param = BAD[number]
    found, answer = served.post("/v1/responses", body)
    error = answer["error"]
    assert found == status
    assert words in error["message"]
    assert "\n" not in error["message"]
    if param is not None:
        assert error["param"].startswith(param)


def test_each_key_has_its_own(tmp_path: Path) -> None:
    keys = {name: Keys.create(tmp_path / "keys", name) for name in ("ann", "ben")}
    with running(Keys.load(tmp_path / "keys")) as locked:
        ann, ben = (locked.client(key) for key in keys.values())
        found = ann.responses.create(**GOOD)
        assert ann.responses.retrieve(found.id).id == found.id
        for call in (ben.responses.retrieve, ben.responses.delete, ben.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(found.id)
        with pytest.raises(openai.NotFoundError):
            ben.responses.create(**GOOD, previous_response_id=found.id)
        with pytest.raises(openai.BadRequestError, match="keeps no files"):
            ann.responses.create(**a_file(file_id="file-1"))


def test_a_server_that_stops_says_so_in_the_stream() -> None:
    with running() as found:
        stream = found.client().responses.create(**{**GOOD, "max_output_tokens": 4096}, stream=True)
        next(iter(stream))
    with pytest.raises(openai.APIError, match="stopped before this was complete"):
        list(stream)


def test_what_is_kept_is_bounded() -> None:
    """By number and by bytes; what was asked for last stays."""

    def response(name: str, text: str = "x") -> dict[str, Any]:
        content = [{"type": "output_text", "text": text}]
        return {"id": name, "output": [{"type": "message", "role": "assistant", "content": content}]}

    few = ResponseStore(most_responses=2)
    for name in "abc":
        few.add("", response(name), [], [])
        few.get("", name)
        if name != "a":
            few.get("", "b")
    with pytest.raises(ApiError):
        few.get("", "a")
    few.add("", response("d"), [], [])
    assert few.get("", "b").body["id"] == "b"
    with pytest.raises(ApiError):
        few.get("", "c")
    small = ResponseStore(most_bytes=1500)
    small.add("", response("a", "x" * 900), [], [])
    small.delete("", "a")
    small.add("", response("b", "x" * 900), [], [])
    assert small.get("", "b")
    small.add("", response("c", "x" * 900), [], [])
    with pytest.raises(ApiError):
        small.get("", "b")
    assert small.get("", "c").conversation[0].turn == {"role": "assistant", "content": "x" * 900}


SCRIPT = """
import { createRequire } from "node:module";
const OpenAI = createRequire(process.argv[2] + "/")("openai").OpenAI;
const client = new OpenAI({ baseURL: process.argv[3], apiKey: "none", maxRetries: 0 });
const ask = { model: "tiny", input: "Hi", max_output_tokens: 30, temperature: 0 };
const whole = await client.responses.create(ask);
let text = "";
for await (const event of await client.responses.create({ ...ask, stream: true }))
  if (event.type === "response.output_text.delta") text += event.delta;
const messages = [{ role: "user", content: "Hi" }];
const chat = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 30 });
let refused = 0;
try { await client.responses.retrieve("resp_x"); } catch (error) { refused = error.status; }
console.log(JSON.stringify({ whole: whole.output_text, text, chat: chat.choices[0].message.content, refused }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
@pytest.mark.skipif(not NODE_MODULES, reason="OPENAI_NODE_MODULES names no folder with the npm package openai")
def test_the_npm_client(served: Running, tmp_path: Path) -> None:
    script = tmp_path / "ask.mjs"
    script.write_text(SCRIPT)
    address = f"http://127.0.0.1:{served.port}/v1"
    command = ["node", str(script), NODE_MODULES, address]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["whole"] == told["text"] == told["chat"] != ""
    assert told["refused"] == 404


def test_what_is_held_counts_however_often_it_was_said() -> None:
    """A conversation that goes on holds all of what was said, whatever became of the responses before."""
    store = ResponseStore(most_bytes=10_000)
    item = Item(role="user", content="a" * 4000)
    for number in range(4):
        store.add("", {"id": f"resp_{number}", "output": []}, [], [item] * (number + 1))
    with pytest.raises(ApiError):
        store.get("", "resp_1")
    with pytest.raises(ApiError):
        store.get("", "resp_3")  # more than all that is kept


def test_no_tool_is_used_where_none_is_wanted(served: Running) -> None:
    tools = [{"type": "file_search", "vector_store_ids": ["vs_none"]}]
    found = ask(served, "Hi", tools=tools, tool_choice="none")
    assert [item.type for item in found.output] == ["message"]
