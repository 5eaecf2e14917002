"""What every request goes through: whose it is, how large it is, and a line in the log without a word of its text."""

from __future__ import annotations

import json
import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from focusllm.serving.api_errors import ApiError, is_anthropic
from focusllm.serving.keys import Keys
from focusllm.serving.metrics import Metrics
from focusllm.serving.settings import ServerSettings, is_loopback

OPEN_ROUTES = ("/health", "/ready")
"""What a supervisor asks, without a key."""
log = logging.getLogger("focusllm.access")


class Gate:
    """Middleware around all routes."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: Keys, metrics: Metrics):
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, request_id = time.monotonic(), 499, f"req_{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state["told"] = {}  # numbers for the log
        state["request_id"] = request_id

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_anthropic(scope["path"]):
                    headers["request-id"] = request_id
            await send(message)

        try:
            self._check_host(Headers(scope=scope))
            self._check_site(scope)
            state["owner"] = self._owner(scope)
            await self.app(scope, self._limited(scope, receive), sent)
        except ApiError as error:
            await error.response(scope["path"], request_id)(scope, receive, sent)
        finally:
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count(route, status, seconds)
            line = {"id": request_id, "method": scope["method"], "path": route, "status": status}
            log.info(json.dumps({**line, "seconds": round(seconds, 3), "key": state.get("owner"), **state["told"]}))

    def _check_host(self, headers: Headers) -> None:
        """A page of another site, whose name was made to lead to this machine, is not let in."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.settings.is_loopback and not self.keys and not is_loopback(name):
            raise ApiError(403, "This server answers this machine only; call it by localhost.")

    def _check_site(self, scope: Scope) -> None:
        """What a form on a page of another site sends is not taken: browsers do not ask before they send it."""
        is_other = Headers(scope=scope).get("sec-fetch-site") == "cross-site"
        if is_other and not self.keys and scope["method"] not in ("GET", "HEAD"):
            raise ApiError(403, "A page of another site cannot use this server.")

    def _owner(self, scope: Scope) -> str:
        """The name of the key; nobody's where there are none."""
        if not self.keys or scope["path"] in OPEN_ROUTES:
            return ""
        headers = Headers(scope=scope)
        kind, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not key:
            how = "'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"
            raise ApiError(401, f"There is no API key; send it as {how}.", code="missing_api_key")
        owner = self.keys.owner(key)
        if owner is None:
            raise ApiError(401, "The API key is not known here.", code="invalid_api_key")
        return owner

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """The request's body, refused as soon as it is too large: by what it says of itself, or as it comes."""
        most, length = self.settings.max_body, Headers(scope=scope).get("content-length", "")
        refusal = ApiError(413, f"The body is larger than the {most:,} bytes that this server takes.", code="too_large")
        if length.isdecimal() and int(length) > most:
            raise refusal
        size = 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise refusal
            return message

        return limited
