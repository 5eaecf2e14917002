"""What every method shares: prompts as token ids, greedy decoding, limits. A method only says how text is read."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from focusllm.documents.text import encode_ids, frame_ids, start_tokens
from focusllm.errors import ConfigError
from focusllm.evaluation.example import Example, LossExample
from focusllm.llm import FocusLLM
from focusllm.machine import readable_bytes
from focusllm.memory.chunk_cache import LastText
from focusllm.memory.cost import total_memory
from focusllm.method.base import layout, run_plain

Step = Callable[[int], Tensor]
"""From a new token to the next token's logits [V]."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in the order in which it is read; `start` and `end` are the chat template's."""

    start: list[int]
    before: list[int]
    context: list[int]
    after: list[int]
    end: list[int]
    chat: bool
    query: str
    """The question as text, for methods that search with it: what stands behind the long text, if anything does."""

    @property
    def body(self) -> list[int]:
        """What stands inside the template."""
        return [*self.before, *self.context, *self.after]

    @property
    def ids(self) -> list[int]:
        """All of it."""
        return [*self.start, *self.body, *self.end]


@dataclass(frozen=True)
class Prediction:
    """An answer, and the seconds from the token ids of the prompt, its reading included."""

    text: str
    seconds: float
    first_token_seconds: float


class Method(ABC):
    """A way to let a model read long text.

    Args:
        llm: model and tokenizer; `llm.config.local_length` is the local budget that all methods are held to.
        chunks: the encoded chunks of the last text, which methods may share; None: this method's own.
        options: of this method, by name (`defaults` has them all).
    """

    name: ClassVar[str]
    """As the user types it."""
    defaults: ClassVar[dict[str, Any]] = {}
    """Its options."""
    version: ClassVar[int] = 1
    """Raised when what the model sees or how it answers changes: a run does not go on with another version."""
    least: ClassVar[dict[str, int]] = {}
    """The least value of those that are numbers; whole ones where the default is whole."""

    def __init__(self, llm: FocusLLM, chunks: LastText | None = None, **options: Any):
        self.chunks = LastText(llm.model.base) if chunks is None else chunks
        self.llm, self.base, self.tokenizer = llm, llm.model.base, llm.tokenizer
        self.options = {**self.defaults, **options}
        for name, least in self.least.items():
            value, kind = self.options[name], int if isinstance(self.defaults[name], int) else int | float
            if value != self.defaults[name] and (type(value) is bool or not isinstance(value, kind) or value < least):
                number = "whole number" if kind is int else "number"
                raise ConfigError(f"{self.name}: {name} is {value!r}; it must be a {number} of at least {least}.")
        self.window: int = layout(self.base).max_positions
        self.budget = llm.config.local_length
        self.encode = lru_cache(maxsize=8)(lambda text: encode_ids(self.tokenizer, text))
        own = self.base.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}

    def prompt(self, example: Example) -> Prompt:
        """Token ids of an example's prompt; its parts are tokenised apart, so that a document's chunks are its own."""
        start, end = frame_ids(self.tokenizer) if example.chat else (start_tokens(self.tokenizer), [])
        behind = example.after if end else example.after + example.answer_prefix
        before, context, after = (self.encode(text) for text in (example.before, example.context, behind))
        if end and example.answer_prefix:
            end = [*end, *self.encode(example.answer_prefix.lstrip())]
        query = example.after if example.after.strip() else example.before
        return Prompt(start, before, context, after, end, example.chat, query)

    def num_tokens(self, example: Example | LossExample) -> int:
        """What a window must hold: the prompt and the longest answer, or the text without its last token."""
        if isinstance(example, LossExample):
            return len(example.text_ids) - 1
        return len(self.prompt(example).ids) + example.max_new_tokens

    @property
    def sees(self) -> str:
        """What of a text the model decodes from, in words, for reports."""
        return "all of the text"

    def fits(self, num_tokens: int) -> str | None:
        """None, or the reason why so long a text cannot be read. By default the whole of it is attended to."""
        per_token = layout(self.base).kv_bytes_per_token * self.base.dtype.itemsize
        weights = sum(parameter.nbytes for parameter in self.base.parameters())
        needed, there = weights + per_token * num_tokens, total_memory(self.base.device)
        if needed > there:
            taken = f"weights, keys and values take {readable_bytes(needed)}"
            return f"{taken}, and there are {readable_bytes(there)} of memory"
        return None

    @abstractmethod
    def start(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Step]:
        """Read a prompt: the next token's logits [V], and a function that goes on from a token."""

    @abstractmethod
    def loss(self, example: LossExample) -> tuple[float, int]:
        """Negative log likelihood of the labels in nats, summed, and their number."""

    @torch.no_grad()
    def generate(self, example: Example) -> Prediction:
        """The greedy answer, up to an end token, a stop string or the longest length."""
        prompt, made = self.prompt(example), list[int]()
        begin = time.perf_counter()
        logits, step = self.start(prompt, example.max_new_tokens)
        if example.never_empty:
            logits = logits.index_fill(0, self.tensor(sorted(self.ends | self._stops(example)))[0], -torch.inf)
        token = int(logits.argmax())
        first = time.perf_counter() - begin
        while token not in self.ends:
            made.append(token)
            answer = self._answer(made, example)
            if len(made) == example.max_new_tokens or any(stop in answer for stop in example.stop):
                break
            if example.never_empty and token in self._stops(example):
                break
            token = int(step(token).argmax())
        text = self._answer(made, example)
        for stop in example.stop:
            text = text.partition(stop)[0]
        return Prediction(text, time.perf_counter() - begin, first)

    def _answer(self, made: list[int], example: Example) -> str:
        """What generated tokens say; of an answer that is not to be empty from behind the stop strings it begins with,
        as one token may be two of them.
        """
        text = self.decode(made)
        while example.never_empty and text.startswith(example.stop):
            text = text.removeprefix(next(stop for stop in example.stop if text.startswith(stop)))
        return text

    def _stops(self, example: Example) -> set[int]:
        """The tokens that end stop strings."""
        return {encode_ids(self.tokenizer, stop)[-1] for stop in example.stop}

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """[1, T] where the model is."""
        return torch.tensor([list(ids)], device=self.base.device)


