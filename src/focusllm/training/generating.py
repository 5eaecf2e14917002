"""The base model's own answers to prompts, several at once, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

BATCH = 8
"""Prompts that are answered together; those alike in length, for they are padded to the longest."""


@torch.no_grad()
def answers_to(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    most: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[tuple[list[int], Tensor]]:
    """Answer each prompt by the base model with full attention.

    Args:
        prompts: token ids, at least one each.
        most: tokens of an answer, its end included, which one that is cut off lacks.
        temperature: 0: the likeliest tokens; else drawn, by `seed` alone.

    Returns:
        In the order of the prompts: the answer's token ids, and the logits [tokens, V] that each was chosen by.
    """
    found: dict[int, tuple[list[int], Tensor]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            made = _generate(model, tokenizer, [prompts[i] for i in batch], most, temperature)
            found |= dict(zip(batch, made, strict=True))
    return [found[i] for i in range(len(prompts))]


def _generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, temperature: float
) -> list[tuple[list[int], Tensor]]:
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    end: int | None = tokenizer.eos_token_id
    settings: dict[str, Any] = {"do_sample": False}
    if temperature:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    # All that a model's own settings might change is said here: the teacher is the model, not its usual sampling.
    config = GenerationConfig(
        max_new_tokens=most, eos_token_id=end, pad_token_id=end or 0, repetition_penalty=1.0,
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip
    generate: Any = model.generate
    made = generate(ids, attention_mask=mask, generation_config=config)
    logits = torch.stack(made.logits, 1)  # [B, T, V]
    result = []
    for answer, row in zip(made.sequences[:, longest:].tolist(), logits, strict=True):
        length = answer.index(end) + 1 if end in answer else len(answer)
        result.append((answer[:length], row[:length].float()))
    return result
