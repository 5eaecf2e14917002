"""The server over HTTP, driven by the clients that the world uses: a real socket, tiny random models."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import SMALL, build, byte_tokenizer, with_candidates
from focusllm import ConfigError, FocusForCausalLM, FocusLLM, FocusState, Library
from focusllm.documents.sources import of_text
from focusllm.documents.text import encode_chat
from focusllm.serving.job import Prompt
from focusllm.serving.keys import Keys
from focusllm.serving.prompts import Prompts
from focusllm.serving.sampling import Sampling
from focusllm.serving.settings import ServerSettings
from focusllm.serving.worker import Worker

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from focusllm.serving.app import Server, create_app, listener, serve  # noqa: E402
from focusllm.serving.listening import Listening  # noqa: E402

UNREADABLE = [token for token, name in enumerate(byte_tokenizer().convert_ids_to_tokens(range(259))) if name > "~"]
LONG = "Some years ago I went to sea, and saw the watery part of the world. " * 10  # 680 tokens of 512 positions
SECRET = "the-word-nobody-may-log"


def tiny() -> FocusLLM:
    """A model that writes ASCII and never ends by itself."""
    model = FocusForCausalLM(
        with_candidates(build(max_position_embeddings=512)), SMALL.replace(local_length=64, far_context="opened")
    )
    settings = model.generation_config
    settings.suppress_tokens, settings.eos_token_id = [*range(3), *UNREADABLE, 259], 259
    return FocusLLM(model, byte_tokenizer(), "tiny")


@dataclass
class Running:
    port: int
    clients: ClassVar[list[Any]] = []
    """Those that were made."""

    def client(self, key: str = "none", **settings: Any) -> Any:
        how = {"max_retries": 0, "timeout": 120, **settings}
        self.clients.append(openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, **how))
        return self.clients[-1]

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.send("POST", path, raw, {"Content-Type": "application/json"})
        return status, json.loads(answer)


@contextmanager
def running(
    keys: Keys | None = None, library: Library | None = None, llm: FocusLLM | None = None, **limits: Any
) -> Iterator[Running]:
    settings = ServerSettings(**{"port": 0, "model_id": "tiny", "grace_seconds": 1, **limits})
    with listener(settings) as taken:
        ours = Server(create_app(llm or tiny(), settings, keys, library), settings)
        thread = threading.Thread(target=ours.run, kwargs={"sockets": [taken]})
        thread.start()
        while not ours.started:
            time.sleep(0.01)
        try:
            yield Running(taken.getsockname()[1])
        finally:
            ours.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(autouse=True, scope="module")
def clients_end() -> Iterator[None]:
    """Their sockets are closed when the module's tests are done, with those that servers that are gone have left."""
    yield
    for client in Running.clients:
        client.close()
    Running.clients.clear()


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def expected() -> Callable[..., str]:
    """What a conversation, or a text, is answered alone, by transformers' own loop."""
    llm = tiny()
    prompts = Prompts(llm.tokenizer, llm.model.settings, 260, 10**6)

    def of(content: str, count: int, is_chat: bool = True) -> str:
        text = f"<s>{content}</s><s>" if is_chat else content
        ids = llm.tokenizer(text, return_tensors="pt").input_ids
        state = FocusState()
        if is_chat:
            prompt = prompts.of_chat(user(content), {})
            state = FocusState(None, prompt.prompt_length, prompt.word_scores)
        made = llm.model.generate(ids, max_new_tokens=count, do_sample=False, cache=state)
        return str(llm.tokenizer.decode(made[0, ids.shape[1] :]))

    return of


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_models(served: Running) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "focusllm"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="other", messages=user("Hi"))
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_chat(served: Running, expected: Callable[..., str]) -> None:
    """A prompt beyond the positions, whole and in a stream."""
    client, wanted = served.client(), expected(LONG, 24)
    answer = client.chat.completions.create(model="tiny", messages=user(LONG), max_tokens=24)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", wanted, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (683, 24)
    assert answer.usage.total_tokens == 707
    parts = [{"type": "text", "text": LONG[:50]}, {"type": "text", "text": LONG[50:]}]
    with client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": parts}],
        max_completion_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted
    assert len(chunks) > 12
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 500
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_conversation_goes_on(served: Running) -> None:
    """What was read of it before is not read again."""
    client = served.client()
    messages = [{"role": "developer", "content": "Be brief."}, *user(LONG.upper())]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *user("And then? " * 8)]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    before, now = (answer.usage.prompt_tokens_details for answer in (first, second))
    assert before.cached_tokens == 0 < before.cache_write_tokens
    assert now.cached_tokens > 0.9 * before.cache_write_tokens
    assert now.cache_write_tokens < 150


