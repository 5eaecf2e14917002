"""OpenAI's dialect: requests in, answers out, whole or in a stream of events.

POST /v1/chat/completions   a conversation is answered
POST /v1/completions        texts are gone on with
GET  /v1/models             the one that is served
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from focusllm.documents.answer import Citation
from focusllm.serving.answering import COMMENT, NUM_CITATIONS, event_stream
from focusllm.serving.api_errors import ApiError
from focusllm.serving.job import Cited, Event, Finished, Piece, Progress, Prompt, Usage
from focusllm.serving.listening import Listening, while_connected
from focusllm.serving.openai_schema import ChatRequest, CompletionRequest
from focusllm.serving.sampling import Chosen
from focusllm.serving.service import Service, tell_log

COMPLETION_TOKENS = 16
"""Of a completion that does not say how many, as in OpenAI's API."""


def routes(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        names = await run_in_threadpool(service.models)
        return {"object": "list", "data": [_model(service, name) for name in names]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        most = body.max_completion_tokens or body.max_tokens or service.default_tokens
        sampling = service.sampling(body, most, body.stops, body.n, (body.top_logprobs or 0) if body.logprobs else None)
        prompt = await service.chat_prompt(body, request.state.owner)
        listening = service.listen(request, [prompt], sampling)
        return await _answered(request, service, body, listening, _Chat(service, body, prompt, request.state.owner))

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model, is_plain=True)
        most = body.max_tokens or min(COMPLETION_TOKENS, service.settings.max_tokens)
        sampling = service.sampling(body, most, body.stops, body.n, body.logprobs)
        listening = service.listen(request, await service.text_prompts(body), sampling)
        return await _answered(request, service, body, listening, _Completion(service, body))

    return router


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "focusllm"}


