"""Requests to /v1/responses, OpenAI's newer dialect; what is not supported is refused by its name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from focusllm.serving.api_errors import ApiError
from focusllm.serving.bodies import Body, of_client

IGNORED = frozenset(
    {
        *("user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prompt_cache_options", "parallel_tool_calls", "reasoning", "max_tool_calls", "stream_options"),
        "access_programs",
    }
)
"""Fields that say nothing about the answer of a model of this kind."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "prompt": (),
    "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Fields that would change the answer in a way that is not there, and their values that would not."""
PARTS = ("input_text", "output_text", "text", "input_file", "refusal")
RESULTS = "file_search_call.results"
"""What `include` may name."""


class Part(Body):
    """A part of a message: text, or a file by its id or by its bytes."""

    type: Literal["input_text", "output_text", "text", "input_file", "refusal"]
    text: str = ""
    refusal: str = ""
    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            kind = data.get("type")
            if isinstance(kind, str) and kind not in PARTS:
                raise ApiError(400, f"Parts of the type {kind!r} are not supported; give input_text.", "input")
            if data.get("file_url"):
                raise ApiError(400, "file_url is not supported: this server fetches nothing.", "input")
        left_out = ("annotations", "logprobs", "file_url", "prompt_cache_breakpoint", "detail")
        return of_client(data, left_out, {})

    @model_validator(mode="after")
    def _one_file(self) -> Part:
        if self.type == "input_file" and (self.file_id is None) == (self.file_data is None):
            raise ApiError(400, "An input_file has file_id or file_data, one of them.", "input")
        return self


class Item(Body):
    """A message, or what an earlier response had besides, which says nothing."""

    type: Literal["message", "file_search_call"] = "message"
    role: Literal["user", "assistant", "system", "developer"] = "assistant"
    content: str | list[Part] = ""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kind = data.get("type", "message")
        if kind == "file_search_call":
            return {"type": kind}
        if isinstance(kind, str) and kind != "message":
            raise ApiError(400, f"Items of the type {kind!r} are not supported; give messages.", "input")
        if "role" not in data or "content" not in data:
            raise ApiError(400, "A message has a role and content; one of them is missing.", "input")
        return of_client(data, ("id", "status", "phase"), {})

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text or part.refusal for part in self.parts)}

    @property
    def parts(self) -> list[Part]:
        """What it is made of, if that is not a text alone."""
        return self.content if isinstance(self.content, list) else []

    @property
    def files(self) -> list[Part]:
        """Those in it."""
        return [part for part in self.parts if part.type == "input_file"]

    @property
    def nbytes(self) -> int:
        """About what it holds."""
        given = self.content if isinstance(self.content, str) else ""
        return len(given) + sum(len(part.text) + len(part.file_data or "") for part in self.parts)


class RankingOptions(Body):
    """What of a search is good enough; there is one ranker, the model's own look."""

    ranker: str | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0


class FileSearch(Body):
    """The tool that asks vector stores."""

    type: Literal["file_search"]
    vector_store_ids: Annotated[list[str], Field(min_length=1, max_length=16)]
    max_num_results: Annotated[int, Field(ge=1, le=50)] | None = None
    ranking_options: RankingOptions = RankingOptions()

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "file_search":
            raise ApiError(400, f"Tools of the type {kind!r} are not supported; file_search is.", "tools")
        return of_client(data, (), {"filters": ()})


class ResponsesRequest(Body):
    """The body of POST /v1/responses."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    include: list[str] = Field(default_factory=list)
    tools: Annotated[list[FileSearch], Field(max_length=1)] = Field(default_factory=list)
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] = Field(default_factory=dict)
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Not OpenAI's, both."""
    return_progress: bool = False
    """Not OpenAI's: events (`prompt_progress`) that tell how far reading is."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("tool_choice") == "none":
            data = {**data, "tools": []}
        return of_client(data, IGNORED, UNSUPPORTED)

    @model_validator(mode="after")
    def _known_includes(self) -> Any:
        odd = [name for name in self.include if name != RESULTS]
        if odd:
            raise ApiError(400, f"include has {odd[0]!r}, which is not supported; {RESULTS} is.", "include")
        return self

    @property
    def items(self) -> list[Item]:
        """What is said."""
        return [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