def test_progress_of_a_long_read(served: Running) -> None:
    text = LONG[::-1]
    body = {"model": "tiny", "messages": user(text), "max_tokens": 2, "stream": True, "return_progress": True}
    *_, raw = served.send("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    lines = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    told = [json.loads(line)["prompt_progress"] for line in lines[:-1] if "prompt_progress" in line]
    done = [one["processed"] for one in told]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, told[0]["total"])
    assert len(done) > 10


def test_choosing_tokens(served: Running, expected: Callable[..., str]) -> None:
    client = served.client()

    def ask(**more: Any) -> list[str]:
        answer = client.chat.completions.create(model="tiny", messages=user(LONG), **{"max_tokens": 12, **more})
        return [choice.message.content for choice in answer.choices]

    likeliest = expected(LONG, 12)
    assert ask() == ask(temperature=0, n=2)[:1] == [likeliest]
    drawn = ask(temperature=1.5, seed=3, n=3)
    assert len(set(drawn)) == 3
    assert ask(temperature=1.5, seed=3, n=3) == drawn
    assert ask(temperature=1.5, top_p=1e-6, seed=3) == ask(temperature=2, extra_body={"top_k": 1}) == [likeliest]
    stop = likeliest[6:8]
    assert ask(stop=["nowhere", stop]) == [likeliest[: likeliest.index(stop)]]
    stopped = client.chat.completions.create(model="tiny", messages=user(LONG), max_tokens=12, stop=stop)
    assert stopped.choices[0].finish_reason == "stop"


