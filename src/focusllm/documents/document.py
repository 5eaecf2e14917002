"""Documents that were read, and what a question takes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np

from focusllm.config import FocusConfig
from focusllm.documents.sentences import sentence_starts
from focusllm.documents.sources import File
from focusllm.documents.words import WordIndex
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
    token_ends: Callable[[int], np.ndarray]
    """Of a chunk, by its index: behind the last character of each of its tokens."""
    chunks: list[Chunk]
    blocks: list[ChunkBlock]
    chunk_length: int
    read_seconds: float
    reader: dict[str, Any]
    files: tuple[File, ...] = ()
    """What the text is made of: one file, or those of a folder."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Switches of the chat template behind whose head it was read."""
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

    @cached_property
    def sentence_starts(self) -> np.ndarray:
        """The first character of every sentence [n], ascending."""
        return sentence_starts(self.text)

    @cached_property
    def words(self) -> WordIndex:
        """What the chunks are found by where a question has their words; counted when it is asked for first."""
        return WordIndex(self.chunk_texts)

    @property
    def chunk_texts(self) -> list[str]:
        """What each chunk says."""
        return [self.text[chunk.start : chunk.end] for chunk in self.chunks]

    def __repr__(self) -> str:
        return f"Document({self.name!r}, {self.num_tokens:,} tokens, {len(self.chunks)} chunks)"


_together: WeakKeyDictionary[Document, tuple[list[ReferenceType[Document]], WordIndex]] = WeakKeyDictionary()


def words_of(documents: Sequence[Document]) -> WordIndex:
    """The words of all chunks of documents that are asked together; counted once, until others are asked."""
    if len(documents) == 1:
        return documents[0].words
    others, index = _together.get(documents[0], ([], None))
    if index is None or [other() for other in others] != list(documents[1:]):
        index = WordIndex([text for document in documents for text in document.chunk_texts])
        _together[documents[0]] = [ref(other) for other in documents[1:]], index
    return index


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
