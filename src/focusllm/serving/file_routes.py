"""OpenAI's files and vector stores: what is uploaded, put together, read in the background, and then asked.

POST /v1/files                         a file is kept                 GET, DELETE /v1/files/ID, GET .../content
POST /v1/vector_stores                 files are asked together       GET, POST, DELETE /v1/vector_stores/ID
POST /v1/vector_stores/ID/files        a file is read, in the end     GET, DELETE .../files/ID, GET .../content
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from focusllm.errors import LibraryError
from focusllm.serving.api_errors import ApiError
from focusllm.serving.file_catalogue import Member, StoredFile, VectorStore, new_id
from focusllm.serving.files import Files
from focusllm.serving.openai_schema import NewStore, NewStoreFile, StoreChange
from focusllm.serving.service import Service

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Place:
    """Which part of a list is wanted."""

    after: str | None
    before: str | None
    limit: int
    order: str


def routes(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter(prefix="/v1")

    @router.post("/files")
    async def upload(request: Request) -> dict[str, Any]:
        files = service.kept_files()
        async with request.form(max_files=1, max_fields=20) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "file is missing; send it as a part of multipart/form-data.", "file")
            other = next((name for name in form if name not in ("file", "purpose")), None)
            if other is not None:
                raise ApiError(400, f"{other} is not supported; leave it out.", other, "unsupported_parameter")
            if not isinstance(purpose, str):
                raise ApiError(400, "purpose is missing; send 'assistants'.", "purpose")
            try:
                kept = await run_in_threadpool(
                    files.upload, request.state.owner, file.filename or "file", purpose, file.file
                )
            except LibraryError as error:
                raise ApiError(413, str(error), "file", "disk_full") from error
        return _file(kept)

    @router.get("/files")
    async def list_files(
        request: Request,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
        before: str | None = None,
        purpose: str | None = None,
    ) -> dict[str, Any]:
        found = await run_in_threadpool(service.kept_files().catalogue.files, request.state.owner)
        found = [file for file in found if purpose in (None, file.purpose)]
        return _page(found, lambda file: file.id, _file, Place(after, before, limit, order), 10_000)

    @router.get("/files/{file_id}")
    async def retrieve(request: Request, file_id: str) -> dict[str, Any]:
        return _file(await run_in_threadpool(service.kept_files().file, file_id, request.state.owner))

    @router.delete("/files/{file_id}")
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        files = service.kept_files()
        file = await run_in_threadpool(files.file, file_id, request.state.owner)
        await run_in_threadpool(files.remove, file)
        return {"id": file.id, "object": "file", "deleted": True}

    @router.get("/files/{file_id}/content")
    async def content(request: Request, file_id: str) -> Response:
        files = service.kept_files()
        file = await run_in_threadpool(files.file, file_id, request.state.owner)
        if not files.path(file).is_file():
            raise ApiError(404, f"The content of {file.id} is gone.", "file_id", "file_not_found")
        # whatever it is, a browser must not take it for a page of ours
        return FileResponse(files.path(file), media_type="application/octet-stream", filename=file.filename)

    @router.post("/vector_stores")
    async def create_store(request: Request, body: NewStore) -> dict[str, Any]:
        files, owner = service.kept_files(), request.state.owner
        wanted = [await run_in_threadpool(files.file, file_id, owner) for file_id in body.file_ids]
        store = VectorStore(new_id("vs_"), owner, body.name or "", int(time.time()), body.metadata)
        await run_in_threadpool(files.catalogue.add_store, store)
        await run_in_threadpool(files.put_into, store, wanted, {})
        return await run_in_threadpool(_store, files, store)

    @router.get("/vector_stores")
    async def list_stores(
        request: Request, after: str | None = None, limit: int = 20, order: str = "desc", before: str | None = None
    ) -> dict[str, Any]:
        files = service.kept_files()
        found = await run_in_threadpool(files.catalogue.stores, request.state.owner)
        return await run_in_threadpool(
            _page,
            found,
            lambda store: store.id,
            lambda store: _store(files, store),
            Place(after, before, limit, order),
            100,
        )

    @router.get("/vector_stores/{store_id}")
    async def retrieve_store(request: Request, store_id: str) -> dict[str, Any]:
        files = service.kept_files()
        return _store(files, await run_in_threadpool(files.store, store_id, request.state.owner))

    @router.post("/vector_stores/{store_id}")
    async def change_store(request: Request, store_id: str, body: StoreChange) -> dict[str, Any]:
        files, owner = service.kept_files(), request.state.owner
        store = await run_in_threadpool(files.store, store_id, owner)
        name = store.name if body.name is None else body.name
        metadata = store.metadata if body.metadata is None else body.metadata
        await run_in_threadpool(files.catalogue.change_store, store.id, name, metadata)
        return _store(files, await run_in_threadpool(files.store, store_id, owner))

    @router.delete("/vector_stores/{store_id}")
    async def delete_store(request: Request, store_id: str) -> dict[str, Any]:
        files = service.kept_files()
        store = await run_in_threadpool(files.store, store_id, request.state.owner)
        await run_in_threadpool(files.catalogue.remove_store, store.id)
        return {"id": store.id, "object": "vector_store.deleted", "deleted": True}

    @router.post("/vector_stores/{store_id}/files")
    async def attach(request: Request, store_id: str, body: NewStoreFile) -> dict[str, Any]:
        files, owner = service.kept_files(), request.state.owner
        store = await run_in_threadpool(files.store, store_id, owner)
        file = await run_in_threadpool(files.file, body.file_id, owner)
        await run_in_threadpool(files.put_into, store, [file], body.attributes)
        return _member(files, await run_in_threadpool(files.member, store, file.id))

    @router.get("/vector_stores/{store_id}/files")
    async def list_members(
        request: Request,
        store_id: str,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
        before: str | None = None,
        filter: Literal["in_progress", "completed", "failed", "cancelled"] | None = None,
    ) -> dict[str, Any]:
        files = service.kept_files()
        store = await run_in_threadpool(files.store, store_id, request.state.owner)
        found = await run_in_threadpool(files.catalogue.members, store.id)
        found = [member for member in found if filter in (None, member.file.status)]
        return _page(
            found,
            lambda member: member.file.id,
            lambda member: _member(files, member),
            Place(after, before, limit, order),
            100,
        )

    @router.get("/vector_stores/{store_id}/files/{file_id}")
    async def retrieve_member(request: Request, store_id: str, file_id: str) -> dict[str, Any]:
        files = service.kept_files()
        store = await run_in_threadpool(files.store, store_id, request.state.owner)
        return _member(files, await run_in_threadpool(files.member, store, file_id))

    @router.delete("/vector_stores/{store_id}/files/{file_id}")
    async def detach(request: Request, store_id: str, file_id: str) -> dict[str, Any]:
        files = service.kept_files()
        store = await run_in_threadpool(files.store, store_id, request.state.owner)
        member = await run_in_threadpool(files.member, store, file_id)
        await run_in_threadpool(files.catalogue.take_out, store.id, member.file.id)
        return {"id": member.file.id, "object": "vector_store.file.deleted", "deleted": True}

    @router.get("/vector_stores/{store_id}/files/{file_id}/content")
    async def text(request: Request, store_id: str, file_id: str) -> dict[str, Any]:
        files = service.kept_files()
        store = await run_in_threadpool(files.store, store_id, request.state.owner)
        member = await run_in_threadpool(files.member, store, file_id)
        try:
            kept = await run_in_threadpool(files.library.content, member.file.id)
        except LibraryError as error:
            raise ApiError(400, f"{file_id} has not been read yet; wait until it is.", "file_id") from error
        parts = [{"start": start, "label": label} for file in kept.files for start, label in file.parts]
        return {
            "object": "vector_store.file_content.page",
            "data": [{"type": "text", "text": kept.text}],
            "has_more": False,
            "next_page": None,
            "chunks": [{"start": chunk.start, "end": chunk.end} for chunk in kept.chunks],
            **({"pages": parts} if parts else {}),
        }

    return router


def _file(file: StoredFile) -> dict[str, Any]:
    status = {"failed": "error", "completed": "processed"}.get(file.status, "uploaded")
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": status,
        "status_details": file.message,
    }


def _store(files: Files, store: VectorStore) -> dict[str, Any]:
    members = files.catalogue.members(store.id)
    counts = Counter[str](member.file.status for member in members)
    names = ("in_progress", "completed", "failed", "cancelled")
    return {
        "id": store.id,
        "object": "vector_store",
        "created_at": store.created,
        "name": store.name,
        "usage_bytes": sum(member.file.bytes for member in members),
        "file_counts": {**{name: counts[name] for name in names}, "total": len(members)},
        "status": "in_progress" if counts["in_progress"] else "completed",
        "last_active_at": max([store.created, *(member.created for member in members)]),
        "metadata": store.metadata,
    }


def _member(files: Files, member: Member) -> dict[str, Any]:
    """A file in a store; while it is read, `progress` tells how far that is, in tokens."""
    file, progress = member.file, files.progress(member.file)
    return {
        "id": file.id,
        "object": "vector_store.file",
        "created_at": member.created,
        "vector_store_id": member.store,
        "status": file.status,
        "usage_bytes": file.bytes,
        "last_error": {"code": file.code, "message": file.message} if file.status == "failed" else None,
        "attributes": member.attributes,
        **({"progress": {"processed": progress[0], "total": progress[1]}} if progress else {}),
    }


def _page(
    found: Sequence[Kept],
    id_of: Callable[[Kept], str],
    shown: Callable[[Kept], dict[str, Any]],
    place: Place,
    most: int,
) -> dict[str, Any]:
    """A part of a list, as OpenAI's clients page through it; the newest come first, unless asked otherwise."""
    if not 1 <= place.limit <= most:
        raise ApiError(400, f"limit is {place.limit}; it must be from 1 to {most}.", "limit")
    if place.order not in ("asc", "desc"):
        raise ApiError(400, f"order is {place.order!r}; it must be 'asc' or 'desc'.", "order")
    ordered = list(found) if place.order == "asc" else list(reversed(found))
    ids = [id_of(one) for one in ordered]
    for name, given in (("after", place.after), ("before", place.before)):
        if given is not None and given not in ids:
            raise ApiError(404, f"There is nothing {name} {given!r} in this list.", name)
    first = ids.index(place.after) + 1 if place.after is not None else 0
    end = ids.index(place.before) if place.before is not None else len(ids)
    is_backwards = place.before is not None and place.after is None
    between = ordered[first:end]
    data = [shown(one) for one in (between[-place.limit :] if is_backwards else between[: place.limit])]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    has_more = len(between) > place.limit
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}
