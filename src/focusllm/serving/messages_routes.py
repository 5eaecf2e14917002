"""Anthropic's dialect.

POST /v1/messages                a conversation is answered, whole or in a stream of events
POST /v1/messages/count_tokens   how long it is
"""

from __future__ import annotations

import copy
import re
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from focusllm.documents.answer import Citation
from focusllm.documents.document import Document
from focusllm.documents.extracted import joined
from focusllm.documents.readers import check_text
from focusllm.documents.sources import Source, of_extracted, of_text
from focusllm.errors import FocusError
from focusllm.serving.answering import NUM_CITATIONS, Told, answered, line_of
from focusllm.serving.api_errors import ApiError
from focusllm.serving.bodies import of_base64
from focusllm.serving.files import read_bytes
from focusllm.serving.job import Cited, Event, Finished, Piece, Prompt, Usage
from focusllm.serving.messages_schema import (
    BlocksSource,
    CountRequest,
    DocumentBlock,
    FileSource,
    MessagesRequest,
    TextBlock,
    TextSource,
)
from focusllm.serving.service import Service

FIRST_VERSION, NEW_VERSION = "2023-06-01", "2026-10-21"
"""Of Anthropic's API: the one that is taken where none is named, and the one that does without sampling."""
PLACE = re.compile(r"(page|block) (\d+)(?: to \1 (\d+))?")
"""A citation's part, of a PDF or of a document that came in blocks."""


