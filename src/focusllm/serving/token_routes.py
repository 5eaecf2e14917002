"""Texts and token ids, as vLLM's server translates them.

POST /tokenize     {"prompt"} or {"messages"} -> {"tokens", "count", "max_model_len", "token_strs"}
POST /detokenize   {"tokens"} -> {"prompt"}
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool

from focusllm.errors import FocusError
from focusllm.serving.api_errors import ApiError
from focusllm.serving.bodies import Body, of_client
from focusllm.serving.openai_schema import Message
from focusllm.serving.service import Service


class TokenizeRequest(Body):
    """The body of POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    """Whether a text begins as the model's texts do; conversations begin as their template says."""
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, data: Any) -> Any:
        return of_client(
            data, (), {"add_generation_prompt": (True,), "continue_final_message": (False,), "tools": ([],)}
        )

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "Give prompt or messages, one of them.", "prompt")
        return self


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def routes(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        _check_model(service, body.model)
        prompts = service.prompts
        try:
            if body.messages is not None:
                turns = [message.turn for message in body.messages]
                ids = await run_in_threadpool(prompts.ids_of_chat, turns, body.chat_template_kwargs)
            else:
                ids = await run_in_threadpool(prompts.ids_of_text, body.prompt or "", body.add_special_tokens)
        except FocusError as error:
            raise ApiError(400, str(error), "prompt" if body.messages is None else "messages") from error
        texts = None
        if body.return_token_strs:
            texts = await run_in_threadpool(lambda: [prompts.token_text(token) for token in ids])
        return {
            "count": len(ids),
            "max_model_len": service.settings.max_prompt_tokens,
            "tokens": ids,
            "token_strs": texts,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        _check_model(service, body.model)
        return {"prompt": await run_in_threadpool(service.prompts.text_of, body.tokens)}

    return router


def _check_model(service: Service, name: str | None) -> None:
    if name is not None:
        service.check_model(name)
