"""The lengths and options of the method, checked once. Knows numbers only: no torch, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from focusllm.errors import ConfigError

FarContext = Literal["auto", "condensed", "opened"]
Decoding = Literal["cached", "exact"]
KvDtype = Literal["same", "int8", "int4"]
KvPlace = Literal["auto", "device", "host", "disk"]
Weights = Literal["auto", "plain", "packed", "int8"]
CHOICES = {"far_context": FarContext, "decoding": Decoding, "kv_dtype": KvDtype, "kv_place": KvPlace}


@dataclass(frozen=True)
class FocusConfig:
    """How a text is cut and how it is decoded. All lengths are in tokens.

    Raises:
        ConfigError: a length below 1, or an unknown decoding mode.
    """

    chunk_length: int = 1024
    """Length of one chunk of the far context (paper section 3.1; the released code calls it stride). Longer ones are
    asked again sooner; which look up more precisely depends on the candidate projections (docs/method.md)."""
    chunk_overlap: int | None = None
    """Tokens that a chunk begins with and the one before it ends with: what is no longer than that is whole in one of
    them, wherever a text is cut. None: 64, or a quarter of a shorter chunk."""
    local_length: int = 512
    """Most tokens that the local context holds when decoding starts; a shorter text is the base model's alone."""
    prompt_length: int = 64
    """Most tokens of the dynamic prompt: the tail of the local context that is read behind every chunk."""
    chunks_per_batch: int = 8
    """Most chunks read in one forward pass: bounds the scratch memory, does not change the result."""
    decoding: Decoding = "cached"
    """`cached` keeps the local context's keys and values; `exact` encodes it anew for every token (the paper)."""
    refresh_rows: int | None = 4
    """Chunks of a length that the local context sees, condensed anew for every token: the last quarter of so many are
    those right before the local context, the rest those that get most attention. The others are only scored, and change
    places with them when they would get more. None: all. `exact` takes all."""
    far_context: FarContext = "auto"
    """How the local context sees a chunk: `condensed` into a candidate token (the paper), or `opened`, all tokens of
    the few that matter, which needs no training (docs/method.md). auto: condensed where candidate projections were
    trained for the model, else opened."""
    open_tokens: int | None = None
    """opened: most tokens of the far context that are seen at once; whole chunks, as many as it holds, or the part of
    one that matters most. None: one chunk; each further one costs some of the answers (docs/method.md)."""
    look_again: int | None = None
    """opened: after so many generated tokens the chunks are chosen anew, by the newest tokens. None: only when the
    local context is full and its oldest tokens become chunks."""
    start_length: int = 16
    """opened: first tokens of a text that all of its chunks are read behind, if it is gone on with; documents are read
    behind the chat template's head, or the tokenizer's own first token."""
    kv_dtype: KvDtype = "same"
    """How the chunks' keys and values are kept: as computed, or in 8 or 4 bits a number (less memory, less exact)."""
    kv_place: KvPlace = "auto"
    """Where they are kept: on the device, in host memory beside a GPU, or on disk. auto: the first that has room."""

    # What the authors' released code does besides. Off by default; `paper()` switches them on.
    rechunk: bool = True
    """Turn the oldest local tokens into a new chunk when the local context is full (the paper lets it grow)."""
    plain_below: int | None = None
    """Texts with fewer tokens go to the base model alone. None: those that fit into the local context."""
    bos_token_id: int | None = None
    """Put this token in front of the dynamic prompt and of the local context unless it is there. None: do not."""

    def __post_init__(self) -> None:
        for name in ("chunk_length", "local_length", "prompt_length", "chunks_per_batch"):
            value = getattr(self, name)
            if not is_whole(value, 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        overlap = self.overlap
        if not is_whole(overlap, 0) or overlap >= self.chunk_length:
            raise ConfigError(
                f"chunk_overlap is {overlap!r}; it must be a whole number from 0 to below chunk_length, which is "
                f"{self.chunk_length}."
            )
        for name in ("plain_below", "bos_token_id"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 0):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 0, or None.")
        for name in ("open_tokens", "look_again"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1, or None.")
        if not is_whole(self.start_length, 0):
            raise ConfigError(f"start_length is {self.start_length!r}; it must be a whole number of at least 0.")
        if not isinstance(self.rechunk, bool):
            raise ConfigError(f"rechunk is {self.rechunk!r}; it must be True or False.")
        rows = self.refresh_rows
        if rows is not None and not is_whole(rows, 1):
            raise ConfigError(f"refresh_rows is {rows!r}; it must be a whole number of at least 1, or None for all.")
        if self.far_context == "opened" and self.decoding == "exact":
            raise ConfigError("decoding is 'exact', which condenses, but far_context is 'opened'; use 'cached'.")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)

    @classmethod
    def paper(
        cls, chunk_length: int = 2048, local_length: int = 2048, plain_below: int = 4096, bos_token_id: int | None = 1
    ) -> FocusConfig:
        """The settings of the paper (section 4.1) with the habits of its released code.

        They are: a dynamic prompt of 512 tokens, texts below a literal 4096 tokens left to the base model, the token
        1 put in front of the dynamic prompt and of the local context, and a local context that only grows.
        """
        return cls(
            chunk_length=chunk_length,
            chunk_overlap=0,
            local_length=local_length,
            prompt_length=512,
            far_context="condensed",
            decoding="exact",
            rechunk=False,
            plain_below=plain_below,
            bos_token_id=bos_token_id,
        )

    @property
    def overlap(self) -> int:
        """Tokens that neighbouring chunks share."""
        return self._overlap_of(self.chunk_length)

    def _overlap_of(self, chunk_length: int) -> int:
        return min(64, chunk_length // 4) if self.chunk_overlap is None else self.chunk_overlap

    @property
    def stride(self) -> int:
        """Tokens from the start of a chunk to the start of the next."""
        return self.chunk_length - self.overlap

    @property
    def most_prompt_tokens(self) -> int:
        """Length of the dynamic prompt where there are enough local tokens: never longer than a chunk."""
        return min(self.prompt_length, self.chunk_length)

    @property
    def rechunk_length(self) -> int:
        """How many local tokens become a chunk at once when the local context is full."""
        return min(self.chunk_length, self.local_length)

    def settled(self, trained: bool) -> FocusConfig:
        """A copy in which `far_context` is not `auto`.

        Args:
            trained: whether the model has candidate projections that were trained for it.
        """
        if self.far_context != "auto":
            return self
        condense = trained or self.decoding == "exact"  # which is a way of condensing
        return dataclasses.replace(self, far_context="condensed" if condense else "opened")

    @property
    def budget(self) -> int:
        """Most tokens that are open at once."""
        return self.chunk_length if self.open_tokens is None else self.open_tokens

    @property
    def is_opened(self) -> bool:
        """Whether chunks are opened; `auto` must have been settled by what is known of the model."""
        return self.far_context == "opened"

    @property
    def max_local_length(self) -> int:
        """Most tokens that the local context ever holds (given tokens and generated ones)."""
        return self.local_length + self.rechunk_length

    @property
    def max_row_length(self) -> int:
        """Most positions that a row takes: the chunk, then dynamic prompt and generated tokens, all of it local."""
        return self.chunk_length + self.max_local_length

    def is_plain(self, num_tokens: int) -> bool:
        """Whether a text of `num_tokens` tokens goes to the base model alone."""
        limit = self.local_length + 1 if self.plain_below is None else self.plain_below
        return num_tokens < limit

    def is_focused(self, num_alike: int) -> bool:
        """Whether some of `num_alike` chunks of one length are condensed anew for a token and others are not."""
        return self.decoding == "cached" and self.refresh_rows is not None and self.refresh_rows < num_alike

    def check_positions(self, max_positions: int) -> None:
        """Check that rows and local context stay inside a base model's positions.

        Raises:
            ConfigError: naming the settings, what they take and a chunk_length that works, if there is one.
        """
        prompt = self.most_prompt_tokens + (self.bos_token_id is not None)
        if self.rechunk and self.max_row_length > max_positions:
            behind, what, other = self.max_local_length, f"up to {self.max_local_length} local tokens", "local_length"
            room = max_positions - self.local_length  # for a chunk, and for as much behind it as is rechunked at once
            largest = max(room - self.local_length, min(room // 2, self.local_length))
        elif self.chunk_length + prompt > max_positions:
            behind, what, other = prompt, f"a dynamic prompt of {prompt} tokens", "prompt_length"
            largest = max_positions - prompt
        else:
            return
        remedy = f"a chunk_length of at most {largest}, or a smaller {other}" if largest > 0 else f"a smaller {other}"
        raise ConfigError(
            f"a row of chunk_length {self.chunk_length} and {what} takes {self.chunk_length + behind} positions, but "
            f"the base model has {max_positions}; use {remedy}."
        )

    def check_num_chunks(self, num_chunks: int, max_positions: int) -> None:
        """Check that all candidates and the local context fit into the base model's positions.

        Raises:
            ConfigError: too many chunks; names the chunk length that would do, or the longest text if none would.
        """
        if num_chunks > max_positions - self.max_local_length:
            # Longer chunks leave room for two local lengths of local tokens, behind a chunk and behind the candidates.
            largest = max(max_positions - 2 * self.local_length, 1)
            num_tokens = num_chunks * self.stride

            def holds(chunk_length: int) -> int:
                return largest * (chunk_length - self._overlap_of(chunk_length))

            enough = (length for length in range(self.chunk_length, largest + 1) if holds(length) >= num_tokens)
            needed = next(enough, None)
            remedy = f"use a chunk_length of at least {needed}"
            if needed is None:
                remedy = f"no chunk_length holds many more than {holds(largest)} tokens beside this local_length"
            raise ConfigError(
                f"{num_chunks} chunks need {num_chunks} positions beside {self.max_local_length} for the local "
                f"context, but the base model has {max_positions}; {remedy}."
            )

    def replace(self, **changes: Any) -> FocusConfig:
        """A copy with some fields changed, checked again."""
        self.check_names(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def check_names(cls, settings: Iterable[str]) -> None:
        """Check that there are settings of these names.

        Raises:
            ConfigError: one that there is not; names those there are.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known settings are: {', '.join(known)}.")

    def resolved(self) -> FocusConfig:
        """A copy that says what is chosen where nothing is set, as results keep it."""
        return self.replace(chunk_overlap=self.overlap)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return dataclasses.asdict(self)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check that a setting is one of the values of a `Literal`.

    Raises:
        ConfigError: it is not; names those there are.
    """
    known = get_args(choices)
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; it must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.")


def parse_weights(weights: str) -> Weights:
    """Which second copies of the weights are asked for.

    Raises:
        ConfigError: there are no such ones.
    """
    check_choice("weights", weights, Weights)
    return cast(Weights, weights)


def is_whole(value: object, least: int) -> bool:
    """Whether a setting is a whole number, and large enough."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