def routes(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter(prefix="/v1/messages")

    @router.post("")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        _check_version(request, body)
        service.check_model(body.model)
        sampling = service.sampling(body, body.max_tokens, body.stops)
        _check_citations(body.documents)
        prompt = await _prompt(service, body, request.state.owner)
        answer = MessageAnswer(body, prompt)
        return await answered(request, service, service.listen(request, [prompt], sampling), answer, body.stream)

    @router.post("/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
        _check_version(request, body)
        service.check_model(body.model)
        return {"input_tokens": (await _prompt(service, body, request.state.owner)).num_tokens}

    return router


def _check_version(request: Request, body: CountRequest) -> None:
    """Refuse other versions than the two that there are, and what the newer one has no more."""
    asked = request.headers.get("anthropic-version", FIRST_VERSION)
    if asked not in (FIRST_VERSION, NEW_VERSION):
        raise ApiError(400, f"anthropic-version {asked!r} is not supported; send {NEW_VERSION!r}.")
    if asked == FIRST_VERSION:
        return
    for name in sorted({"temperature", "top_k", "top_p"} & body.model_fields_set):
        raise ApiError(400, f"{name} is not in version {NEW_VERSION}; leave it out, or send {FIRST_VERSION!r}.", name)
    turns = (turn for turn in body.messages if turn.role == "user" and isinstance(turn.content, list))
    blocks = (block for turn in turns for block in turn.content)
    if any(isinstance(block, TextBlock) and block.citations for block in blocks):
        raise ApiError(400, "citations stand in the assistant's text blocks, not in the user's.", "messages")


def _check_citations(documents: Sequence[DocumentBlock]) -> None:
    if len({document.citations.enabled for document in documents}) > 1:
        raise ApiError(400, "Citations are enabled for some documents only; enable them for all or none.", "messages")


async def _prompt(service: Service, body: CountRequest, owner: str) -> Prompt:
    """A conversation and its documents as the model reads them.

    Raises:
        ApiError: they cannot be read.
    """
    found: list[Document | Source] = []
    for number, block in enumerate(body.documents):
        if isinstance(block.source, FileSource):
            found += await service.reading(service.files_of, owner, [block.source.file_id])
            continue
        try:
            found.append(await service.reading(_source, block, block.title or f"document {number}"))
        except FocusError as error:
            raise ApiError(400, str(error), "messages") from error
    return await service.conversation(body.model, body.turns, found)


def _source(block: DocumentBlock, name: str) -> Source:
    """A document that stands in a request; blocks become its parts.

    Raises:
        ApiError, DocumentError: it cannot be read.
    """
    given = block.source
    if isinstance(given, TextSource):
        return of_text(check_text(given.data, name), name)
    if isinstance(given, BlocksSource):
        texts = [given.content] if isinstance(given.content, str) else [part.text for part in given.content]
        extracted = joined((f"block {number}", text) for number, text in enumerate(texts))
        check_text(extracted.text, name)
        return of_extracted(extracted, name)
    assert not isinstance(given, FileSource)
    data = of_base64(given.data, name, "messages")
    if not data.startswith(b"%PDF-"):
        raise ApiError(400, f"{name} is no PDF; give its bytes as base64, or its text with the source 'text'.")
    return read_bytes(data, name)


class MessageAnswer:
    """A message while it comes. Where documents are cited, each sentence is a block of its own.

    Args:
        prompt: what is answered.
    """

    def __init__(self, body: MessagesRequest, prompt: Prompt):
        self.whole: Told = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt.num_tokens, 0, 0, 0)),
        }
        self._titles = [document.title for document in body.documents]
        self._is_cited = prompt.context is not None and all(block.citations.enabled for block in body.documents)
        self._said = 0  # characters
        self._ends: deque[Cited] = deque()  # of sentences of which not all was said
        self._is_open = False  # the last block

    def begin(self) -> Iterator[Told]:
        """The message without content."""
        yield {"type": "message_start", "message": copy.deepcopy(self.whole)}
        yield {"type": "ping"}

    def take(self, event: Event) -> Iterator[Told]:
        """Text, cut where sentences end."""
        if isinstance(event, Cited) and self._is_cited:
            self._ends.append(event)
        elif isinstance(event, Piece):
            text = event.text
            while self._ends and self._said + len(text) >= self._ends[0].next_start:
                cited = self._ends.popleft()
                count = cited.next_start - self._said
                yield from self._say(text[:count])
                yield from self._close(cited.sentence.citations)
                text = text[count:]
            yield from self._say(text)
        elif isinstance(event, Finished):
            reason = "end_turn" if event.reason == "stop" else "max_tokens"
            self.whole["stop_reason"] = "stop_sequence" if event.stop_string is not None else reason
            self.whole["stop_sequence"] = event.stop_string
            yield from self._close([])

    def end(self, usage: Usage) -> Iterator[Told]:
        """Why it ended, and what it took."""
        self.whole["usage"] = _usage(usage)
        delta = {name: self.whole[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": self.whole["usage"]}
        yield {"type": "message_stop"}

    def fail(self, error: ApiError) -> Iterator[Told]:
        """An error's event."""
        yield error.body("/v1/messages")

    def ping(self) -> str:
        """An event of its own."""
        return line_of({"type": "ping"})

    def _say(self, text: str) -> Iterator[Told]:
        if not text:
            return
        content = self.whole["content"]
        if not self._is_open:
            self._is_open = True
            content.append({"type": "text", "text": "", "citations": [] if self._is_cited else None})
            block = {name: value for name, value in content[-1].items() if value is not None}
            yield {"type": "content_block_start", "index": len(content) - 1, "content_block": block}
        content[-1]["text"] += text
        self._said += len(text)
        delta = {"type": "text_delta", "text": text}
        yield {"type": "content_block_delta", "index": len(content) - 1, "delta": delta}

    def _close(self, citations: Sequence[Citation]) -> Iterator[Told]:
        if not self._is_open:
            return
        self._is_open, index = False, len(self.whole["content"]) - 1
        for found in citations[:NUM_CITATIONS]:
            citation = self._citation(found)
            self.whole["content"][-1]["citations"].append(citation)
            delta = {"type": "citations_delta", "citation": citation}
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}

    def _citation(self, found: Citation) -> dict[str, Any]:
        """A passage as Anthropic's API names it: by characters, or by pages or blocks, where documents have those."""
        index = found.document_index
        citation = {
            "cited_text": found.text,
            "document_index": index,
            "document_title": self._titles[index] if index < len(self._titles) else found.document,
            "file_id": None,
        }
        part = PLACE.fullmatch(found.part or "")
        if part is None:
            return {"type": "char_location", **citation, "start_char_index": found.start, "end_char_index": found.end}
        first, behind = int(part[2]), int(part[3] or part[2]) + 1
        if part[1] == "page":
            return {"type": "page_location", **citation, "start_page_number": first, "end_page_number": behind}
        return {"type": "content_block_location", **citation, "start_block_index": first, "end_block_index": behind}


def _usage(usage: Usage) -> dict[str, int]:
    """Tokens as Anthropic's API counts them: the prompt's in three parts."""
    return {
        "input_tokens": usage.prompt - usage.cached - usage.written,
        "cache_creation_input_tokens": usage.written,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.generated,
    }
