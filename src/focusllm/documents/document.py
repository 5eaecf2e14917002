"""Documents that were read: what a question takes of them, and where in them an answer looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from focusllm.config import FocusConfig
from focusllm.documents.answer import Citation
from focusllm.documents.sources import File, pieces, short_names
from focusllm.memory.chunking import num_local_chunks, steps
from focusllm.memory.chunks import ChunkBlock, first_blocks


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its document: characters and tokens, half-open."""

    start: int
    end: int
    first_token: int
    last_token: int


@dataclass(frozen=True, repr=False, eq=False)
class Document:
    """A text that was read once: its chunks' keys and values, and where each chunk is in the text.

    It belongs to the model that read it, and is never changed: any number of questions may share it.
    """

    name: str
    text: str
    token_ids: list[int]
    chunks: list[Chunk]
    blocks: list[ChunkBlock]
    chunk_length: int
    read_seconds: float
    reader: dict[str, Any]
    files: tuple[File, ...] = ()
    """What the text is made of: one file, or those of a folder."""
    is_far: bool = False
    """Whether nothing of it is to stand in the local context, so that no chunk is told apart by standing last."""

    @property
    def num_tokens(self) -> int:
        """Length in tokens."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held in memory."""
        looked = (block.lookup.nbytes for block in self.blocks if block.lookup is not None)
        return sum(block.kv.nbytes for block in self.blocks) + sum(looked)

    @property
    def is_to_be_opened(self) -> bool:
        """Whether its chunks can be opened: they were read to be chosen from."""
        return all(block.lookup is not None for block in self.blocks)

    @property
    def chunk_steps(self) -> list[int]:
        """Tokens from the start of each chunk to the start of the next, or to the end."""
        return steps([chunk.first_token for chunk in self.chunks], self.num_tokens)

    def __repr__(self) -> str:
        return f"Document({self.name!r}, {self.num_tokens:,} tokens, {len(self.chunks)} chunks)"


@dataclass(frozen=True)
class Near:
    """A chunk that lies in the local context, and where: its tokens up to the next chunk, half-open."""

    document: int
    chunk: int
    start: int
    end: int


@dataclass(frozen=True)
class Context:
    """What a question sees of documents: far context, and what stands behind it in the local context."""

    documents: Sequence[Document]
    blocks: list[ChunkBlock]
    far: list[tuple[int, int]]
    """(document, chunk) of each chunk in the blocks."""
    token_ids: list[int]
    """For the local context, with the boundary wherever one document ends and the next begins."""
    near: list[Near]


def divide(documents: Sequence[Document], num_own: int, boundary: Sequence[int], config: FocusConfig) -> Context:
    """How much of documents is far context, and what of them stands in the local context.

    Args:
        num_own: tokens of the local context that are not the documents' (the question).
        boundary: tokens between two documents that meet in the local context.
    """
    chunk_steps: list[int] = []
    for number, document in enumerate(documents):
        chunk_steps += document.chunk_steps
        if number + 1 < len(documents):
            chunk_steps[-1] += len(boundary)
    is_far = any(document.is_far for document in documents)
    num_far = len(chunk_steps) - (0 if is_far else num_local_chunks(chunk_steps, num_own, config))
    context = Context(documents, [], [], [], [])
    for number, document in enumerate(documents):
        count = min(num_far - len(context.far), len(document.chunks))
        context.blocks.extend(first_blocks(document.blocks, count))
        context.far.extend((number, chunk) for chunk in range(count))
        if context.token_ids:
            context.token_ids.extend(boundary)
        start = len(context.token_ids)
        for chunk, step in enumerate(document.chunk_steps[count:], count):
            context.near.append(Near(number, chunk, start, start + step))
            start += step
        if count < len(document.chunks):
            context.token_ids.extend(document.token_ids[document.chunks[count].first_token :])
    return context


def citations(
    context: Context, paid: Tensor | None, paid_near: Tensor | None, condensed: bool = True
) -> list[Citation]:
    """What each chunk that was seen got of the attention, the most first.

    Args:
        paid: attention that each chunk of the far context got [R]; None: there was none, and nothing was watched.
        paid_near: attention that each of the context's tokens got in the local context [T].
        condensed: whether a chunk of the far context is one token; then one token stands for a chunk in the local
            context too, the one that got most.
    """
    if paid is None or paid_near is None or not context.far:
        return []
    places = [*context.far, *((near.document, near.chunk) for near in context.near)]
    of_near = (paid_near[near.start : near.end] for near in context.near)
    own = [got.max() if condensed else got.sum() for got in of_near]
    weights = torch.stack([*paid[: len(context.far)], *own])  # chunks that generated text became come after
    names = iter(short_names([file for document in context.documents for file in document.files]))
    files = [[replace(file, name=next(names)) for file in document.files] for document in context.documents]
    found = []
    for (number, index), share in zip(places, (weights / weights.sum()).tolist(), strict=True):
        document = context.documents[number]
        chunk = document.chunks[index]
        for piece in pieces(files[number], chunk.start, chunk.end):
            name, first = piece.file.name, piece.file.text_start
            text = document.text[first + piece.start : first + piece.end]
            weight = share * piece.share
            found.append(Citation(name, index, piece.start, piece.end, weight, text, number, piece.part))
    return sorted(found, key=lambda citation: -citation.weight)
