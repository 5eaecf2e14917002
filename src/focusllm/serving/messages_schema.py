"""Requests in Anthropic's dialect; what is not supported is refused by its name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from focusllm.serving.api_errors import ApiError
from focusllm.serving.bodies import Body, of_client

IGNORED = frozenset(
    {
        *("metadata", "service_tier", "cache_control", "inference_geo", "user_profile_id", "workspace_id"),
        *("diagnostics", "betas"),
    }
)
"""Fields that say nothing about the answer of a model of this kind."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": ({},),
    "mcp_servers": ([],),
    "output_config": ({},),
    "output_format": (),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "tools": ([],),
}
"""Fields that would change the answer in a way that is not there, and their values that would not."""
OF_BLOCKS = frozenset({"cache_control"})
"""The same of blocks."""


class TextBlock(Body):
    """A text in a message."""

    type: Literal["text"]
    text: str
    citations: list[Any] = Field(default_factory=list)
    """Of an answer that is sent back; they say nothing more."""

    @model_validator(mode="before")
    @classmethod
    def _without_hints(cls, data: Any) -> Any:
        return of_client(data, OF_BLOCKS, {})


class TextSource(Body):
    """A document's text."""

    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class PdfSource(Body):
    """A document's bytes."""

    type: Literal["base64"]
    media_type: Literal["application/pdf"]
    data: str


class BlocksSource(Body):
    """A document that is cut already: its blocks are what is cited."""

    type: Literal["content"]
    content: str | Annotated[list[TextBlock], Field(min_length=1)]


class FileSource(Body):
    """A document that was sent to /v1/files."""

    type: Literal["file"]
    file_id: str


class CitationsConfig(Body):
    """Whether a document is cited."""

    enabled: bool = False


class DocumentBlock(Body):
    """A document in a message."""

    type: Literal["document"]
    source: Annotated[TextSource | PdfSource | BlocksSource | FileSource, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None
    """What the model is told of it."""
    citations: CitationsConfig = CitationsConfig()

    @model_validator(mode="before")
    @classmethod
    def _known_source(cls, data: Any) -> Any:
        source = data.get("source") if isinstance(data, dict) else None
        if isinstance(source, dict) and source.get("type") == "url":
            raise ApiError(400, "Sources of the type 'url' are not supported: this server fetches nothing.", "messages")
        return of_client(data, OF_BLOCKS, {})


Block = Annotated[TextBlock | DocumentBlock, Field(discriminator="type")]


class InputMessage(Body):
    """A turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    @model_validator(mode="before")
    @classmethod
    def _only_text_and_documents(cls, data: Any) -> Any:
        content = data.get("content") if isinstance(data, dict) else None
        for block in content if isinstance(content, list) else []:
            kind = block.get("type") if isinstance(block, dict) else None
            if isinstance(kind, str) and kind not in ("text", "document"):
                what = f"Blocks of the type {kind!r} are not supported; give text or documents."
                raise ApiError(400, what, "messages")
            if kind == "document" and data.get("role") != "user":
                raise ApiError(400, "Documents stand in messages of the user, not of others.", "messages")
        return data


class CountRequest(Body):
    """The body of POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] = ""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return of_client(data, IGNORED, UNSUPPORTED)

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Any:
        if self.messages[-1].role != "user":
            raise ApiError(400, "The last message must be the user's; answers are not begun by clients.", "messages")
        return self

    @property
    def documents(self) -> list[DocumentBlock]:
        """All of them, in order."""
        blocks = (block for one in self.messages if isinstance(one.content, list) for block in one.content)
        return [block for block in blocks if isinstance(block, DocumentBlock)]

    @property
    def turns(self) -> list[dict[str, str]]:
        """Who said what; what a role says in several messages, or of its documents, is one turn."""
        system = self.system if isinstance(self.system, str) else "\n\n".join(block.text for block in self.system)
        found = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            text = _text(message.content)
            if found and found[-1]["role"] == message.role:
                found[-1]["content"] += f"\n\n{text}"
            else:
                found.append({"role": message.role, "content": text})
        return found


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(max_length=64)] = Field(default_factory=list)
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Not Anthropic's."""

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends the text.

        Raises:
            ApiError: one is white space, which Anthropic's API refuses.
        """
        if not all(stop.strip() for stop in self.stop_sequences):
            raise ApiError(400, "stop_sequences: each must contain more than white space.", "stop_sequences")
        return tuple(self.stop_sequences)


def _text(content: str | list[TextBlock | DocumentBlock]) -> str:
    """Of a message; blocks of text follow one another as they are, for answers are cut into such."""
    if isinstance(content, str):
        return content
    return "".join(
        block.text if isinstance(block, TextBlock) else f"{block.context}\n\n" if block.context else ""
        for block in content
    )
