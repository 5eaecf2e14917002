"""The server: one model, its worker's thread, and the dialects in front of it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from focusllm.errors import ConfigError
from focusllm.library.library import Library
from focusllm.llm import FocusLLM
from focusllm.serving import (
    file_routes,
    messages_routes,
    openai_routes,
    page_routes,
    responses_routes,
    token_routes,
)
from focusllm.serving.api_errors import ApiError, of_validation
from focusllm.serving.files import Files
from focusllm.serving.gate import Gate
from focusllm.serving.keys import Keys
from focusllm.serving.metrics import Metrics
from focusllm.serving.prompts import Prompts
from focusllm.serving.scheduler import Scheduler
from focusllm.serving.service import Service
from focusllm.serving.settings import ServerSettings
from focusllm.serving.worker import Worker

CLIENT_GONE = 499
LAST_WORDS = 5
"""Seconds for responses to end in when their work did."""
log = logging.getLogger(__name__)


def create_app(
    llm: FocusLLM,
    settings: ServerSettings | None = None,
    keys: Keys | None = None,
    library: Library | None = None,
) -> FastAPI:
    """An application for any ASGI server, in one process.

    Args:
        llm: the model, which belongs to the application from now on.
        keys: who may use it; None: anyone who can reach it.
        library: of the same model; its sets of documents may be asked by all who may use the server.

    Raises:
        ConfigError: the model condenses chunks, but there is a library.
    """
    if library is not None and not llm.model.settings.is_opened:
        raise ConfigError("a library is asked by opened chunks; load the model with far_context='opened'.")
    settings, keys = settings or ServerSettings(), keys or Keys()
    worker = Worker(llm.model, llm.tokenizer, Scheduler(settings.max_running, settings.max_waiting))
    vocabulary = int(llm.model.config.vocab_size)
    prompts = Prompts(llm.tokenizer, llm.model.settings, vocabulary, settings.max_prompt_tokens)
    files = None
    if library is not None:
        library.run = worker.run
        files = Files(library, settings.max_prompt_tokens) if not library.read_only else None
    service, metrics = Service(settings, worker, prompts, library, files), Metrics(worker)

    @asynccontextmanager
    async def working(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        if files is not None:
            await run_in_threadpool(files.start)
        try:
            yield
        finally:
            await run_in_threadpool(worker.close)
            if files is not None:
                await run_in_threadpool(files.close)

    def gate(app: ASGIApp) -> Gate:
        return Gate(app, settings, keys, metrics)

    app = FastAPI(title="FocusLLM", lifespan=working, docs_url=None, redoc_url=None, middleware=[Middleware(gate)])
    app.state.worker = worker
    for dialect in (openai_routes, file_routes, responses_routes, messages_routes, token_routes):
        app.include_router(dialect.routes(service))
    app.include_router(page_routes.routes())

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if worker.is_alive else "failed"}, 200 if worker.is_alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        is_ready = worker.is_alive and len(worker.scheduler.waiting) < settings.max_waiting
        return JSONResponse({"status": "ready" if is_ready else "busy"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def told() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            what = {404: f"There is no {request.url.path} here.", 405: f"{request.method} does not go with this path."}
            error = ApiError(error.status_code, what.get(error.status_code, str(error.detail)), headers=error.headers)
        return told_in_dialect(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return told_in_dialect(request, of_validation(error.errors()))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return told_in_dialect(request, ApiError(500, "The server failed at this request; its log says why."))

    return app


def told_in_dialect(request: Request, error: ApiError) -> JSONResponse:
    """A refusal as the API says it whose path was asked."""
    return error.response(request.url.path, getattr(request.state, "request_id", None))


def listener(settings: ServerSettings) -> socket.socket:
    """The address, taken.

    Raises:
        ConfigError: it cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise ConfigError(f"{where} cannot be listened at ({error.strerror or error}); choose another.") from error


class Server(uvicorn.Server):
    """What runs an application. Told to stop, it takes no more requests, gives those under way `grace_seconds`, and
    tells the others that it stopped.

    Args:
        app: as `create_app` makes it.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings):
        how: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
        seconds = int(settings.grace_seconds) + LAST_WORDS
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=seconds, **how))
        logging.getLogger("uvicorn.access").disabled = True  # its lines have what clients wrote into addresses
        self._worker, self._grace = app.state.worker, settings.grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, as uvicorn does, while the worker ends."""
        closing = asyncio.create_task(run_in_threadpool(self._worker.close, self._grace))
        await super().shutdown(sockets)
        num_left = await closing
        what = f"{num_left} prompts were not complete" if num_left else "all was done"
        log.warning("The server has stopped; %s.", what)


def serve(
    llm: FocusLLM,
    settings: ServerSettings,
    keys: Keys | None = None,
    library: Library | None = None,
    on_ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Answer requests until the process is told to stop.

    Args:
        on_ready: called with the address when it is taken.

    Raises:
        ConfigError: the address cannot be used, or is open to the world without keys.
    """
    settings.check(bool(keys))
    with listener(settings) as taken:
        host = f"[{settings.host}]" if taken.family == socket.AF_INET6 else settings.host
        on_ready(f"http://{host}:{taken.getsockname()[1]}")
        Server(create_app(llm, settings, keys, library), settings).run(sockets=[taken])
