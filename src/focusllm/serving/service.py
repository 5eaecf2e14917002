"""What the routes of a server share. The HTTP side of it; the model is the worker's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from focusllm.documents.document import Document
from focusllm.documents.readers import check_text
from focusllm.documents.sources import Source, of_text
from focusllm.errors import FocusError
from focusllm.library.library import Library
from focusllm.serving.api_errors import ApiError, of_error
from focusllm.serving.file_catalogue import StoredFile
from focusllm.serving.files import Files, read_bytes
from focusllm.serving.job import Prompt, Usage
from focusllm.serving.listening import Listening
from focusllm.serving.openai_schema import ChatRequest, CompletionRequest
from focusllm.serving.prompts import Prompts
from focusllm.serving.refusals import ClosedError
from focusllm.serving.sampling import Sampling
from focusllm.serving.settings import ServerSettings
from focusllm.serving.worker import Worker

Result = TypeVar("Result")


class Wishes(Protocol):
    """How a request of any dialect wants its tokens chosen; None: it does not say."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None


@dataclass
class Service:
    """A model, its worker, and what it allows."""

    settings: ServerSettings
    worker: Worker
    prompts: Prompts
    library: Library | None = None
    """Whose sets of documents may be asked."""
    files: Files | None = None
    """What clients upload."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._readers = CapacityLimiter(self.settings.max_running)

    @property
    def default_tokens(self) -> int:
        """Most tokens of an answer to a request that does not say."""
        return min(self.settings.default_tokens, self.settings.max_tokens)

    def models(self) -> list[str]:
        """What clients may name: the model, and `MODEL@SET` for each set of the library's documents."""
        sets = sorted(self.library.sets()) if self.library is not None else []
        return [self.settings.model_id, *(f"{self.settings.model_id}@{name}" for name in sets)]

    def check_model(self, name: str, is_plain: bool = False) -> None:
        """Refuse models that are not served.

        Args:
            is_plain: one with a set of documents does not do.

        Raises:
            ApiError: 404, or 400 for a set of documents where there is no question about them.
        """
        if name == self.settings.model_id:
            return
        if name not in self.models():
            raise ApiError(
                *(404, f"The model {name!r} does not exist here; this server has {self.settings.model_id!r}."),
                *("model", "model_not_found"),
            )
        if is_plain:
            raise ApiError(400, "A set of documents can be asked by conversations only.", "model")

    def sampling(
        self,
        body: Wishes,
        max_tokens: int,
        stop: tuple[str, ...] = (),
        num_choices: int = 1,
        top_logprobs: int | None = None,
        param: str = "max_tokens",
    ) -> Sampling:
        """How the tokens of an answer are chosen.

        Args:
            param: the field that said how many there may be.

        Raises:
            ApiError: more than this server gives.
        """
        most = self.settings.max_tokens
        if max_tokens > most:
            raise ApiError(400, f"{param} is {max_tokens}, but this server gives at most {most}.", param)
        if num_choices > self.settings.max_choices:
            raise ApiError(400, f"n is {num_choices}, but this server gives at most {self.settings.max_choices}.", "n")
        return Sampling(
            max_tokens=max_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
            seed=body.seed,
            stop=stop,
            top_logprobs=top_logprobs,
            num_choices=num_choices,
        )

    def kept_files(self) -> Files:
        """What clients upload.

        Raises:
            ApiError: nothing is kept here.
        """
        if self.files is None:
            what = "a library that can only be read" if self.library is not None else "no library"
            raise ApiError(400, f"This server has {what}, so it keeps no files; see --library.", code="no_files")
        return self.files

    async def reading(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """What work gives that may read documents, and so take a thread for long: few at once, for other routes need
        threads too.
        """
        return await to_thread.run_sync(work, *arguments, limiter=self._readers)

    async def chat_prompt(self, body: ChatRequest, owner: str) -> Prompt:
        """A conversation as the model reads it.

        Args:
            owner: whose files may be asked.

        Raises:
            ApiError: it cannot be read.
        """
        messages = [message.turn for message in body.messages]
        try:
            sent = await self.reading(self._documents, body, owner) if body.has_documents else []
        except FocusError as error:
            raise _refusal(error, "documents") from error
        return await self.conversation(body.model, messages, sent, body.chat_template_kwargs)

    async def conversation(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        sent: Sequence[Document | Source] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation as the model reads it, about the documents that were sent, then those of the model's set.

        Args:
            model: what `check_model` takes. messages: of the roles system, user and assistant.

        Raises:
            ApiError: it cannot be read.
        """
        switches, param = template_kwargs or {}, "messages"
        try:
            if model == self.settings.model_id and not sent:
                return await run_in_threadpool(self.prompts.of_chat, messages, switches)
            param = "documents"
            documents = [*sent, *await self.reading(self._of_set, model)]
            return await run_in_threadpool(self.prompts.of_documents, messages, documents, switches)
        except FocusError as error:
            raise _refusal(error, param) from error

    def _of_set(self, model: str) -> Sequence[Document]:
        name = model.removeprefix(self.settings.model_id).removeprefix("@")
        return self.library.documents(name) if self.library is not None and name else []

    def files_of(
        self, owner: str, file_ids: Sequence[str] = (), vector_store_ids: Sequence[str] = ()
    ) -> Sequence[Document]:
        """The documents of an owner's files; nothing is looked for where none are named.

        Raises:
            ApiError: 404, one is not there; or a file cannot be read.
        """
        if not file_ids and not vector_store_ids:
            return []
        try:
            return self.kept_files().documents(owner, file_ids, vector_store_ids)
        except FocusError as error:
            raise _refusal(error, "file_id") from error

    def file_named(self, owner: str, document: str) -> StoredFile | None:
        """An owner's file that a document is; None: it is none."""
        return self.files.find(owner, document) if self.files is not None else None

    def _documents(self, body: ChatRequest, owner: str) -> list[Document | Source]:
        """Uploaded files, and what is sent along."""
        given = [file for message in body.messages for file in message.files]
        ids = [file.file_id for file in given if file.file_id is not None]
        found: list[Document | Source] = [*self.files_of(owner, ids, body.vector_store_ids)]
        for number, file in enumerate(given, 1):
            if file.file_data is not None:
                found.append(read_bytes(file.content(), file.filename or f"file {number}"))
        for number, sent in enumerate(body.documents, 1):
            title = sent.title or f"document {number}"
            found.append(of_text(check_text(sent.text, title), title))
        return found

    async def text_prompts(self, body: CompletionRequest) -> list[Prompt]:
        """Texts that are to be gone on with, as the model reads them.

        Raises:
            ApiError: there is none, or one cannot be read.
        """
        if not body.prompts:
            raise ApiError(400, "prompt has nothing in it; give at least one text.", "prompt")
        try:
            return [
                await run_in_threadpool(self.prompts.of_text, given)
                if isinstance(given, str)
                else self.prompts.of_ids(given)
                for given in body.prompts
            ]
        except FocusError as error:
            raise ApiError(400, str(error), "prompt") from error

    def listen(self, request: Request, prompts: Sequence[Prompt], sampling: Sampling) -> Listening:
        """Put prompts to work.

        Raises:
            ApiError: there is no room.
        """
        return Listening(self.worker, prompts, sampling, request.state.owner)


def _refusal(error: FocusError, param: str) -> ApiError:
    """Of what a client sent, by the field that it stands in, or of a server that ends."""
    return of_error(error) if isinstance(error, ClosedError) else ApiError(400, str(error), param)


def tell_log(request: Request, usage: Usage) -> None:
    """Numbers for the request's line in the log."""
    request.state.told.update(prompt=usage.prompt, cached=usage.cached, generated=usage.generated)
