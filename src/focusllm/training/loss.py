"""The loss of a memory's samples as a module, and what is counted of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from focusllm.memory.chunk_cache import ChunkCache
from focusllm.memory.store import Packing
from focusllm.method.focus import encode_chunks
from focusllm.method.kv import KV, concat
from focusllm.training.config import TrainConfig
from focusllm.training.dense import Sample, answer_losses, base_logits, dense_loss, exact_loss, num_passes
from focusllm.training.sampling import Memory


class MemoryLoss(nn.Module):
    """The loss of one memory's samples, as a module that several processes can wrap."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        super().__init__()
        self.model, self.config = model, config
        room = config.distractor_pool * Packing.of(model, "same").row_bytes(max(config.chunk_lengths))
        self.distractors = ChunkCache(model, room)

    def forward(self, memory: Memory, passes: int = 0, without_memory: bool = False) -> tuple[Tensor, Tensor]:
        """Cross entropies and hits, [labels] each.

        Args:
            passes: run at least so many (see `num_passes`), the last ones for nothing.
            without_memory: by the base model, from the local contexts alone.
        """
        samples = memory.samples
        if without_memory:
            return _joined((self._alone(sample) for sample in _repeated(samples, passes)), self.sizes(samples))
        device = next(self.model.parameters()).device
        chunks = torch.as_tensor(memory.chunks, dtype=torch.long, device=device)
        if self._exact:
            rows = list(chunks)
            return _joined((self._first(rows, sample) for sample in _repeated(samples, passes)), self.sizes(samples))
        encoded, config = self._encoded(chunks, memory.own), self.config
        return dense_loss(self.model, encoded, samples, config.checkpointed, passes, config.labels_per_pass)

    def sizes(self, samples: Sequence[Sample]) -> list[int]:
        """How many labels each sample has."""
        return [1 if self._exact else sample.num_answers for sample in samples]

    def num_passes(self, samples: Sequence[Sample], without_memory: bool = False) -> int:
        """How many passes, each alike, a memory with these samples takes."""
        if self._exact or without_memory:
            return len(samples)
        return num_passes(samples, self.config.labels_per_pass)

    def _encoded(self, chunks: Tensor, own: slice) -> KV:
        """The chunks' keys and values [R, K, C, D]; those of distractors are kept for the next memories.

        Distractors are read one by one, so that their last bits do not depend on which were known before.
        """
        if own == slice(0, len(chunks)) or self.config.sharded:  # sharded: one pass in every process
            return encode_chunks(self.model, chunks)
        parts = (chunks[: own.start], chunks[own.stop :])
        before, behind = ([self.distractors.chunk(row.tolist()) for row in part] for part in parts)
        return concat([*before, encode_chunks(self.model, chunks[own]), *behind], 0)

    @property
    def _exact(self) -> bool:
        return self.config.supervision == "exact"

    def _first(self, chunks: list[Tensor], sample: Sample) -> tuple[Tensor, Tensor]:
        """The first label of a sample by the paper's loss: [1] and [1]."""
        ids = torch.tensor([*sample.token_ids[: sample.newest + 1], sample.answers[0]], device=chunks[0].device)
        loss, logits = exact_loss(self.model, chunks, ids[sample.start : -1], ids[:-1], ids[-1])
        return loss[None], (logits.detach().argmax() == ids[-1])[None]

    def _alone(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """The labels of a sample from the local context alone: [labels] each."""
        (num_labels,) = self.sizes([sample])
        losses, hits = answer_losses(base_logits(self.model, sample.token_ids, sample.num_answers), [sample])
        return losses[:num_labels], hits[:num_labels]


def _repeated(samples: Sequence[Sample], passes: int) -> list[Sample]:
    """Samples, then the first one again and again up to so many."""
    return [*samples, *[samples[0]] * (passes - len(samples))]


def _joined(parts: Iterable[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Losses and hits of all samples; what was run for nothing is cut off (its backward pass runs, with zeros)."""
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses)[: sum(sizes)], torch.cat(hits)[: sum(sizes)]


@dataclass
class Meter:
    """Sums of losses and hits by objective."""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))

    def add(self, labels: Sequence[tuple[str, int]], losses: Tensor, hits: Tensor) -> None:
        """Take one memory's labels in: [(objective, how many labels)] in their order."""
        sizes = [size for _, size in labels]
        both = zip(labels, _split(losses.detach().double(), sizes), _split(hits.double(), sizes), strict=True)
        for (objective, _), loss, hit in both:
            found = self.sums[objective]
            for i, value in enumerate((float(loss.sum()), float(hit.sum()), float(len(loss)))):
                found[i] += value

    def gathered(self, accelerator: Accelerator) -> Meter:
        """The same over all processes."""
        if accelerator.num_processes == 1:
            return self
        everywhere: list[dict[str, list[float]]] = [{}] * accelerator.num_processes
        torch.distributed.all_gather_object(everywhere, dict(self.sums))
        total = Meter()
        for one in everywhere:
            for name, values in one.items():
                total.sums[name] = [a + b for a, b in zip(total.sums[name], values, strict=True)]
        return total

    def result(self) -> dict[str, Any]:
        """Mean loss (nats a label), share of hits and labels: in all, and by objective."""
        total = [sum(values[i] for values in self.sums.values()) for i in range(3)]
        by = {
            name: {"loss": s / n, "accuracy": h / n, "labels": int(n)} for name, (s, h, n) in sorted(self.sums.items())
        }
        return {"loss": total[0] / total[2], "labels": int(total[2]), "objectives": by}


def _split(values: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return torch.split(values, sizes)
