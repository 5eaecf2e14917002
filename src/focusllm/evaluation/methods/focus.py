"""FocusLLM: the far text in chunks, condensed into candidates, beside a local context of the local budget.

The layout is that of `FocusLLM.ask`: the chunks are the long text's own, template and question stand in the local
context. A prompt without a chat template, or with more beside the text than the local context holds, is cut as one
text. For losses the local context ends with the labels, so that it never holds more than the budget, and the chunks
that are seen (`refresh_rows`) are those that get most attention before the first label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from focusllm.config import FocusConfig
from focusllm.decoding import opened
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.documents.words import WordIndex
from focusllm.errors import ConfigError
from focusllm.evaluation.example import LossExample
from focusllm.evaluation.method import Method, Prompt, Step, sum_of_losses
from focusllm.llm import FocusLLM
from focusllm.machine import readable_bytes
from focusllm.memory.chunk_cache import LastText
from focusllm.memory.chunking import count_chunks, cut, num_local_chunks, split, split_start, steps
from focusllm.memory.chunks import ChunkBlock, count_alike
from focusllm.memory.cost import estimate, total_memory
from focusllm.method.base import run_plain
from focusllm.method.kv import KV
from focusllm.training.dense import Sample, memory_logits


class Focus(Method):
    """The settings are those of `FocusConfig`, by name."""

    name = "focus"
    version = 2
    defaults = {field.name: None for field in dataclasses.fields(FocusConfig)}  # noqa: RUF012

    def __init__(self, llm: FocusLLM, chunks: LastText | None = None, **options: Any):
        super().__init__(llm, chunks, **options)
        self.config = llm.model.settled(llm.config.replace(**options))
        opened.check_settings(self.config, self.window)
        if self.config.kv_place not in ("auto", "device"):
            raise ConfigError(
                f"kv_place is {self.config.kv_place!r}, but what is measured is kept on the device; leave it out."
            )
        self.budget = self.config.local_length
        self.heads = llm.model.lookup_heads if self.config.is_opened else None

    @property
    def sees(self) -> str:
        """The local context; the rest through candidates, or what is opened of it."""
        if self.config.is_opened:
            return f"{self.budget:,} tokens of local context, and {self.config.budget:,} that are opened before it"
        return f"{self.budget:,} tokens of local context, all before it as candidates of chunks"

    def fits(self, num_tokens: int) -> str | None:
        """As many chunks as the base model has positions for, and the memory room."""
        try:
            if not self.config.is_opened:
                self.config.check_num_chunks(count_chunks(num_tokens, self.config), self.window)
        except ConfigError as error:
            return str(error).rstrip(".")
        needed = estimate(self.base, self.config, num_tokens).total
        there = total_memory(self.base.device)
        if needed > there:
            return f"it needs about {readable_bytes(needed)}, and there are {readable_bytes(there)} of memory"
        return None

    def start(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Step]:
        """Read what is not known of the far text, then the local context."""
        start, far, local, prompt_length = self.divide(prompt)
        blocks = self._blocks(far, start)
        words = self._word_scores(blocks, prompt.query) if self.config.is_opened and blocks else None
        request = start_request(self.base, blocks, local, self.config, prompt_length, self.heads, words)
        logits = prefill(self.base, request, self.config)[-1]
        return logits, lambda token: decode(self.base, [request], [token], self.config)[0]

    def _word_scores(self, blocks: list[ChunkBlock], query: str) -> Tensor:
        """What the question's words are worth in each chunk [R]."""
        texts = [self.decode(row) for block in blocks for row in block.token_ids.tolist()]
        return torch.from_numpy(WordIndex(texts).scores(query))

    def divide(self, prompt: Prompt) -> tuple[list[int], list[int], list[int], int | None]:
        """What opened chunks are read behind, the far context, the local context, and the length of the dynamic prompt
        (None: as configured).
        """
        head, tail = [*prompt.start, *prompt.before], [*prompt.after, *prompt.end]
        own = len(head) + len(tail)
        if not prompt.chat or own > self.budget:
            far, local = split(prompt.ids, self.config)
            return *split_start(far, self.config), local, None
        bounds = cut(len(prompt.context), self.config)
        chunk_steps = steps([start for start, _ in bounds], len(prompt.context))
        num_far = len(bounds) - num_local_chunks(chunk_steps, own, self.config)
        stop = bounds[num_far - 1][1] if num_far else 0
        place = bounds[num_far][0] if num_far < len(bounds) else len(prompt.context)
        start, head = (head, []) if self.config.is_opened and num_far else ([], head)
        return start, prompt.context[:stop], [*head, *prompt.context[place:], *tail], len(tail)

    @torch.no_grad()
    def loss(self, example: LossExample) -> tuple[float, int]:
        """Teacher-forced; labels beyond half of the local context are taken a piece at a time."""
        ids, total = list(example.text_ids), 0.0
        first, size = len(ids) - example.labels, min(example.labels, max(1, self.budget // 2))
        if size < example.labels:  # the longest first: every other piece has a beginning of these chunks
            self._far_blocks(split(ids, self.config)[0])
        for start in range(first, len(ids), size):
            stop = min(start + size, len(ids))
            labels = self.tensor(ids[start:stop])[0]
            total += sum_of_losses(self._logits(ids[:stop], stop - start), labels)
        return total, example.labels

    def _logits(self, ids: list[int], num_labels: int) -> Tensor:
        """Logits [labels, V] of the last tokens."""
        far, local = split(ids, self.config)
        if not far:
            given = self.tensor(ids[:-1])
            return run_plain(self.base, given, DynamicCache(config=self.base.config), num_labels)[0]
        blocks = self._far_blocks(far)
        if self.config.is_opened:
            request = start_request(self.base, blocks, local[:-num_labels], self.config)
            first = prefill(self.base, request, self.config)[-1:]
            behind = local[-num_labels:-1]
            return torch.cat([first, opened.read_on(self.base, request, behind)]) if behind else first
        if self.config.decoding == "cached" and self.config.bos_token_id is None:
            sample = Sample(local, num_labels, self.config.most_prompt_tokens)
            if self.config.is_focused(max(count_alike(blocks).values())):
                request = start_request(self.base, blocks, local[:-num_labels], self.config)
                prefill(self.base, request, self.config)
                sample = dataclasses.replace(sample, refreshed=tuple(request.refreshed_slots))
            return memory_logits(self.base, self._row_groups(blocks), sample)
        request = start_request(self.base, blocks, local[:-num_labels], self.config)
        logits = [prefill(self.base, request, self.config)[-1]]
        logits += [decode(self.base, [request], [token], self.config)[0] for token in local[-num_labels:-1]]
        return torch.stack(logits)

    def _far_blocks(self, far: list[int]) -> list[ChunkBlock]:
        """The far context of a text without a chat template."""
        start, rest = split_start(far, self.config)
        return self._blocks(rest, start)

    def _blocks(self, far: list[int], start: list[int]) -> list[ChunkBlock]:
        return self.chunks.blocks(far, self.config, start, self.heads)

    def _row_groups(self, blocks: list[ChunkBlock]) -> Iterator[KV]:
        size = self.config.chunks_per_batch
        return (kv for block in blocks for _, kv in block.batches(self.base, size))


METHOD = Focus