class WindowMethod(Method):
    """A method that picks tokens and lets the base model attend to all of them, `size` at most."""

    @property
    def size(self) -> int:
        """Most tokens that the model is given."""
        return self.window

    def choose(self, prompt: Prompt, room: int) -> list[int]:
        """At most `room` tokens of a prompt; by default all."""
        return prompt.ids

    def choose_text(self, example: LossExample) -> Sequence[int]:
        """At most `size` tokens of a text and its last label; by default all."""
        return example.text_ids

    def start(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Step]:
        """The base model's own prefill and cached steps."""
        cache = DynamicCache(config=self.base.config)
        ids = self.choose(prompt, self.size - max_new_tokens)
        logits = run_plain(self.base, self.tensor(ids), cache, 1)[0, -1]
        return logits, lambda token: run_plain(self.base, self.tensor([token]), cache, 1)[0, -1]

    @torch.no_grad()
    def loss(self, example: LossExample) -> tuple[float, int]:
        """One pass of the base model."""
        ids = self.tensor(self.choose_text(example))
        logits = run_plain(self.base, ids[:, :-1], DynamicCache(config=self.base.config), example.labels)[0]
        return sum_of_losses(logits, ids[0, -example.labels :]), example.labels


class ShortenedMethod(WindowMethod):
    """Texts of any length, cut to the base model's window (`to=base`, the default) or the local budget (`to=local`)."""

    defaults = {"to": "base"}  # noqa: RUF012

    def __init__(self, llm: FocusLLM, chunks: LastText | None = None, **options: Any):
        super().__init__(llm, chunks, **options)
        if self.options["to"] not in ("base", "local"):
            raise ConfigError(f"{self.name}: to is {self.options['to']!r}; it must be base or local.")

    @property
    def size(self) -> int:
        """Most tokens that the model is given, the answer included."""
        return self.window if self.options["to"] == "base" else self.budget

    def fits(self, num_tokens: int) -> str | None:
        """Always."""
        return None


def sum_of_losses(logits: Tensor, labels: Tensor) -> float:
    """Cross entropies [n, V] x [n] in nats, summed; in float32 whatever the model's type."""
    return float(F.cross_entropy(logits.float(), labels, reduction="sum"))
