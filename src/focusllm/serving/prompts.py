"""What clients send, as the model is to read it. The HTTP side's own tokenizer: the worker's thread has another."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from focusllm.config import FocusConfig
from focusllm.documents.detokenizer import token_text
from focusllm.documents.document import Document
from focusllm.documents.sources import Source
from focusllm.documents.text import encode_chat, encode_ids, start_tokens
from focusllm.documents.words import WordIndex
from focusllm.serving.api_errors import ApiError
from focusllm.serving.asked_documents import about, unread
from focusllm.serving.job import Prompt

LETTERS = 4
"""Of a token, about."""


class Prompts:
    """Texts to prompts.

    Args:
        tokenizer: as loaded; it is copied, for one that several threads use may fail.
        config: settled settings of the model. vocabulary: how many tokens it has. most_tokens: of a prompt.
    """

    def __init__(self, tokenizer: Any, config: FocusConfig, vocabulary: int, most_tokens: int):
        self._tokenizer, self._config = copy.deepcopy(tokenizer), config
        self._vocabulary, self._most = vocabulary, most_tokens
        self._turn = threading.Lock()

    def of_chat(self, messages: Sequence[Mapping[str, str]], template_kwargs: Mapping[str, Any]) -> Prompt:
        """A conversation that is to be answered. Chunks of it are chosen by the last message's words, too.

        Raises:
            ConfigError, DocumentError: no chat template, or one that refuses it; text that is no Unicode.
            ApiError: too long.
        """
        with self._turn:
            ids, starts = encode_chat(self._tokenizer, messages, template_kwargs)
        num_last = len(ids) - starts[-1]
        prompt = self._checked(ids, num_last)
        if not (prompt.pieces and self._config.is_opened):
            return prompt
        with self._turn:
            texts = [self._tokenizer.decode(piece) for piece in prompt.pieces]
        question = messages[-1]["content"]
        if num_last > self._config.local_length:  # a text with a question at its end
            question = question[-LETTERS * self._config.most_prompt_tokens :]
        return replace(prompt, word_scores=torch.from_numpy(WordIndex(texts).scores(question)))

    def of_documents(
        self,
        messages: Sequence[Mapping[str, str]],
        documents: Sequence[Document | Source],
        template_kwargs: Mapping[str, Any],
    ) -> Prompt:
        """A conversation about documents (see `asked_documents.about`), some of which may have to be read; about none,
        if a vector store has no files that can be asked, it is one like any other.

        Raises:
            ConfigError, DocumentError: they cannot be asked, or have no text. ApiError: too long.
        """
        if not documents:
            return self.of_chat(messages, template_kwargs)
        with self._turn:
            known = [
                unread(self._tokenizer, self._config, found) if isinstance(found, Source) else found
                for found in documents
            ]
            prompt = about(self._tokenizer, self._config, messages, known, template_kwargs)
        self._check_length(prompt.num_tokens, "documents")
        return prompt

    def token_text(self, token: int) -> str:
        """What one token says by itself, control tokens too."""
        with self._turn:
            return token_text(self._tokenizer, token)

    def ids_of_chat(self, messages: Sequence[Mapping[str, str]], template_kwargs: Mapping[str, Any]) -> list[int]:
        """A conversation's token ids, in the model's chat template.

        Raises:
            ConfigError, DocumentError: as of `of_chat`.
        """
        with self._turn:
            return encode_chat(self._tokenizer, messages, template_kwargs)[0]

    def ids_of_text(self, text: str, has_start: bool = True) -> list[int]:
        """A text's token ids, behind those that the model's texts begin with.

        Raises:
            DocumentError: text that is no Unicode.
        """
        with self._turn:
            start = start_tokens(self._tokenizer) if has_start else []
            return [*start, *encode_ids(self._tokenizer, text)]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """What token ids say, control tokens too.

        Raises:
            ApiError: some are no tokens.
        """
        self._check_known(token_ids, "tokens")
        with self._turn:
            return str(self._tokenizer.decode(list(token_ids)))

    def of_text(self, text: str) -> Prompt:
        """A text that is to be gone on with.

        Raises:
            DocumentError: text that is no Unicode. ApiError: it is empty, or too long.
        """
        return self._checked(self.ids_of_text(text))

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        """Token ids that are to be gone on with.

        Raises:
            ApiError: there are none, too many, or some that are no tokens.
        """
        self._check_known(token_ids, "prompt")
        return self._checked(list(token_ids))

    def _check_known(self, token_ids: Sequence[int], param: str) -> None:
        odd = [token for token in token_ids if not 0 <= token < self._vocabulary]
        if odd:
            raise ApiError(400, f"{odd[0]} is no token of this model, which has {self._vocabulary}.", param)

    def _checked(self, ids: list[int], prompt_length: int | None = None) -> Prompt:
        if not ids:
            raise ApiError(400, "The prompt is empty; give at least one token.", "prompt")
        self._check_length(len(ids), "messages" if prompt_length is not None else "prompt")
        return Prompt.of(ids, self._config, prompt_length)

    def _check_length(self, count: int, param: str) -> None:
        if count > self._most:
            raise ApiError(
                *(400, f"The prompt has {count} tokens, but this server takes {self._most}; give a shorter one."),
                *(param, "context_length_exceeded"),
            )