class _Form:
    """How answers of one kind of request look."""

    kind, id_prefix = "", ""

    def __init__(self, service: Service, body: ChatRequest | CompletionRequest):
        self.service = service
        self.head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": body.model,
        }

    def choice(self, index: int, text: str, tokens: Sequence[Chosen], finished: Finished) -> dict[str, Any]:
        """A complete choice."""
        raise NotImplementedError

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its text; None: nothing."""
        raise NotImplementedError

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """What a stream says of a choice then: a piece of its text."""
        raise NotImplementedError

    def last(self, index: int, finished: Finished) -> dict[str, Any]:
        """What a stream says of a choice in the end."""
        raise NotImplementedError


class _Chat(_Form):
    kind, id_prefix = "chat.completion", "chatcmpl"

    def __init__(self, service: Service, body: ChatRequest, prompt: Prompt, owner: str):
        super().__init__(service, body)
        self.has_logprobs = body.logprobs
        documents = prompt.context.documents if prompt.context is not None else ()
        files = [service.file_named(owner, document.name) for document in documents]
        self.file_ids = [file.id if file is not None else None for file in files]

    def choice(self, index: int, text: str, tokens: Sequence[Chosen], finished: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None, "annotations": [], **self._cited(finished)}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finished.reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens)
        return {"index": index, "delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None}

    def last(self, index: int, finished: Finished) -> dict[str, Any]:
        return {"index": index, "delta": self._cited(finished), "logprobs": None, "finish_reason": finished.reason}

    def _cited(self, finished: Finished) -> dict[str, Any]:
        """Where an answer about documents looked: the most attended passages, for all of it and for each sentence."""
        if finished.citations is None:
            return {}
        sentences = [{**asdict(one), "citations": self._citations(one.citations)} for one in finished.sentences]
        return {"citations": self._citations(finished.citations), "sentences": sentences}

    def _citations(self, found: Sequence[Citation]) -> list[dict[str, Any]]:
        shown = [(asdict(one), self.file_ids[one.document_index]) for one in found[:NUM_CITATIONS]]
        return [{**one, **({"file_id": file_id} if file_id else {})} for one, file_id in shown]

    def _logprobs(self, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        content = []
        for chosen in tokens:
            top = [self._logprob(found.token, found.logprob) for found in chosen.top]
            content.append({**self._logprob(chosen.token, chosen.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.service.prompts.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class _Completion(_Form):
    kind, id_prefix = "text_completion", "cmpl"

    def __init__(self, service: Service, body: CompletionRequest):
        super().__init__(service, body)
        self.has_logprobs = body.logprobs is not None
        self._lengths: dict[int, int] = {}  # of what was said of a choice, in characters

    def choice(self, index: int, text: str, tokens: Sequence[Chosen], finished: Finished) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens),
            "finish_reason": finished.reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(index, piece.tokens)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def last(self, index: int, finished: Finished) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finished.reason}

    def _logprobs(self, index: int, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        say, offsets, place = self.service.prompts.token_text, [], self._lengths.get(index, 0)
        texts = [say(chosen.token) for chosen in tokens]
        for text in texts:
            offsets.append(place)
            place += len(text)
        self._lengths[index] = place
        return {
            "tokens": texts,
            "token_logprobs": [chosen.logprob for chosen in tokens],
            "top_logprobs": [{say(found.token): found.logprob for found in chosen.top} for chosen in tokens],
            "text_offset": offsets,
        }


async def _answered(
    request: Request, service: Service, body: ChatRequest | CompletionRequest, listening: Listening, form: _Form
) -> Response:
    if not body.stream:
        return JSONResponse(await while_connected(request, _whole(request, listening, form, body.n)))
    stream = _stream(request, service, body, listening, form)
    return event_stream(stream)


async def _whole(request: Request, listening: Listening, form: _Form, num_choices: int) -> dict[str, Any]:
    """An answer as one document."""
    texts: dict[int, list[Piece]] = {}
    choices: dict[int, dict[str, Any]] = {}
    async for told in listening.events():
        assert told is not None
        index, event = _index(told, num_choices), told[1]
        if isinstance(event, Piece):
            texts.setdefault(index, []).append(event)
        elif isinstance(event, Finished):
            pieces = texts.get(index, [])
            tokens = [chosen for piece in pieces for chosen in piece.tokens]
            choices[index] = form.choice(index, "".join(piece.text for piece in pieces), tokens, event)
    tell_log(request, listening.usage)
    return {**form.head, "choices": [choices[index] for index in sorted(choices)], "usage": _usage(listening.usage)}


async def _stream(
    request: Request, service: Service, body: ChatRequest | CompletionRequest, listening: Listening, form: _Form
) -> AsyncIterator[str]:
    """An answer as events."""
    head = {**form.head, "object": f"{form.kind}.chunk" if isinstance(form, _Chat) else form.kind}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if body.includes_usage else {}
        return f"data: {json.dumps({**head, 'choices': choices, **usage, **more}, ensure_ascii=False)}\n\n"

    try:
        for index in range(len(listening.jobs) * body.n):
            first = form.first(index)
            if first is not None:
                yield chunk([first])
        async for told in listening.events(service.settings.ping_seconds):
            if told is None:
                yield COMMENT
                continue
            index, event = _index(told, body.n), told[1]
            if isinstance(event, Piece):
                yield chunk([form.piece(index, event)])
            elif isinstance(event, Finished):
                yield chunk([form.last(index, event)])
            elif isinstance(event, Progress) and body.return_progress and event.total:
                yield chunk([form.piece(index, Piece(index, "", ()))], prompt_progress=_progress(event))
        if body.includes_usage:
            yield chunk([], usage=_usage(listening.usage))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        tell_log(request, listening.usage)


def _index(told: tuple[int, Event], num_choices: int) -> int:
    """Of a choice among those of all prompts of a request."""
    number, event = told
    return number * num_choices + (event.choice if isinstance(event, Piece | Cited | Finished) else 0)


def _progress(progress: Progress) -> dict[str, int]:
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(progress.seconds * 1000),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.written},
    }
