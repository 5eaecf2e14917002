"""Documents that were read: what a question takes of them, and where in them an answer looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from focusllm.documents.answer import Citation
from focusllm.memory.chunking import steps
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

    @property
    def num_tokens(self) -> int:
        """Length in tokens."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held in memory."""
        return sum(block.kv.nbytes for block in self.blocks)

    @property
    def chunk_steps(self) -> list[int]:
        """Tokens from the start of each chunk to the start of the next, or to the end."""
        return steps([chunk.first_token for chunk in self.chunks], self.num_tokens)

    def __repr__(self) -> str:
        return f"Document({self.name!r}, {self.num_tokens:,} tokens, {len(self.chunks)} chunks)"


def divide(documents: Sequence[Document], num_far: int) -> tuple[list[ChunkBlock], list[int], list[tuple[int, int]]]:
    """The first `num_far` chunks of all documents as blocks, the tokens behind them, and (document, chunk) of each."""
    blocks: list[ChunkBlock] = []
    tail: list[int] = []
    places: list[tuple[int, int]] = []
    for number, document in enumerate(documents):
        count = min(num_far - len(places), len(document.chunks))
        blocks += first_blocks(document.blocks, count)
        if count < len(document.chunks):
            tail += document.token_ids[document.chunks[count].first_token :]
        places += [(number, chunk) for chunk in range(count)]
    return blocks, tail, places


def citations(documents: Sequence[Document], places: Sequence[tuple[int, int]], paid: Tensor | None) -> list[Citation]:
    """What each chunk of the far context got of the attention, the most first.

    Args:
        places: (document, chunk) of each, as `divide` gives them.
        paid: attention that each chunk got [R]; None: the text had none.
    """
    if paid is None or not places:
        return []
    paid = paid[: len(places)]  # chunks that generated text became come after
    shares = (paid / paid.sum()).tolist()
    found = []
    for (number, index), share in zip(places, shares, strict=True):
        document = documents[number]
        chunk = document.chunks[index]
        text = document.text[chunk.start : chunk.end]
        found.append(Citation(document.name, index, chunk.start, chunk.end, share, text))
    return sorted(found, key=lambda citation: -citation.weight)
