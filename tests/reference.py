"""The paper's loop in plain torch: one chunk at a time, no cache, nothing shared with the package but the weights.

A Llama only. Every fast path is compared with this. `exact_logits` is the paper's computation; `cached_logits` is the
definition of cached decoding (every local token sees the candidates that were made when it was the newest),
recomputed from scratch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focusllm.method.adapter import CandidateLinear


def _rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    width = x.shape[-1]
    angle = positions[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    angle = torch.cat([angle, angle], -1)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


def _project(wrapper: nn.Module, x: Tensor, candidates: Tensor) -> Tensor:
    assert isinstance(wrapper, CandidateLinear)
    ordinary = wrapper.base(x)
    trained = (
        ordinary + wrapper.scale * x @ wrapper.lora_A.T @ wrapper.lora_B.T
        if wrapper.is_low_rank
        else F.linear(x, wrapper.weight, wrapper.bias)
    )
    return torch.where(candidates[:, None], trained, ordinary)


def forward(
    model: nn.Module,
    ids: list[int],
    candidates: Tensor,
    positions: Tensor,
    mask: Tensor,
    earlier: list[tuple[Tensor, Tensor]] | None = None,
    earlier_positions: Tensor | None = None,
    shares: list[Tensor] | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """One text through the layers.

    Args:
        ids: T tokens. candidates: [T], True where the candidate projections are used. positions: [T].
        mask: [T, S + T], what sees what; the S earlier tokens come first.
        earlier: per layer, unrotated keys and values [K, S, D] of earlier tokens; earlier_positions: [S].
        shares: gets a layer's attention [H, T, S + T], also what would be paid to what is not seen.

    Returns:
        Unrotated keys and values [K, T, D] a layer, and logits [T, V].
    """
    config = model.config
    theta, width = config.rope_parameters["rope_theta"], config.hidden_size // config.num_attention_heads
    x = model.model.embed_tokens(torch.tensor(ids))
    kept = []
    for i, layer in enumerate(model.model.layers):
        h = layer.input_layernorm(x)
        attention = layer.self_attn
        q, k, v = (
            _project(getattr(attention, f"{name}_proj"), h, candidates).view(len(ids), -1, width).transpose(0, 1)
            for name in "qkv"
        )
        kept.append((k, v))
        at = positions
        if earlier is not None:
            k, v = torch.cat([earlier[i][0], k], 1), torch.cat([earlier[i][1], v], 1)
            at = torch.cat([earlier_positions, positions])
        groups = q.shape[0] // k.shape[0]
        keys, values = _rope(k, at, theta).repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = _rope(q, positions, theta) @ keys.transpose(1, 2) / width**0.5
        visible = scores.masked_fill(~mask, -torch.inf)
        out = visible.softmax(-1) @ values
        if shares is not None:
            shares.append((scores - visible.logsumexp(-1, keepdim=True)).exp())
        x = x + _project(attention.o_proj, out.transpose(0, 1).flatten(1), candidates)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return kept, model.lm_head(model.model.norm(x))


def candidates_of(model: nn.Module, chunks: list[list[int]], prompt: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Chunk by chunk, the last prompt token as the candidate: unrotated keys and values [K, R, D] a layer."""
    made = []
    for chunk in chunks:
        ids = chunk + prompt
        last = torch.arange(len(ids)) == len(ids) - 1
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        kept, _ = forward(model, ids, last, torch.arange(len(ids)), causal)
        made.append([(k[:, -1:], v[:, -1:]) for k, v in kept])
    layers = range(len(made[0]))
    return [tuple(torch.cat([one[i][part] for one in made], 1) for part in (0, 1)) for i in layers]


