"""Requests in OpenAI's dialect, in its own order of fields; what is not supported is refused by its name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from focusllm.serving.api_errors import ApiError
from focusllm.serving.bodies import Body, of_base64, of_client

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls", "reasoning_effort", "verbosity"),
    }
)
"""Fields that say nothing about the answer of a model of this kind."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
"""Fields that would change the answer in a way that is not there, and their values that would not."""


class StreamOptions(Body):
    """What a stream has besides."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken, without effect."""


class GivenFile(Body):
    """A file that was uploaded, or is sent along."""

    file_id: str | None = None
    file_data: str | None = None
    """In base64, or as a data: address."""
    filename: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> GivenFile:
        if (self.file_id is None) == (self.file_data is None):
            raise ApiError(400, "A file in a message has either file_id or file_data; give one of them.", "messages")
        return self

    def content(self) -> bytes:
        """The bytes that are sent along.

        Raises:
            ApiError: they are not base64.
        """
        return of_base64(self.file_data or "", "file_data", "messages")


class Part(Body):
    """A part of a message."""

    type: Literal["text", "file"]
    text: str = ""
    file: GivenFile | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported_type(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type", "text") not in ("text", "file"):
            kind = str(data["type"])
            said = f"Parts of messages of the type {kind!r} are not supported; give text, or a file."
            raise ApiError(400, said, "messages")
        return data

    @model_validator(mode="after")
    def _file_of_its_type(self) -> Part:
        if (self.type == "file") != (self.file is not None):
            raise ApiError(400, "A part of the type 'file' has a file, and no other part has.", "messages")
        return self


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if data.get("role") in ("tool", "function"):
                raise ApiError(400, f"Messages of the role {data['role']!r} are not supported.", "messages")
            data = {name: value for name, value in data.items() if value is not None or name == "content"}
            for name in ("tool_calls", "function_call", "audio"):
                if data.pop(name, None):
                    raise ApiError(400, f"{name} in a message is not supported.", "messages")
            data.pop("annotations", None)  # of an answer that is sent back
        return data

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}

    @property
    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or [])

    @property
    def files(self) -> list[GivenFile]:
        """Its files."""
        parts = [] if isinstance(self.content, str) else self.content or []
        return [part.file for part in parts if part.file is not None]


class DocumentText(Body):
    """A document that is sent along."""

    title: str | None = None
    text: str


class _Generation(Body):
    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Not OpenAI's; 0 or -1: all tokens."""
    return_progress: bool = False
    """Not OpenAI's: events of a stream (`prompt_progress`) that tell how far reading is."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return of_client(data, IGNORED, UNSUPPORTED)

    @model_validator(mode="after")
    def _stream_options_of_a_stream(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for streams; set stream to true.", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends the text; an empty string ends nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool = False
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    documents: Annotated[list[DocumentText], Field(max_length=64)] = Field(default_factory=list)
    """Not OpenAI's: texts that the conversation is about, and that the answer cites."""
    vector_store_ids: Annotated[list[str], Field(max_length=64)] = Field(default_factory=list)
    """Not OpenAI's here: all files of these are asked."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Not OpenAI's: switches of the model's chat template."""

    @property
    def has_documents(self) -> bool:
        """Whether it is about something besides itself."""
        return bool(self.documents or self.vector_store_ids or any(message.files for message in self.messages))

    @model_validator(mode="after")
    def _top_logprobs_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs; set that to true.", "top_logprobs")
        return self


class CompletionRequest(_Generation):
    """The body of POST /v1/completions."""

    prompt: str | list[int] | Annotated[list[str] | list[list[int]], Field(max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Texts, or token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)


def _without_chunking(data: Any) -> Any:
    """Files are cut as the model reads them, and stay until they are removed."""
    if not isinstance(data, dict):
        return data
    if data.get("chunking_strategy") not in (None, {"type": "auto"}):
        raise ApiError(400, "chunking_strategy is not supported; leave it out.", "chunking_strategy")
    if data.get("expires_after") is not None:
        raise ApiError(400, "expires_after is not supported; leave it out.", "expires_after")
    kept = set(data) - {"chunking_strategy", "expires_after"}
    return {name: data[name] for name in data if name in kept and data[name] is not None}


Label = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)]
"""Notes of a client, within OpenAI's limits."""


class NewStore(Body):
    """The body of POST /v1/vector_stores."""

    name: Label | None = None
    file_ids: Annotated[list[str], Field(max_length=500)] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=dict)
    description: Label | None = None
    """Taken, without effect."""

    _supported = model_validator(mode="before")(_without_chunking)


class StoreChange(Body):
    """The body of POST /v1/vector_stores/ID."""

    name: Label | None = None
    metadata: Metadata | None = None

    _supported = model_validator(mode="before")(_without_chunking)


class NewStoreFile(Body):
    """The body of POST /v1/vector_stores/ID/files."""

    file_id: str
    attributes: Annotated[dict[Annotated[str, Field(max_length=64)], Label | float | bool], Field(max_length=16)] = (
        Field(default_factory=dict)
    )

    _supported = model_validator(mode="before")(_without_chunking)
