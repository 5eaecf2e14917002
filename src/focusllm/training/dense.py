"""Dense supervision: one pass over the rows and one over the local contexts, and every answer position has its label.

The paper's training supervises one token a sequence. Cached decoding, teacher-forced, supervises them all:

    row i        [ chunk i | prompt | answer ] of every sample, packed: ordinary tokens, frozen, read without a graph
                                 c c c c       a candidate at each answer position: sees chunk i, its own sample's
                                 | | | |       tokens before it, and itself
                                 v v v v
    local pass   [ sets of candidates | local context | answer ]   each answer position sees the set that was made
                                                                   there, earlier positions the first set

Several samples share the chunks of one memory, which are encoded once. The result is exactly what `cached` decoding
computes step by step (tested), so what is trained is what is used. With focused refresh too (`Sample.refreshed`): the
other rows are not seen and not read, so memories may have many chunks.

Letters: S samples, R chunks (rows), C tokens of a chunk, N candidates a row (all samples' answer positions), M the
answer positions of a sample, T tokens, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from focusllm.method.adapter import sink_token
from focusllm.method.base import run
from focusllm.method.differentiable import bias_of, masked_sets, over_sets
from focusllm.method.focus import Over, encode_chunks, focus_logits, mover
from focusllm.method.kv import KV, Segment, concat
from focusllm.method.scoring import Scoring
from focusllm.training.config import LABELS_PER_PASS
from focusllm.training.divergence import Targets, divergence

Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sample:
    """A local context with its answer, to be decoded from some memory."""

    token_ids: Sequence[int]
    """The local context, then the answer."""
    num_answers: int
    """How many tokens at the end are labels; at least one token stands before them."""
    prompt_length: int
    """Most tokens of the dynamic prompt."""
    objective: str = "continuation"
    """What the loss is reported under."""
    refreshed: tuple[int, ...] | None = None
    """Rows whose candidates are seen, at least one; the others only take their slots. None: all.
    Samples that are worked on together (`packs_of`) refresh each other's as well."""
    labels: Sequence[int] | None = None
    """The right tokens at the answer positions, where those that are read there differ. None: they are the same."""
    window: Sequence[int] = ()
    """What a teacher reads before the answer, in place of memory and local context; empty: it is not asked."""
    truth: str | None = None
    """What the teacher's own answer must say to be taken for the true one; None: it reads the true one."""
    targets: Targets | None = None
    """What the teacher says at the answer positions; None: labels are all there is."""

    @property
    def newest(self) -> int:
        """Index of the token that is the newest when the first answer token is predicted."""
        return len(self.token_ids) - self.num_answers - 1

    @property
    def start(self) -> int:
        """Index of the first token of the dynamic prompt."""
        return max(0, self.newest + 1 - self.prompt_length)

    @property
    def answers(self) -> Sequence[int]:
        """The labels."""
        return self.token_ids[-self.num_answers :] if self.labels is None else self.labels


def dense_loss(
    model: nn.Module,
    chunk_kv: KV,
    samples: Sequence[Sample],
    checkpointed: bool = False,
    passes: int = 0,
    labels_per_pass: int = LABELS_PER_PASS,
) -> tuple[Tensor, Tensor]:
    """Losses and labels of all answer tokens.

    Args:
        chunk_kv: [R, K, C, D] a layer, from `encode_chunks`.
        checkpointed: keep no activations but recompute both passes for the gradients: less memory, a third more time.
        passes: go through the model at least so often (see `num_passes`), with passes that count for nothing if need
            be: processes that share one model's weights must do so equally often.
        labels_per_pass: samples with at most so many labels are worked on together (see `packs_of`).

    Returns:
        As `answer_losses`.
    """
    logits = dense_logits(model, chunk_kv, samples, checkpointed, passes, labels_per_pass)
    return answer_losses(logits, samples)


