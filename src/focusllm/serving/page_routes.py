"""The page for people: its files are in `page/`, and all it does goes by the routes that programs use. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, Request
from fastapi.responses import Response

FILES = MappingProxyType(
    {
        ("/" if path.name == "index.html" else f"/page/{path.name}"): path
        for path in sorted((Path(__file__).parent / "page").iterdir())
    }
)
"""The page's files by their paths: whoever can reach the server may have them, nothing else is given out."""
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Nothing of another origin, nothing inline, and no text that becomes HTML."""
HEADERS = {
    "Cache-Control": "no-cache",  # asked for anew, and sent if it has changed
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> APIRouter:
    """The page at `/`, and what it is made of at `/page/...`."""
    router = APIRouter()
    for path, file in FILES.items():
        _add(router, path, file.read_bytes(), MEDIA_TYPES[file.suffix])
    return router


def _add(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    @router.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(request: Request) -> Response:
        headers = {**HEADERS, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)
