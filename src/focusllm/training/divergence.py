"""What a teacher says of the next token, and how far a student is from it.

    teacher's logits [M, V] --targets_of--> log-probabilities [M, k + 1]: its k likeliest tokens, and all others as one
    student's logits [M, V], targets --divergence--> KL(teacher || student) [M]

With all tokens that is the divergence over the whole vocabulary; with k of them it is never more than that, and a
student that agrees on the k and on how likely the rest is has none. Pure functions of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """A teacher's distributions of the next token at M positions.

    Args:
        token_ids: [M, k], its likeliest tokens; None: the whole vocabulary, in its order.
        log_probs: [M, k + 1], theirs and behind them that of all other tokens together; or [M, V]. float32.
        temperature: at which both, teacher and student, are compared.
    """

    token_ids: Tensor | None
    log_probs: Tensor
    temperature: float = 1.0


def targets_of(logits: Tensor, top_k: int | None, temperature: float = 1.0) -> Targets:
    """What is kept of a teacher's logits [M, V].

    Args:
        top_k: how many tokens are told apart; None, or as many as there are: all.
    """
    if top_k is None or top_k >= logits.shape[1]:
        return Targets(None, torch.log_softmax(logits.float() / temperature, 1), temperature)
    token_ids = logits.topk(top_k, 1).indices
    return Targets(token_ids, _some_and_rest(logits, token_ids, temperature), temperature)


def divergence(logits: Tensor, targets: Targets) -> Tensor:
    """KL(teacher || student), [M] in nats, for a student's logits [M, V]; differentiable in them.

    At a temperature T it is times T squared, so that gradients keep their size (Hinton et al., arXiv 1503.02531).
    """
    temperature, wanted = targets.temperature, targets.log_probs
    if targets.token_ids is None:
        found = torch.log_softmax(logits.float() / temperature, 1)
    else:
        found = _some_and_rest(logits, targets.token_ids, temperature)
    return (wanted.exp() * (wanted - found)).sum(1) * temperature**2


def _some_and_rest(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [M, k + 1] of some tokens, and of all others together."""
    scaled = logits.float() / temperature
    rest = scaled.scatter(1, token_ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.log_softmax(torch.cat([scaled.gather(1, token_ids), rest], 1), 1)