def answer_losses(logits: Tensor, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Losses of logits [labels, V] at the answer positions of samples, in their order.

    Returns:
        Divergences from what a teacher says, where it was asked, else cross entropies [labels]; and which labels are
        right under greedy decoding (a boolean tensor of the same shape).
    """
    labels = torch.tensor([x for s in samples for x in s.answers], device=logits.device)
    wide = logits.float() if logits.dtype.itemsize == 2 else logits
    sizes = [sample.num_answers for sample in samples]
    losses = [
        F.cross_entropy(found, right, reduction="none") if s.targets is None else divergence(found, s.targets)
        for s, found, right in zip(samples, torch.split(wide, sizes), torch.split(labels, sizes), strict=True)
    ]
    return torch.cat(losses), logits.detach().argmax(-1) == labels


def exact_loss(
    model: nn.Module, chunks: Sequence[Tensor], prompt: Tensor, local: Tensor, label: Tensor
) -> tuple[Tensor, Tensor]:
    """The paper's loss: one label a sequence, the token behind the local context (section 3.4).

    Args:
        chunks, prompt, local: as `focus_logits` takes them. label: scalar.

    Returns:
        Cross entropy, scalar, and the logits [V]; differentiable in the projections.
    """
    logits = focus_logits(model, chunks, prompt, local)[-1]
    wide = logits.float() if logits.dtype.itemsize == 2 else logits
    return F.cross_entropy(wide, label), logits


def base_logits(model: nn.Module, token_ids: Sequence[int], count: int) -> Tensor:
    """Logits [count, V] at the last tokens of a text, whose answer they are, by the base model alone."""
    ids = torch.tensor([list(token_ids[:-1])], device=next(model.parameters()).device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logits = run(model, ids, positions, Over(), logits_to_keep=count)
    assert logits is not None
    return logits[0]


def num_passes(samples: Sequence[Sample], labels_per_pass: int = LABELS_PER_PASS) -> int:
    """How often `dense_loss` goes through the model for these samples, each time with the same passes."""
    return len(packs_of(samples, labels_per_pass))


def dense_logits(
    model: nn.Module,
    chunk_kv: KV,
    samples: Sequence[Sample],
    checkpointed: bool = False,
    passes: int = 0,
    labels_per_pass: int = LABELS_PER_PASS,
) -> Tensor:
    """Logits [labels, V] of all answer tokens, in the order of the samples; differentiable in the projections."""
    call: Call = _recomputed if checkpointed and torch.is_grad_enabled() else _plainly
    packs, sink = packs_of(samples, labels_per_pass), _sink(model)
    logits: dict[int, Tensor] = {}
    uncounted: list[Tensor] = []
    for number, pack in enumerate(packs + packs[:1] * (passes - len(packs))):
        chosen = [samples[i] for i in pack]
        places = Places(chosen, chunk_kv.length, chunk_kv.keys[0].device)
        sets, slots = _sets(model, chunk_kv, chosen, places, int(sink is not None), call)
        (result,) = call(
            lambda *flat, at=places, of=slots: (local_logits(model, _unflat(flat), at, of, chunk_kv.num_rows, sink),),
            *_flat(sets),
        )
        if number < len(packs):
            logits |= dict(zip(pack, torch.split(result, [samples[i].num_answers for i in pack]), strict=True))
        else:
            uncounted.append(result)
    # Cut off rather than left out, so that their backward passes run as well, with gradients of zero.
    in_order = torch.cat([*(logits[i] for i in range(len(samples))), *uncounted])
    return in_order[: sum(sample.num_answers for sample in samples)]


def _sets(
    model: nn.Module, chunk_kv: KV, samples: Sequence[Sample], places: Places, first_slot: int, call: Call
) -> tuple[KV, Tensor]:
    """The candidate sets of samples that are worked on together: [R, K, N, D] a layer, keys at their slots, and these.

    Of rows that none of them refreshes there is nothing.
    """
    rows = range(chunk_kv.num_rows)
    hot = sorted({row for sample in samples for row in (rows if sample.refreshed is None else sample.refreshed)})
    kv = chunk_kv if len(hot) == len(rows) else chunk_kv.map(lambda tensor: tensor[hot])
    slots = first_slot + torch.tensor(hot, dtype=torch.long, device=places.local_tokens.device)
    with torch.no_grad():
        ordinary = ordinary_pass(model, kv, places)
    made = call(lambda *flat: _flat(candidate_sets(model, kv, _unflat(flat), places, slots)), *_flat(ordinary))
    return _unflat(made), slots


@torch.no_grad()
def memory_logits(model: nn.Module, groups: Iterable[KV], sample: Sample) -> Tensor:
    """`dense_logits` of one sample, for measuring: a memory in groups of rows, whose chunk lengths may differ.

    Args:
        groups: [R_i, K, C_i, D] a layer, in order; one is worked on at a time.

    Returns:
        Logits [labels, V] of the answer tokens.
    """
    sink, sets, slots, num_chunks = _sink(model), list[KV](), list[Tensor](), 0
    for kv in groups:
        seen = range(num_chunks, num_chunks + kv.num_rows)
        own = None if sample.refreshed is None else tuple(row - num_chunks for row in sample.refreshed if row in seen)
        places = Places([sample], kv.length, kv.keys[0].device)
        if own is None or own:
            first_slot = num_chunks + int(sink is not None)
            made, at = _sets(model, kv, [replace(sample, refreshed=own)], places, first_slot, _plainly)
            sets.append(made)
            slots.append(at)
        num_chunks += kv.num_rows
    return local_logits(model, concat(sets, 0), places, torch.cat(slots), num_chunks, sink)


def _sink(model: nn.Module) -> KV | None:
    """Keys and values of the token in front of the candidates, [1, K, 1, D] a layer."""
    token = sink_token(model)
    if token is None:
        return None
    return encode_chunks(model, torch.tensor([[token]], device=next(model.parameters()).device))


def packs_of(samples: Sequence[Sample], labels_per_pass: int = LABELS_PER_PASS) -> list[list[int]]:
    """Which samples go through the passes together: alike in length, and with at most so many labels.

    Packed samples are masked from each other, which costs attention to what is masked, and padded to the longest.
    """
    packs: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: len(samples[i].token_ids)):
        if packs and sum(samples[j].num_answers for j in packs[-1]) + samples[i].num_answers <= labels_per_pass:
            packs[-1].append(i)
        else:
            packs.append([i])
    return packs


def ordinary_pass(model: nn.Module, chunk_kv: KV, places: Places) -> KV:
    """The samples' prompt and answer tokens behind every chunk, as the base model reads them: [R, K, T, D] a layer."""
    rows = chunk_kv.num_rows
    attention = Over([Segment([chunk_kv])], own_mask=places.row_mask)
    if places.row_tokens.numel():
        run(model, places.row_tokens.expand(rows, -1), places.row_positions[None], attention)
        return attention.kv
    encode_chunks(model, places.local_tokens[:1, :1])  # for the same number of passes, see `dense_loss`
    return chunk_kv.tokens(0, 0)


def candidate_sets(model: nn.Module, chunk_kv: KV, ordinary: KV, places: Places, slots: Tensor) -> KV:
    """A candidate at every answer position of every row, keys moved to the rows' slots [R]: [R, K, N, D] a layer."""
    rows, count = chunk_kv.num_rows, len(places.candidate_tokens)
    segments = [Segment([chunk_kv], positions=[torch.arange(chunk_kv.length, device=slots.device)])]
    if ordinary.length:
        segments.append(Segment([ordinary], places.candidate_mask, positions=[places.row_positions]))
    attention = Over(segments, own_mask=places.own_mask)
    positions = places.candidate_positions[None]
    run(model, places.candidate_tokens.expand(rows, -1), positions, attention, candidates=slice(0, count))
    move = mover(model, slots[:, None] - positions)
    return KV([move(i, key) for i, key in enumerate(attention.kv.keys)], attention.kv.values)


def local_logits(
    model: nn.Module, candidates: KV, places: Places, slots: Tensor, num_slots: int, sink: KV | None = None
) -> Tensor:
    """The local passes of all samples as one batch, each over its own candidate sets: logits [labels, V].

    Args:
        slots: [R], positions of the rows' candidates.
        num_slots: of how many slots the candidates take some; local positions begin behind them.
    """
    if sink is not None:  # one more row, the same in all sets
        candidates = concat([sink.map(lambda one: one.expand(-1, -1, candidates.length, -1)), candidates], 0)
        slots = F.pad(slots, (1, 0))
    shape = places.set_of.shape  # [S, most sets of a sample]

    def by_sample(made: Tensor) -> Tensor:  # [R, K, N, D] -> [S, K, sets, R, D]
        chosen = made.permute(1, 2, 0, 3).index_select(1, places.set_of.flatten())  # [K, S * sets, R, D]
        return chosen.view(chosen.shape[0], *shape, *chosen.shape[2:]).transpose(0, 1)

    sets = candidates.map(by_sample)
    bias = None if places.local_mask is None else bias_of(places.local_mask, sets.keys[0].dtype)[:, None]

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        own = sets.keys[layer], sets.values[layer]
        if how.is_plain:
            return over_sets(query, key, value, *own, bias, how.scale)
        return masked_sets(query, key, value, *own, places.local_mask, how, slots)

    positions = places.local_positions + num_slots + int(sink is not None)
    last = torch.arange(positions.shape[1] - shape[1], positions.shape[1], device=positions.device)
    logits = run(model, places.local_tokens, positions, attention, logits_to_keep=last)
    assert logits is not None
    return logits[places.is_answer]


class Places:
    """Where everything of S samples lies: packed in the rows, side by side in the local batch, padded on the left."""

    def __init__(self, samples: Sequence[Sample], chunk_length: int, device: torch.device):
        row_tokens: list[int] = []
        row_positions: list[int] = []
        row_sample: list[int] = []
        made_tokens: list[int] = []
        made_positions: list[int] = []
        made_sample: list[int] = []

        def as_tensor(numbers: Sequence[int] | list[list[int]]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        for i, sample in enumerate(samples):
            tokens, start, newest, last = sample.token_ids, sample.start, sample.newest, len(sample.token_ids) - 2
            row_tokens += tokens[start:last]
            row_positions += range(chunk_length, chunk_length + last - start)
            row_sample += [i] * (last - start)
            made_tokens += tokens[newest : last + 1]
            made_positions += range(chunk_length + newest - start, chunk_length + last + 1 - start)
            made_sample += [i] * sample.num_answers
        self.row_tokens, self.row_positions = as_tensor(row_tokens), as_tensor(row_positions)
        self.candidate_tokens, self.candidate_positions = as_tensor(made_tokens), as_tensor(made_positions)
        self.of_row, self.of_candidate = of_row, of_candidate = as_tensor(row_sample), as_tensor(made_sample)
        """Which sample the packed tokens and candidates belong to: [T] and [N]."""
        self.row_mask = (of_row[:, None] == of_row) & (self.row_positions[:, None] >= self.row_positions)
        """[T, T]: a sample's tokens see its own earlier ones."""
        self.candidate_mask = (of_candidate[:, None] == of_row) & (
            self.candidate_positions[:, None] > self.row_positions
        )
        """[N, T]: a candidate sees its own sample's tokens before it."""
        self.own_mask = torch.eye(len(made_tokens), dtype=torch.bool, device=device)
        """[N, N]: among candidates, itself only."""

        lengths = as_tensor([len(sample.token_ids) - 1 for sample in samples])[:, None]
        answers = as_tensor([sample.num_answers for sample in samples])[:, None]
        longest, most = int(lengths.max()), int(answers.max())
        padded = [[0] * (longest + 1 - len(s.token_ids)) + list(s.token_ids[:-1]) for s in samples]
        self.local_tokens = as_tensor(padded)
        index = torch.arange(longest, device=device)[None]
        padding = longest - lengths  # [S, 1]
        self.local_positions = (index - padding).clamp(min=0)
        causal = index[0][:, None] >= index[0]
        is_token = index >= padding
        self.local_mask: Tensor | None = None
        """[S, T, T]: padding is seen by nobody but itself; None where there is none: causal."""
        if padding.any():
            self.local_mask = causal & (is_token[:, None] | torch.eye(longest, dtype=torch.bool, device=device))
        column = torch.arange(most, device=device)[None]
        self.is_answer = column >= most - answers
        """[S, most]: which of the last columns have a label."""
        first = torch.cumsum(answers, 0) - answers
        self.set_of = (first + (column - (most - answers)).clamp(min=0)).clamp(max=len(made_tokens) - 1)
        """[S, most]: which of the N candidates belongs to each column; padding repeats the first."""


def _plainly(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    return function(*tensors)


def _recomputed(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    # The pass enters its own routing inside the function, so the second run sees what the first one saw.
    made: tuple[Tensor, ...] = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return made


def _flat(kv: KV) -> tuple[Tensor, ...]:
    return (*kv.keys, *kv.values)


def _unflat(tensors: Sequence[Tensor]) -> KV:
    half = len(tensors) // 2
    return KV(list(tensors[:half]), list(tensors[half:]))