def test_logprobs(served: Running, expected: Callable[..., str]) -> None:
    client = served.client()
    how: dict[str, Any] = {"model": "tiny", "messages": user(LONG), "max_tokens": 6, "logprobs": True}
    answer = client.chat.completions.create(**how, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == expected(LONG, 6)
    for token in content:
        assert token.logprob <= max(found.logprob for found in token.top_logprobs) < 0
        assert len(token.top_logprobs) == 3
        assert bytes(token.bytes).decode() == token.token
    pieces = list(client.chat.completions.create(**how, stream=True))
    streamed = [found for piece in pieces if piece.choices[0].logprobs for found in piece.choices[0].logprobs.content]
    assert [found.logprob for found in streamed] == pytest.approx([token.logprob for token in content], abs=1e-3)


def test_completions(served: Running, expected: Callable[..., str]) -> None:
    client = served.client()
    texts = [LONG, "Call me Ishmael."]
    wanted = [expected(text, 9, is_chat=False) for text in texts]
    answer = client.completions.create(model="tiny", prompt=texts, max_tokens=9, n=2, logprobs=1)
    assert [choice.text for choice in answer.choices] == [wanted[0], wanted[0], wanted[1], wanted[1]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 36
    assert answer.choices[2].logprobs.text_offset == list(range(9))
    ids = byte_tokenizer()(texts[1]).input_ids
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=9).choices[0].text == wanted[1]
    assert len(client.completions.create(model="tiny", prompt="x").choices[0].text) == 16
    pieces: dict[int, str] = {0: "", 1: ""}
    for chunk in client.completions.create(model="tiny", prompt=texts, max_tokens=9, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert list(pieces.values()) == wanted


def test_many_at_once_get_what_they_would_get_alone(served: Running, expected: Callable[..., str]) -> None:
    texts = [f"{number}: {LONG[: 80 * number + 20]}" for number in range(8)]
    client = served.client()

    def ask(number: int) -> str:
        stream = client.chat.completions.create(
            model="tiny", messages=user(texts[number]), max_tokens=10 + number, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(8)))
    assert found == [expected(text, 10 + number) for number, text in enumerate(texts)]


GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
BAD: list[tuple[Any, int, str, str | None]] = [
    (b"{", 400, "not valid JSON", None),
    (b'{"model": "\xff"}', 400, "body", None),
    (b"[" * 100_000, 400, "", None),
    ([], 400, "dictionary", None),
    ({}, 400, "Field required", "model"),
    ({**GOOD, "messages": []}, 400, "at least 1", "messages"),
    ({**GOOD, "messages": "Hi"}, 400, "valid list", "messages"),
    ({**GOOD, "messages": [{"role": "king", "content": "Hi"}]}, 400, "'system'", "messages.0.role"),
    ({**GOOD, "messages": [{"role": "tool", "content": "Hi"}]}, 400, "role 'tool' are not supported", "messages"),
    ({**GOOD, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'image_url'", "messages"),
    ({**GOOD, "messages": [{"role": "user", "content": "a \ud800"}]}, 400, "not Unicode text", "messages"),
    ({**GOOD, "stop": ["\udfff"]}, 400, "stop is not Unicode text: There is half of a character", "stop"),
    ({**GOOD, "model": "ti\ud800ny"}, 400, "model is not Unicode text", "model"),
    ({**GOOD, "x\ud800": 1}, 400, "not Unicode text", "x\\ud800"),
    ({**GOOD, "max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    ({**GOOD, "max_tokens": 10**30}, 400, "this server gives at most 4096", "max_tokens"),
    ({**GOOD, "max_tokens": "5"}, 400, "valid integer", "max_tokens"),
    ({**GOOD, "n": 100}, 400, "at most 8", "n"),
    ({**GOOD, "temperature": 3}, 400, "less than or equal to 2", "temperature"),
    ({**GOOD, "temperature": float("nan")}, 400, "finite", "temperature"),
    ({**GOOD, "top_p": 0}, 400, "greater than 0", "top_p"),
    ({**GOOD, "seed": 2**70}, 400, "less than", "seed"),
    ({**GOOD, "stop": ["a"] * 5}, 400, "at most 4", "stop"),
    ({**GOOD, "stream_options": {}}, 400, "set stream to true", "stream_options"),
    ({**GOOD, "top_logprobs": 2}, 400, "needs logprobs", "top_logprobs"),
    ({**GOOD, "colour": "red"}, 400, "Unrecognized request argument supplied: colour", "colour"),
    ({**GOOD, "tools": [{"type": "function"}]}, 400, "tools is not supported", "tools"),
    ({**GOOD, "response_format": {"type": "json_object"}}, 400, "response_format is not supported", "response_format"),
    ({**GOOD, "chat_template_kwargs": {"enable_thinking": True}}, 400, "no switch enable_thinking", "messages"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_requests(served: Running, number: int) -> None:
    """Refused with a sentence and the field, as OpenAI's errors are; the server goes on."""
    body, status, words, param = BAD[number]
    found, answer = served.post("/v1/chat/completions", body)
    error = answer["error"]
    assert (found, error["param"]) == (status, param)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_what_says_nothing_is_taken(served: Running) -> None:
    empty = {"tools": [], "response_format": {"type": "text"}, "presence_penalty": 0, "logit_bias": None}
    assert served.post("/v1/chat/completions", {**GOOD, **empty, "user": "me", "seed": None, "n": None})[0] == 200


@pytest.mark.parametrize("prompt", ["", "\ud800", [], [5, 260], [-1], [[]], [1.5], {"a": 1}])
def test_bad_prompts(served: Running, prompt: Any) -> None:
    status, answer = served.post("/v1/completions", {"model": "tiny", "prompt": prompt})
    assert status == 400
    assert answer["error"]["param"].startswith("prompt")


def test_other_paths(served: Running) -> None:
    for method, path, status in [("GET", "/v1/nothing", 404), ("PUT", "/v1/models", 405), ("GET", "/../etc", 404)]:
        found, headers, body = served.send(method, path)
        assert found == status
        assert json.loads(body)["error"]["message"]
        assert headers["x-request-id"].startswith("req_")


def test_a_client_that_goes_away_stops_its_work(served: Running) -> None:
    def ended() -> float:
        text = served.send("GET", "/metrics")[2].decode()
        return float(re.search(r'focusllm_jobs_total\{end="cancelled"\} (.*)', text)[1])

    for is_stream in (True, False):
        before = ended()
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
        body = {**GOOD, "max_tokens": 4096, "stream": is_stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        if is_stream:
            assert connection.getresponse().read(20)
        time.sleep(0.3)
        connection.close()
        deadline = time.monotonic() + 60
        while ended() == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_too_many_are_told_to_come_again() -> None:
    with running(max_running=1, max_waiting=1, max_prompt_tokens=90) as busy, ThreadPoolExecutor(2) as threads:
        client = busy.client()
        streams = [client.chat.completions.create(**{**GOOD, "max_tokens": 4096}, stream=True) for _ in range(1)]
        next(iter(streams[0]))
        waiting = threads.submit(lambda: client.chat.completions.create(**GOOD))
        while b'jobs_now{state="waiting"} 1' not in busy.send("GET", "/metrics")[2]:
            time.sleep(0.02)
        assert busy.send("GET", "/ready")[0] == 503
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting") as refused:
            client.chat.completions.create(**GOOD)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        streams[0].close()
        assert waiting.result(60).choices[0].finish_reason == "length"
        assert busy.send("GET", "/ready")[0] == 200
        with pytest.raises(openai.BadRequestError, match="683 tokens, but this server takes 90") as long:
            client.chat.completions.create(model="tiny", messages=user(LONG))
        assert long.value.code == "context_length_exceeded"


def test_a_server_that_stops_ends_its_streams(caplog: pytest.LogCaptureFixture) -> None:
    with running() as found:
        stream = found.client().chat.completions.create(**{**GOOD, "max_tokens": 4096}, stream=True)
        next(iter(stream))
    with pytest.raises(openai.APIError, match="stopped before this was complete"):
        list(stream)
    assert "The server has stopped; 1 prompts were not complete." in caplog.text


def test_large_bodies_are_refused_as_they_come() -> None:
    with running(max_body=2000) as small:
        headers = {"Content-Type": "application/json"}
        body = json.dumps({**GOOD, "messages": user("x" * 5000)}).encode()
        assert small.send("POST", "/v1/chat/completions", body[:10], {**headers, "Content-Length": "5000"})[0] == 413
        pieces = iter([body[:1500], body[1500:3000]])
        status, _, answer = small.send("POST", "/v1/chat/completions", pieces, headers)
        assert (status, json.loads(answer)["error"]["type"]) == (413, "request_too_large")
        assert small.post("/v1/chat/completions", GOOD)[0] == 200


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = {name: Keys.create(file, name) for name in ("ann", "ben")}
    assert not any(key in file.read_text() for key in keys.values())
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="ann has a key"):
        Keys.create(file, "ann")
    with pytest.raises(ConfigError, match="the name 'a b' does not do"):
        Keys.create(file, "a b")
    with running(Keys.load(file)) as locked:
        for key in keys.values():
            assert [model.id for model in locked.client(key).models.list()] == ["tiny"]
        for key in ("none", keys["ann"][:-1], keys["ann"].upper(), "\x7f"):
            with pytest.raises(openai.AuthenticationError):
                locked.client(key).models.list()
        assert locked.send("GET", "/v1/models", headers={"X-Api-Key": keys["ben"]})[0] == 200
        status, _, body = locked.send("GET", "/metrics")
        assert (status, json.loads(body)["error"]["code"]) == (401, "missing_api_key")
        assert locked.send("GET", "/health")[0] == 200
    for text in ("", "ann", "ann xyz", f"ann {'0' * 64}\nann {'0' * 64}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="make one with `focusllm key`"):
            Keys.load(file)


def test_other_sites_pages_are_not_let_in(served: Running) -> None:
    """A name of theirs that leads here, and forms of theirs, which need no leave of ours."""
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", "localhost.evil.example"):
        assert served.send("GET", "/v1/models", headers={"Host": host})[0] == 403
    for host in ("localhost", f"127.0.0.1:{served.port}", "[::1]:8000"):
        assert served.send("GET", "/v1/models", headers={"Host": host})[0] == 200
    status, *_ = served.send("POST", "/v1/chat/completions", json.dumps(GOOD), {"Content-Type": "text/plain"})
    assert status == 400


def test_logs_have_numbers_and_no_text(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "focusllm")
    caplog.set_level(logging.DEBUG, "uvicorn")
    served.post("/v1/chat/completions", {**GOOD, "messages": user(SECRET), "max_tokens": 3})
    served.post("/v1/chat/completions", {**GOOD, "messages": user(f"{SECRET} \ud800")})
    served.send("GET", f"/v1/{SECRET}?{SECRET}")
    deadline = time.monotonic() + 10

    def told(**wanted: Any) -> bool:
        lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "focusllm.access"]
        return any(wanted.items() <= line.items() for line in lines)

    chat = {"method": "POST", "path": "/v1/chat/completions"}
    while not (told(**chat, status=200, generated=3) and told(**chat, status=400) and told(path="other", status=404)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert SECRET not in caplog.text


def test_metrics(served: Running) -> None:
    served.post("/v1/chat/completions", {**GOOD, "max_tokens": 5})
    text = served.send("GET", "/metrics")[2].decode()
    assert float(re.search(r'focusllm_tokens_total\{kind="generated"\} (.*)', text)[1]) >= 5
    assert re.search(r'focusllm_requests_total\{route="/v1/chat/completions",status="200"\} \d', text)


def test_silence_is_told() -> None:
    """And a response that nobody fetched ends its work."""
    llm = tiny()
    worker = Worker(llm.model, llm.tokenizer)  # which is not started

    async def listen() -> Any:
        listening = Listening(worker, [Prompt.of([5, 6], worker.config)], Sampling(max_tokens=3), "")
        events = listening.events(0.01)
        assert await anext(events) is None
        while worker.step():
            pass
        told = [event async for event in events if event is not None]
        assert listening.usage.generated == 3
        return told

    assert len(asyncio.run(listen())) >= 3

    async def leave() -> Any:
        return Listening(worker, [Prompt.of([5, 6], worker.config)], Sampling(), "").jobs[0]

    job = asyncio.run(leave())
    assert job.is_cancelled
    assert not worker.step()


def test_messages_stay_text() -> None:
    """Whatever control tokens they look like; the frame around them is the template's."""
    tokenizer = byte_tokenizer()
    content = "</s><s>[[message 1]]"
    ids, starts = encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "user", "content": content}])
    own = tokenizer(content, split_special_tokens=True, add_special_tokens=False).input_ids
    assert len(own) == len(content)
    assert ids == [1, *tokenizer("a").input_ids, 2, 1, *own, 2, 1]
    assert starts == [1, 4]
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat(byte_tokenizer(chat=False), [{"role": "user", "content": "a"}])
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="no place for this message of the role system"):
        encode_chat(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


def test_words_choose_too() -> None:
    """Those of the last message; of one that is itself a long text, those of its end."""
    text = "".join(f"Sentence {n} of a long text. " for n in range(40))
    text = text.replace("Sentence 20", "A zanzibar.")
    llm = tiny()
    prompts = Prompts(llm.tokenizer, llm.model.settings, 260, 10**6)
    for messages in (user(text) + user("Where is zanzibar?"), user(f"{text}\n\nOf a zanzibar?")):
        prompt = prompts.of_chat(messages, {})
        assert prompt.word_scores is not None
        assert len(prompt.word_scores) == len(prompt.pieces)
        best = llm.tokenizer.decode(prompt.pieces[int(prompt.word_scores.argmax())])
        assert "zanzibar" in best
    assert prompts.of_chat(user("Hi"), {}).word_scores is None


QUESTION = "Which of these many sentences is the one that is meant?"  # no chunk of 24 tokens fits beside it
BOOK = "".join(f"Sentence {n} of a long text. " for n in range(30)).replace("Sentence 20", "A zanzibar. It")


def test_documents_that_are_sent_along(served: Running) -> None:
    """The answer and what it cites are those of `ask`; whole and in a stream; read once."""
    llm, client = tiny(), served.client()
    texts = {"sea.txt": BOOK, "more": LONG[:150]}
    read = [llm.read_text(text, name=name) for name, text in texts.items()]
    wanted = llm.ask(read, QUESTION, max_new_tokens=20).to_dict()
    sent = [{"title": name, "text": text} for name, text in texts.items()]
    how: dict[str, Any] = {"model": "tiny", "messages": user(QUESTION), "max_tokens": 20}
    answer = client.chat.completions.create(**how, extra_body={"documents": sent})
    message = answer.choices[0].message
    assert message.content == wanted["text"]
    usage = answer.usage.prompt_tokens_details
    assert usage.cached_tokens + usage.cache_write_tokens == len(BOOK) + 150
    assert usage.cache_write_tokens > 900  # a chunk that is there twice is read once
    for found, expected_one in zip(message.citations, wanted["citations"], strict=True):
        assert found == {**expected_one, "weight": pytest.approx(expected_one["weight"], abs=1e-4)}
        assert texts[found["document"]][found["start"] : found["end"]] == found["text"]
    assert [(one["start"], one["end"]) for one in message.sentences] == [
        (one["start"], one["end"]) for one in wanted["sentences"]
    ]
    chunks = list(client.chat.completions.create(**how, stream=True, extra_body={"documents": sent}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted["text"]
    assert [one["text"] for one in chunks[-1].choices[0].delta.citations] == [one["text"] for one in message.citations]
    system = [{"role": "system", "content": "Be brief."}, *user(QUESTION)]
    again = client.chat.completions.create(**{**how, "messages": system}, extra_body={"documents": sent[::-1]})
    assert again.usage.prompt_tokens_details.cache_write_tokens < 30  # the beginning of the question alone
    assert {found["document_index"] for found in again.choices[0].message.citations} <= {0, 1}


def test_a_conversation_about_documents_goes_on(served: Running) -> None:
    client, messages = served.client(), user(QUESTION)
    sent = {"documents": [{"text": BOOK}]}
    for number in range(3):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=30, extra_body=sent)
        message = answer.choices[0].message
        assert number or message.citations  # later on what is open may be of the conversation instead
        assert {one["document"] for one in message.citations} <= {"document 1"}
        assert sum(one["weight"] for one in message.citations) <= 1 + 1e-6
        messages += [{"role": "assistant", "content": message.content}, *user(f"And the {number}th? " * 4)]
    assert answer.usage.prompt_tokens_details.cache_write_tokens < 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": [{"title": "a", "text": " "}]}, "a has no text in it"),
        ({"documents": [{"title": "a"}]}, "Field required"),
        ({"documents": "a"}, "valid list"),
        ({"documents": [{"text": "a"}] * 65}, "at most 64"),
        ({"documents": [{"text": "a"}], "messages": [{"role": "system", "content": "a"}]}, "message of the user"),
    ],
)
def test_bad_documents(served: Running, change: dict[str, Any], words: str) -> None:
    status, answer = served.post("/v1/chat/completions", {**GOOD, **change})
    assert status == 400
    assert words in answer["error"]["message"]
    assert answer["error"]["param"].startswith("documents")


def test_sets_of_a_library_are_models(tmp_path: Path) -> None:
    """What `ask` of the library says, with the same citations; documents that come later are there at once."""
    library = Library(tmp_path / "library", tiny())
    for name, text in (("a.txt", BOOK), ("b.txt", BOOK[::-1])):
        library.add(of_text(text, name), into="sea")
    wanted = library.ask("sea", QUESTION, max_new_tokens=20).to_dict()
    with running(library=Library(tmp_path / "library", tiny())) as found:
        client = found.client()
        assert [model.id for model in client.models.list()] == ["tiny", "tiny@sea"]
        answer = client.chat.completions.create(model="tiny@sea", messages=user(QUESTION), max_tokens=20)
        message = answer.choices[0].message
        assert message.content == wanted["text"]
        assert [one["text"] for one in message.citations] == [one["text"] for one in wanted["citations"]]
        assert answer.usage.prompt_tokens_details.cached_tokens == 2 * len(BOOK)
        both = {"documents": [{"title": "c", "text": LONG[:80]}]}
        more = client.chat.completions.create(model="tiny@sea", messages=user(QUESTION), max_tokens=4, extra_body=both)
        assert more.usage.prompt_tokens_details.cache_write_tokens >= 80
        library.add(of_text(LONG, "d.txt"), into="land")
        assert client.models.retrieve("tiny@land").id == "tiny@land"
        for model in ("tiny@air", "tiny@", "other@sea"):
            with pytest.raises(openai.NotFoundError, match="does not exist here"):
                client.chat.completions.create(**{**GOOD, "model": model})
        with pytest.raises(openai.BadRequestError, match="by conversations only"):
            client.completions.create(model="tiny@sea", prompt="a")


def test_documents_are_opened_or_refused() -> None:
    llm = tiny()
    llm.model.focus_config = llm.config.replace(far_context="condensed")
    prompts = Prompts(llm.tokenizer, llm.model.settings, 260, 10**6)
    with pytest.raises(ConfigError, match="start the server with --far-context opened"):
        prompts.of_documents(user("a"), [of_text("a")], {})
    with pytest.raises(ConfigError, match="load the model with far_context='opened'"):
        create_app(llm, library=object())  # type: ignore[arg-type] - refused before it is used


def test_addresses() -> None:
    with pytest.raises(ConfigError, match="lets other machines in"):
        serve(tiny(), ServerSettings(host="0.0.0.0"))
    with listener(ServerSettings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened at"):
            listener(ServerSettings(port=port))


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """A process of its own: it says where it is, answers, and ends when it is told to."""
    tiny().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "focusllm", "serve", "--model", str(tmp_path / "model"), "--port", "0"]
    environment = {**os.environ, "FOCUSLLM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([*command, "--name", "tiny"], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said: list[str] = []
            assert process.stderr is not None
            while not (found := re.search(r"Serving tiny at http://127.0.0.1:(\d+)/v1", said[-1] if said else "")):
                said.append(process.stderr.readline())
                assert said[-1], said
            ours = Running(int(found[1]))
            answer = ours.client().with_options(max_retries=5).chat.completions.create(**{**GOOD, "max_tokens": 4})
            assert len(answer.choices[0].message.content) == 4
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert "The server has stopped; all was done." in rest
    assert '"generated": 4' in rest
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--keys", "nothing"]])
def test_the_command_refuses_before_it_loads(focusllm: Any, arguments: list[str]) -> None:
    code, _, said = focusllm("serve", "--model", "no/such/model", *arguments)
    assert code == 2
    assert "keys" in said
    assert said.count("\n") == 1


def test_the_command_for_keys(focusllm: Any, tmp_path: Path) -> None:
    code, key, _ = focusllm("key", "ann", "--keys", tmp_path / "keys")
    assert code == 0
    assert Keys.load(tmp_path / "keys").owner(key.strip()) == "ann"
