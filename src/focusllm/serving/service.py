"""What the routes of a server share. The HTTP side of it; the model is the worker's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from focusllm.documents.document import Document
from focusllm.documents.readers import check_text
from focusllm.documents.sources import Source, of_text
from focusllm.errors import FocusError
from focusllm.library.library import Library
from focusllm.serving.api_errors import ApiError, of_error
from focusllm.serving.files import Files, read_bytes
from focusllm.serving.job import Prompt, Usage
from focusllm.serving.listening import Listening
from focusllm.serving.openai_schema import ChatRequest, CompletionRequest
from focusllm.serving.prompts import Prompts
from focusllm.serving.refusals import ClosedError
from focusllm.serving.sampling import Sampling
from focusllm.serving.settings import ServerSettings
from focusllm.serving.worker import Worker


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
            raise ApiError(400, "A set of documents can be asked by /v1/chat/completions only.", "model")

    def sampling(self, body: ChatRequest | CompletionRequest, max_tokens: int, top_logprobs: int | None) -> Sampling:
        """How the tokens of an answer are chosen.

        Raises:
            ApiError: more than this server gives.
        """
        most = self.settings.max_tokens
        if max_tokens > most:
            raise ApiError(400, f"max_tokens is {max_tokens}, but this server gives at most {most}.", "max_tokens")
        if body.n > self.settings.max_choices:
            raise ApiError(400, f"n is {body.n}, but this server gives at most {self.settings.max_choices}.", "n")
        top_k = body.top_k if body.top_k is not None and body.top_k > 0 else None
        return Sampling(
            max_tokens=max_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=top_k,
            seed=body.seed,
            stop=body.stops,
            top_logprobs=top_logprobs,
            num_choices=body.n,
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

    def file_id(self, document: str) -> str | None:
        """The uploaded file that a document is; None: it is none."""
        file = self.files.find(document) if self.files is not None else None
        return file.id if file is not None else None

    async def chat_prompt(self, body: ChatRequest, owner: str) -> Prompt:
        """A conversation as the model reads it.

        Args:
            owner: whose files may be asked.

        Raises:
            ApiError: it cannot be read.
        """
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in body.messages
        ]
        switches, param = body.chat_template_kwargs, "messages"
        try:
            is_alone = body.model == self.settings.model_id and not body.has_documents
            if is_alone:
                return await run_in_threadpool(self.prompts.of_chat, messages, switches)
            param = "documents"
            documents = await run_in_threadpool(self._documents, body, owner)
            return await run_in_threadpool(self.prompts.of_documents, messages, documents, switches)
        except ClosedError as error:
            raise of_error(error) from error
        except FocusError as error:
            raise ApiError(400, str(error), param) from error

    def _documents(self, body: ChatRequest, owner: str) -> list[Document | Source]:
        """Those of the set that is named, uploaded files, and what is sent along."""
        found: list[Document | Source] = []
        name = body.model.removeprefix(self.settings.model_id).removeprefix("@")
        if name:
            assert self.library is not None
            found += self.library.documents(name)
        given = [file for message in body.messages for file in message.files]
        ids = [file.file_id for file in given if file.file_id is not None]
        if ids or body.vector_store_ids:
            found += self.kept_files().documents(owner, ids, body.vector_store_ids)
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
            raise of_error(error) from error

    def listen(self, request: Request, prompts: Sequence[Prompt], sampling: Sampling) -> Listening:
        """Put prompts to work.

        Raises:
            ApiError: there is no room.
        """
        return Listening(self.worker, prompts, sampling, request.state.owner)


def tell_log(request: Request, usage: Usage) -> None:
    """Numbers for the request's line in the log."""
    request.state.told.update(prompt=usage.prompt, cached=usage.cached, generated=usage.generated)
