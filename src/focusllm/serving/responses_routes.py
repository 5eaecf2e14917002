"""OpenAI's newer dialect: items in, a response out, which may be gone on from by its id.

POST   /v1/responses                    an answer, whole or in a stream of events
GET    /v1/responses/{id}               one that was given
GET    /v1/responses/{id}/input_items   what it was asked
DELETE /v1/responses/{id}               it is forgotten
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from focusllm.documents.document import Document
from focusllm.documents.sources import Source
from focusllm.errors import FocusError
from focusllm.serving.answering import answered
from focusllm.serving.api_errors import ApiError
from focusllm.serving.bodies import of_base64
from focusllm.serving.files import read_bytes
from focusllm.serving.response_answer import ResponseAnswer
from focusllm.serving.response_store import ResponseStore
from focusllm.serving.responses_schema import Item, Part, ResponsesRequest
from focusllm.serving.service import Service

Limit = Annotated[int, Query(ge=1, le=100)]


def routes(service: Service) -> APIRouter:
    """The routes of a server."""
    router, store = APIRouter(prefix="/v1/responses"), ResponseStore()

    @router.post("")
    async def create(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        owner = request.state.owner
        sampling = service.sampling(body, body.max_output_tokens or service.default_tokens, param="max_output_tokens")
        before = body.previous_response_id
        items = [*(store.get(owner, before, "previous_response_id").conversation if before else ()), *body.items]
        told = [{"role": "system", "content": body.instructions}] if body.instructions else []
        turns = [item.turn for item in items if item.type == "message"]
        if not turns:
            raise ApiError(400, "input has no message; give at least one.", "input")
        documents = list[Document | Source]()
        if body.tools or any(item.files for item in items):
            documents = await service.reading(_documents, service, owner, items, body)
        prompt = await service.conversation(body.model, [*told, *turns], documents)

        names = [document.name for document in prompt.context.documents] if prompt.context is not None else []

        def done(whole: dict[str, Any]) -> None:
            if body.store:
                store.add(owner, whole, _input_items(body), items)

        answer = ResponseAnswer(body, lambda number: service.file_named(owner, names[number]), done)
        return await answered(request, service, service.listen(request, [prompt], sampling), answer, body.stream)

    @router.get("/{name}")
    async def retrieve(name: str, request: Request, stream: bool = False) -> dict[str, Any]:
        if stream:
            raise ApiError(400, "stream is not supported for a response that was given; leave it out.", "stream")
        return store.get(request.state.owner, name).body

    @router.delete("/{name}")
    async def delete(name: str, request: Request) -> dict[str, Any]:
        store.delete(request.state.owner, name)
        return {"id": name, "object": "response", "deleted": True}

    @router.get("/{name}/input_items")
    async def input_items(
        name: str, request: Request, limit: Limit = 20, order: Literal["asc", "desc"] = "desc", after: str | None = None
    ) -> dict[str, Any]:
        items = list(store.get(request.state.owner, name).input_items)
        if order == "desc":
            items.reverse()
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise ApiError(404, f"There is no item {after!r} in this response.", "after")
        first = ids.index(after) + 1 if after is not None else 0
        page = items[first : first + limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": first + limit < len(items),
        }

    return router


def _documents(service: Service, owner: str, items: list[Item], body: ResponsesRequest) -> list[Document | Source]:
    """What is asked: the files in all messages, then the stores that are searched; each once."""
    parts = [part for item in items for part in item.files]
    try:
        found: list[Document | Source] = [_sent(part, number) for number, part in enumerate(parts, 1) if part.file_data]
    except FocusError as error:
        raise ApiError(400, str(error), "input") from error
    ids = list(dict.fromkeys(part.file_id for part in parts if part.file_id is not None))
    stores = list(dict.fromkeys(name for tool in body.tools for name in tool.vector_store_ids))
    return [*found, *service.files_of(owner, ids, stores)]


def _sent(part: Part, number: int) -> Source:
    """A file whose bytes stand in the request."""
    return read_bytes(of_base64(part.file_data or "", "file_data", "input"), part.filename or f"file {number}")


def _input_items(body: ResponsesRequest) -> list[dict[str, Any]]:
    """What was asked, as it is listed."""
    listed = []
    for item in body.items:
        if item.type != "message":
            continue
        content = [{"type": "input_text", "text": item.content}] if isinstance(item.content, str) else None
        parts = [part.model_dump(exclude_unset=True) for part in item.parts]
        head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "status": "completed", "role": item.role}
        listed.append({**head, "content": content or parts})
    return listed
