"""Logits to a token, as one request wants it: transformers' own processors, and a generator of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

COLDEST = 1e-4
"""Temperatures below take the likeliest token: scores divided by them leave the numbers' range."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen, and when they end."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    """The same seed, the same tokens, whoever else is decoded beside."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    top_logprobs: int | None = None
    """With each token its logarithmic probability, and those of so many of the likeliest; None: none."""
    num_choices: int = 1
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever the model says (for measuring)."""


@dataclass(frozen=True)
class Logprob:
    """A token that was chosen, or might have been."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Chosen:
    """The next token; with its logarithmic probability, and the likeliest ones, if they were asked for."""

    token: int
    logprob: float = 0.0
    top: tuple[Logprob, ...] = ()


class Sampler:
    """Chooses the tokens of one choice of a request.

    Args:
        sampling: what the request says. defaults: what the model's own settings say of penalties and forbidden tokens.
        number: which of the request's choices it is; each has other luck.
        device: where the logits are.
    """

    def __init__(self, sampling: Sampling, defaults: GenerationConfig, number: int, device: torch.device):
        self._top = sampling.top_logprobs
        self._is_greedy = sampling.temperature < COLDEST
        self._processors = LogitsProcessorList(_processors(sampling, defaults, device))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + number) % 2**63)

    def choose(self, logits: Tensor, token_ids: Sequence[int]) -> Chosen:
        """The next token.

        Args:
            logits: [V]. token_ids: all tokens so far, the prompt's too.
        """
        scores = logits.float()[None]
        if self._processors:
            scores = self._processors(torch.tensor([list(token_ids)], device=logits.device), scores)
        if self._is_greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))
        if self._top is None:
            return Chosen(token)
        logprobs = logits.float().log_softmax(-1).clamp(min=LEAST_LOGPROB)  # the model's own, before any of the above
        best = logprobs.topk(self._top)
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Chosen(token, float(logprobs[token]), tuple(Logprob(*pair) for pair in top))


def _processors(sampling: Sampling, defaults: GenerationConfig, device: torch.device) -> list[Any]:
    """In transformers' order."""
    found: list[Any] = []
    if defaults.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(defaults.repetition_penalty))
    if defaults.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(defaults.suppress_tokens, device=str(device)))
    if sampling.temperature < COLDEST:
        return found
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found