def _behind_sink(
    model: nn.Module, made: list[tuple[Tensor, Tensor]], slots: Tensor, sink: int | None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What the local pass sees before the local context, and where: the candidates, behind the sink if there is one."""
    if sink is None:
        return made, slots
    one = torch.ones(1, 1, dtype=torch.bool)
    kept, _ = forward(model, [sink], ~one[0], torch.zeros(1, dtype=torch.long), one)
    both = [
        tuple(torch.cat([s, m], 1) for s, m in zip(sunk, own, strict=True))
        for sunk, own in zip(kept, made, strict=True)
    ]
    return both, torch.cat([torch.zeros(1, dtype=torch.long), slots + 1])


def exact_logits(
    model: nn.Module, chunks: list[list[int]], prompt: list[int], local: list[int], sink: int | None = None
) -> Tensor:
    """The paper: logits [W, V] of the local context."""
    made, slots = _behind_sink(model, candidates_of(model, chunks, prompt), torch.arange(len(chunks)), sink)
    count, length = len(slots), len(local)
    mask = torch.cat(
        [torch.ones(length, count, dtype=torch.bool), torch.ones(length, length, dtype=torch.bool).tril()], 1
    )
    none = torch.zeros(length, dtype=torch.bool)
    positions = torch.arange(count, count + length)
    return forward(model, local, none, positions, mask, made, slots)[1]


def attention_to_candidates(
    model: nn.Module, chunks: list[list[int]], prompt: list[int], local: list[int], sink: int | None = None
) -> Tensor:
    """What the prompt's tokens would pay to each candidate [R] in a local context that sees none of them."""
    made, slots = _behind_sink(model, candidates_of(model, chunks, prompt), torch.arange(len(chunks)), sink)
    count, length = len(slots), len(local)
    seen = (torch.arange(count) < count - len(chunks)).expand(length, -1)  # the sink alone
    mask = torch.cat([seen, torch.ones(length, length, dtype=torch.bool).tril()], 1)
    none, shares = torch.zeros(length, dtype=torch.bool), []
    forward(model, local, none, torch.arange(count, count + length), mask, made, slots, shares)
    own = slice(count - len(chunks), count)
    return sum(share[:, -len(prompt) :, own].mean((0, 1)) for share in shares)


def cached_logits(
    model: nn.Module,
    chunks: list[list[int]],
    prompt: list[int],
    local: list[int],
    generated: list[int],
    sink: int | None = None,
) -> Tensor:
    """Cached decoding from scratch: logits [V] after the local context and the generated tokens.

    The given local tokens see the first candidate set; generated token t sees the set that was made with it.
    """
    every = [list(range(len(chunks)))] * (len(generated) + 1)
    return focused_logits(model, chunks, prompt, local, generated, every, sink)


def focused_logits(
    model: nn.Module,
    chunks: list[list[int]],
    prompt: list[int],
    local: list[int],
    generated: list[int],
    hot: list[list[int]],
    sink: int | None = None,
) -> Tensor:
    """Cached decoding where only some candidates are seen, from scratch: logits [V] after the generated tokens.

    Args:
        hot: [G + 1], the candidates that generated token g sees (g = 0: the given local tokens).
    """
    sets = [candidates_of(model, chunks, prompt + generated[:step]) for step in range(len(generated) + 1)]
    seen = torch.tensor([[slot in own for slot in range(len(chunks))] for own in hot]).flatten()
    count, length = len(chunks), len(local) + len(generated)
    of_token = (torch.arange(length) - (len(local) - 1)).clamp(min=0)
    of_key = torch.arange(len(sets)).repeat_interleave(count)
    mask = torch.cat(
        [(of_token[:, None] == of_key[None]) & seen, torch.ones(length, length, dtype=torch.bool).tril()], 1
    )
    earlier = [tuple(torch.cat([one[i][part] for one in sets], 1) for part in (0, 1)) for i in range(len(sets[0]))]
    none = torch.zeros(length, dtype=torch.bool)
    earlier, slots = _behind_sink(model, earlier, torch.arange(count).repeat(len(sets)), sink)
    if sink is not None:
        count, mask = count + 1, torch.cat([torch.ones(length, 1, dtype=torch.bool), mask], 1)
    return forward(model, local + generated, none, torch.arange(count, count + length), mask, earlier, slots)[1][-1]
