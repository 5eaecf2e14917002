"""What was asked, and what became of it so far: the state of one request of a user, apart from any model.

    waiting -> reading (chunk by chunk) -> decoding (token by token, each choice on its own) -> done

A job speaks to who asked by events; the last one of every job is `Done` or `Failed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from focusllm.config import FocusConfig
from focusllm.decoding.request import Request
from focusllm.documents.answer import Citation, Sentence
from focusllm.documents.detokenizer import Detokenizer
from focusllm.documents.document import Context
from focusllm.memory.chunking import cut, split, split_start, steps
from focusllm.memory.chunks import ChunkBlock
from focusllm.serving.sampling import Chosen, Sampler, Sampling
from focusllm.serving.stops import StopStrings


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from: chunks that are to be read, or were, and the local context behind them."""

    local_ids: list[int]
    start_ids: list[int] = field(default_factory=list)
    """What the chunks are read behind."""
    pieces: list[list[int]] = field(default_factory=list)
    """Chunks that are to be read, in order."""
    steps: list[int] = field(default_factory=list)
    """Tokens from the start of each of these to the start of the next: they may overlap."""
    blocks: list[ChunkBlock] = field(default_factory=list)
    """Chunks that were read already; they stand first."""
    prompt_length: int | None = None
    word_scores: torch.Tensor | None = None
    """See `decoding.request.Request`, both."""
    token_ids: list[int] = field(default_factory=list)
    """All of it, or as much as the tokens that are chosen depend on."""
    num_tokens: int = 0
    """Of all of it."""
    context: Context | None = None
    """The documents that are asked, to be cited; their chunks are the first ones."""

    @classmethod
    def of(cls, token_ids: Sequence[int], config: FocusConfig, prompt_length: int | None = None) -> Prompt:
        """A text of any length: what does not fit into the local context becomes chunks."""
        far, local = split(token_ids, config)
        start, rest = split_start(far, config)
        ids = list(token_ids)
        return cls(
            local, start, *cut_pieces(rest, config), prompt_length=prompt_length, token_ids=ids, num_tokens=len(ids)
        )


def cut_pieces(token_ids: list[int], config: FocusConfig) -> tuple[list[list[int]], list[int]]:
    """The chunks of a text, and the tokens from the start of each to the start of the next, or to the end."""
    bounds = cut(len(token_ids), config)
    return [token_ids[first:stop] for first, stop in bounds], steps([first for first, _ in bounds], len(token_ids))


@dataclass(frozen=True)
class Usage:
    """How many tokens a job took."""

    prompt: int
    cached: int
    """Of the prompt: those in chunks that had been read before."""
    written: int
    """Of the prompt: those in chunks that were read now, and are kept."""
    generated: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Progress:
    """Reading goes on: tokens of chunks, all of them and those that are there, of these the ones that were before."""

    total: int
    processed: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """A piece of a choice's text, perhaps empty, and the tokens that it came with."""

    choice: int
    text: str
    tokens: tuple[Chosen, ...]


@dataclass(frozen=True)
class Cited:
    """A sentence of a choice about documents is complete; told before the piece that its last character is in.

    Where a sentence ends is judged by it alone, so that it is known at once; `Finished` judges by all of the text.
    """

    choice: int
    sentence: Sentence
    next_start: int
    """Where the next sentence begins."""


@dataclass(frozen=True)
class Finished:
    """A choice is complete: `stop` (the model's end, or `stop_string`) or `length`."""

    choice: int
    reason: str
    stop_string: str | None = None
    citations: Sequence[Citation] | None = None
    """Where in documents the model looked while the choice was written; None: none were asked."""
    sentences: Sequence[Sentence] = ()
    """The same for each sentence of it."""


@dataclass(frozen=True)
class Done:
    """All choices are complete, or the job was cancelled."""

    usage: Usage


@dataclass(frozen=True)
class Failed:
    """Nothing more comes: a `FocusError` is for who asked, anything else is ours."""

    error: BaseException


Event = Progress | Piece | Cited | Finished | Done | Failed


@dataclass(eq=False)
class Choice:
    """One of a job's answers while it is decoded."""

    job: Job
    number: int
    request: Request
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopStrings
    token_ids: list[int]
    """All tokens so far, the prompt's too, as far as they are looked at."""
    num_generated: int = 0
    held: list[Chosen] = field(default_factory=list)
    """Tokens whose text was not handed on yet."""
    said: str = ""
    """What was handed on."""
    num_cited: int = 0
    """Characters of it in sentences that `Cited` was told of."""
    token_ends: list[int] = field(default_factory=list)
    """Characters of that when each token had been chosen."""

    @property
    def newest(self) -> int:
        """The token that the next step reads."""
        return self.token_ids[-1]


@dataclass(eq=False)
class Job:
    """One request of a user.

    Args:
        emit: called with every event, by the thread that has the model; must return at once.
        owner: whose it is; owners take turns where not all can be served at once.
    """

    prompt: Prompt
    sampling: Sampling
    emit: Callable[[Event], None]
    owner: str = ""

    is_cancelled: bool = False
    """Set by anyone at any time; its work ends with the step under way."""
    choices: list[Choice] = field(default_factory=list)
    """Those that are being decoded."""
    num_cached: int = 0
    num_written: int = 0
    """Tokens in chunks that were there, and that were read for it."""
    num_generated: int = 0
    since: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """End its work within one step."""
        self.is_cancelled = True

    def progress(self) -> Progress:
        """How far reading is."""
        total, done = sum(self.prompt.steps), self.num_cached + self.num_written
        return Progress(total, done, self.num_cached, time.monotonic() - self.since)

    def usage(self) -> Usage:
        """What it took so far."""
        known = sum(block.token_ids.numel() for block in self.prompt.blocks)
        return Usage(self.prompt.num_tokens, self.num_cached + known, self.num_written, self.num_generated)
