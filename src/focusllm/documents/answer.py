"""Answers: what they say of their origin and cost, and how their pieces are handed on while they are decoded."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer


@dataclass(frozen=True)
class Citation:
    """A chunk and its share of the attention to chunks while the answer was decoded; of a chunk whose candidate was not
    seen (see `FocusConfig.refresh_rows`), of what it would have got.
    """

    document: str
    chunk: int
    start: int
    end: int
    weight: float
    text: str


@dataclass(frozen=True)
class Answer:
    """An answer with its origin and its cost."""

    text: str
    citations: list[Citation]
    """All chunks of the far context, the most attended first; weights add up to 1."""
    num_document_tokens: int
    num_prompt_tokens: int
    num_generated_tokens: int
    time_to_first_token: float
    """Seconds from the question to the first token, reading the documents not included."""
    tokens_per_second: float
    """Of the tokens after the first."""
    seconds: float
    peak_memory: int
    """Most bytes that the process has held so far."""

    def to_dict(self, num_citations: int = 5) -> dict[str, Any]:
        """All fields, as JSON takes them, with the first citations."""
        return {**asdict(self), "citations": [asdict(citation) for citation in self.citations[:num_citations]]}


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


class TimedStreamer(TextStreamer):
    """transformers' streamer: hands pieces of text on as they become final, and keeps the time of every token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.token_times: list[float] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the newest token."""
        if not self.next_tokens_are_prompt:
            self.token_times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece of text on."""
        if text:
            self.text += text
            self.on_text(text)


class _WhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
