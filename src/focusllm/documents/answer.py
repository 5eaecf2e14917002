"""Answers: what they say of their origin and cost, and how their pieces are handed on while they are decoded."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from focusllm.documents.detokenizer import Detokenizer


@dataclass(frozen=True)
class Citation:
    """A passage and its share of the attention while the answer was decoded: a sentence where chunks are opened, a
    chunk (or a file's part of it) where they are condensed.

    Of a condensed chunk that is the attention to its candidate (of one whose candidate was not seen, see
    `FocusConfig.refresh_rows`, what it would have got); of one in the local context the attention to its tokens. Of a
    sentence it is that to its tokens, in the layers of the look-up heads.
    """

    document: str
    """The document's name, or the file's within a folder."""
    chunk: int
    start: int
    """Of characters in the text that was read of the file; `end` is behind the last."""
    end: int
    weight: float
    text: str
    document_index: int = 0
    """Which of the documents that were asked."""
    part: str | None = None
    """The page, chapter or slide, of files that have them: `page 3`, `page 3 to page 4`."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of an answer (characters of `Answer.text`, half-open), and where the model looked as it wrote it."""

    start: int
    end: int
    citations: list[Citation]
    """As of the whole answer."""


@dataclass(frozen=True)
class Answer:
    """An answer with its origin and its cost."""

    text: str
    """What the tokens say, control tokens left out and white space at both ends kept: the stream's pieces, joined."""
    citations: list[Citation]
    """All passages that were seen, the most attended first; weights add up to 1. None if the base model alone read it.
    """
    sentences: list[Sentence]
    """The same for each sentence of the answer, where chunks are opened."""
    num_document_tokens: int
    num_prompt_tokens: int
    """Of the local context when decoding began: the question, and the end of the documents."""
    num_generated_tokens: int
    time_to_first_token: float
    """Seconds from the question to the first token, reading the documents not included."""
    tokens_per_second: float
    """Of the tokens after the first."""
    seconds: float
    peak_memory: int
    """Most bytes that the process has held so far."""

    def to_dict(self, num_citations: int = 5) -> dict[str, Any]:
        """All fields, as JSON takes them, with the first citations of each kind."""
        sentences = [replace(sentence, citations=sentence.citations[:num_citations]) for sentence in self.sentences]
        return asdict(replace(self, citations=self.citations[:num_citations], sentences=sentences))


class AnswerStream(Iterator[str]):
    """The pieces of an answer as they are decoded, by a thread of their own; `answer` is the whole afterwards.

    `close()` stops decoding after the token under way; so does dropping the stream.
    """

    def __init__(self, decode: Callable[..., Answer]):
        self._decoding = _Decoding()
        self._thread = threading.Thread(target=self._decoding.run, args=(decode,), daemon=True)
        self._thread.start()

    def __next__(self) -> str:
        piece = None if self._decoding.closed.is_set() else self._decoding.pieces.get()
        if piece is not None:
            return piece
        self.close()
        if isinstance(self._decoding.outcome, BaseException):
            raise self._decoding.outcome
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The answer; decodes what is left of it. After `close()`, what had been decoded by then."""
        for _ in self:
            pass
        assert isinstance(self._decoding.outcome, Answer)
        return self._decoding.outcome

    def close(self) -> None:
        """Stop decoding."""
        self._decoding.closed.set()
        self._thread.join()

    def __del__(self) -> None:
        self._decoding.closed.set()


class _Decoding:
    """What a stream and its thread share; the thread does not hold the stream, so that it can be dropped."""

    def __init__(self) -> None:
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.closed = threading.Event()
        self.outcome: Answer | BaseException | None = None

    def run(self, decode: Callable[..., Answer]) -> None:
        try:
            self.outcome = decode(self.pieces.put, _WhenSet(self.closed))
        except BaseException as error:  # raised again where the stream is read
            self.outcome = error
        finally:
            self.pieces.put(None)


class AnswerStreamer(BaseStreamer):
    """A streamer for transformers' `generate`: hands text on as it becomes final, and keeps the time of every token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self._detokenizer = Detokenizer(tokenizer)
        self._on_text = on_text
        self._is_prompt = True  # it comes first
        self.token_times: list[float] = []
        self.text = ""
        self.token_ends: list[int] = []
        """Characters of the text that were final behind every token."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then the newest token."""
        if not self._is_prompt:
            self.token_times.append(time.perf_counter())
            self._hand_on(self._detokenizer.push(int(value)))
            self.token_ends.append(len(self.text))
        self._is_prompt = False

    def end(self) -> None:
        """No tokens come any more."""
        self._hand_on(self._detokenizer.finish())

    def _hand_on(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._on_text(piece)


class _WhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
