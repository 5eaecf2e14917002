"""Answers as events, and as what these add up to: one way for dialects whose events have types."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from focusllm.serving.api_errors import ApiError
from focusllm.serving.job import Event, Usage
from focusllm.serving.listening import Listening, while_connected
from focusllm.serving.service import Service, tell_log

NUM_CITATIONS = 5
"""Passages that are named of an answer, and of each sentence of it."""
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
COMMENT = ": ping\n\n"
"""What keeps a quiet stream open; clients skip it."""
Told = dict[str, Any]
"""An event of a dialect, with its `type`."""


class Answer(Protocol):
    """One answer in a dialect while it comes. The events of a stream are made by the same steps as the whole."""

    whole: Told
    """What there is of it."""

    def begin(self) -> Iterator[Told]:
        """Before anything is known."""

    def take(self, event: Event) -> Iterator[Told]:
        """Something has become of the job."""

    def end(self, usage: Usage) -> Iterator[Told]:
        """All is there."""

    def fail(self, error: ApiError) -> Iterator[Told]:
        """Nothing more comes."""

    def ping(self) -> str:
        """What is sent when nothing was for long."""


async def answered(
    request: Request, service: Service, listening: Listening, answer: Answer, is_stream: bool
) -> Response:
    """An answer as one document, or as events."""
    if not is_stream:
        return JSONResponse(await while_connected(request, _whole(request, listening, answer)))
    return event_stream(_stream(request, service, listening, answer))


def event_stream(lines: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events."""
    return StreamingResponse(lines, media_type="text/event-stream", headers=NO_BUFFERING)


def line_of(told: Told) -> str:
    """An event as it is sent."""
    return f"event: {told['type']}\ndata: {json.dumps(told, ensure_ascii=False)}\n\n"


async def _events(
    request: Request, listening: Listening, answer: Answer, ping_seconds: float | None
) -> AsyncIterator[Told | None]:
    try:
        for told in answer.begin():
            yield told
        async for found in listening.events(ping_seconds):
            if found is None:
                yield None
                continue
            for told in answer.take(found[1]):
                yield told
        for told in answer.end(listening.usage):
            yield told
    finally:
        tell_log(request, listening.usage)


async def _whole(request: Request, listening: Listening, answer: Answer) -> Told:
    async for _ in _events(request, listening, answer, None):
        pass
    return answer.whole


async def _stream(request: Request, service: Service, listening: Listening, answer: Answer) -> AsyncIterator[str]:
    try:
        async for told in _events(request, listening, answer, service.settings.ping_seconds):
            yield answer.ping() if told is None else line_of(told)
    except ApiError as error:
        for told in answer.fail(error):
            yield line_of(told)
