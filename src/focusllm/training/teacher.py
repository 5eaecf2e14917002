"""The teacher: the frozen base model itself, with full attention over a window that has the right passage in it.

    a question's sample     window [ passage among other text | question ]  ->  its own answer, if that is right
    a continuation's        window [ the text right before ]                ->  what it says of the text's tokens

Both with its distributions at every answer position. Samples without a window keep their true tokens, and so do
questions that the teacher answers wrongly (reported apart). What it says to a memory depends on that memory alone, so
it can be kept: a file a memory, each whole or not there at all.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from focusllm.files import whole_file
from focusllm.training.checkpoint import disk_errors
from focusllm.training.config import TrainConfig
from focusllm.training.dense import Sample, base_logits
from focusllm.training.divergence import Targets, targets_of
from focusllm.training.generating import answers_to
from focusllm.training.sampling import Memory
from focusllm.training.tasks import says


class Teacher:
    """Answers memories' samples.

    Args:
        model: the base model, with candidate projections or without; they are not used.
        folder: where to keep what it says; None: nowhere.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TrainConfig, folder: Path | None = None):
        self.model, self.tokenizer, self.config, self.folder = model, tokenizer, config, folder

    def taught(self, memory: Memory) -> Memory:
        """The memory, its samples with the teacher's answers and targets.

        Raises:
            TrainingError: what is said cannot be kept.
        """
        said = self._kept(memory)
        return replace(memory, samples=[self._with(sample, said, i) for i, sample in enumerate(memory.samples)])

    def _kept(self, memory: Memory) -> dict[str, Tensor]:
        """What was said to a memory before, or is now."""
        if self.folder is None:
            return self._said(memory)
        path = self.folder / f"{memory.name}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except SafetensorError:  # power was lost while it was written
                path.unlink()
        said = {name: tensor.cpu().contiguous() for name, tensor in self._said(memory).items()}
        with disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                save_file(said, temporary)
        return said

    @torch.no_grad()
    def _said(self, memory: Memory) -> dict[str, Tensor]:
        """By the number of the sample: `.answer` [M] (right answers alone), `.token_ids` and `.log_probs` [M, ...]."""
        said: dict[str, Tensor] = {}
        asked = [i for i, sample in enumerate(memory.samples) if sample.truth is not None]
        windows = [memory.samples[i].window for i in asked]
        config, seed = self.config, zlib.crc32(f"{self.config.seed} {memory.name}".encode())
        answers = answers_to(self.model, self.tokenizer, windows, config.answer_length, config.answer_temperature, seed)
        for i, (answer, logits) in zip(asked, answers, strict=True):
            if says(self.tokenizer.decode(answer, skip_special_tokens=True), memory.samples[i].truth or ""):
                said |= {f"{i}.answer": torch.tensor(answer)} | self._targets(i, logits)
        for i, sample in enumerate(memory.samples):
            if sample.truth is None and sample.window:
                read = [*sample.window, *sample.answers]
                said |= self._targets(i, base_logits(self.model, read, sample.num_answers))
        return said

    def _targets(self, i: int, logits: Tensor) -> dict[str, Tensor]:
        targets = targets_of(logits, self.config.top_k, self.config.temperature)
        found = {f"{i}.log_probs": targets.log_probs}
        return found if targets.token_ids is None else found | {f"{i}.token_ids": targets.token_ids.int()}

    def _with(self, sample: Sample, said: dict[str, Tensor], i: int) -> Sample:
        if f"{i}.log_probs" not in said:
            return sample if sample.truth is None else replace(sample, objective=f"{sample.objective}, true tokens")
        device, token_ids = next(self.model.parameters()).device, said.get(f"{i}.token_ids")
        chosen = None if token_ids is None else token_ids.long().to(device)
        sample = replace(sample, targets=Targets(chosen, said[f"{i}.log_probs"].to(device), self.config.temperature))
        if sample.truth is None:
            return sample
        asked, answer = sample.token_ids[: -sample.num_answers], said[f"{i}.answer"].tolist()
        return replace(sample, token_ids=[*asked, *answer], num_answers=len(answer))
