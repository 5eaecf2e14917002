"""Where in documents an answer looked: attention to citations.

condensed   a chunk is one token, so a chunk is what can be named
opened      all tokens of what is open are seen, so sentences are, for each sentence of the answer
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from focusllm.decoding.request import Watched
from focusllm.documents.answer import Citation, Sentence
from focusllm.documents.document import Context
from focusllm.documents.sentences import sentences_in
from focusllm.documents.sources import pieces, short_names


def cite_chunks(context: Context, paid: Tensor | None, paid_near: Tensor | None) -> list[Citation]:
    """What each chunk that was seen got of the attention, the most first.

    One token stands for a chunk of the far context, so one does for a chunk in the local context too: the one that got
    most.

    Args:
        paid: attention that each chunk of the far context got [R]; None: there was none, and nothing was watched.
        paid_near: attention that each of the context's tokens got in the local context [T].
    """
    if paid is None or paid_near is None or not context.far:
        return []
    places = [*context.far, *((near.document, near.chunk) for near in context.near)]
    own = [paid_near[near.start : near.end].max() for near in context.near]
    weights = torch.stack([*paid[: len(context.far)], *own])  # chunks that generated text became come after
    found = []
    for (number, index), weight in zip(places, weights.tolist(), strict=True):
        chunk = context.documents[number].chunks[index]
        found.append((number, index, chunk.start, chunk.end, weight))
    return _citations(context, found)


def cite_sentences(
    context: Context, watched: Sequence[Watched], first_near: int, text: str, token_ends: Sequence[int]
) -> tuple[list[Citation], list[Sentence]]:
    """What each sentence that was seen got of the attention, the most first: while all of the answer was written, and
    for each sentence of it.

    Args:
        watched: for every token of the answer what was paid when it was chosen.
        first_near: the first of the context's tokens in the local context.
        text: the answer. token_ends: behind the last of its characters that each token was the end of.
    """
    if not context.far:
        return [], []
    of_token = [_by_sentence(context, step, first_near) for step in watched]
    told = [
        Sentence(start, end, _cite(context, of_token[_tokens_of(start, end, token_ends)]))
        for start, end, _ in sentences_in(text)
    ]
    return _cite(context, of_token), told


def cite_sentence(
    context: Context, watched: Sequence[Watched], first_near: int, start: int, end: int, token_ends: Sequence[int]
) -> Sentence:
    """One sentence of an answer that still goes on: its characters, half-open; the rest as of `cite_sentences`."""
    steps = watched[_tokens_of(start, end, token_ends)]
    return Sentence(start, end, _cite(context, (_by_sentence(context, step, first_near) for step in steps)))


def _tokens_of(start: int, end: int, token_ends: Sequence[int]) -> slice:
    """The tokens that say these characters."""
    first, stop = np.searchsorted(np.asarray(token_ends), [start, end - 1], side="right").tolist()
    return slice(first, stop + 1)


Places = dict[tuple[int, int], float]
"""(document, sentence) -> attention."""


def _by_sentence(context: Context, step: Watched, first_near: int) -> Places:
    """What one token paid to every sentence."""
    found: Places = defaultdict(float)
    place = 0
    for span in step.spans:
        if span.chunk < len(context.far):  # chunks that generated text became come after
            number, index = context.far[span.chunk]
            _add(found, context, (number, index), span.first, step.opened[place : place + span.length])
        place += span.length
    for near in context.near:
        paid = step.local[first_near + near.start : first_near + near.end]
        _add(found, context, (near.document, near.chunk), 0, paid)
    return found


def _add(found: Places, context: Context, chunk: tuple[int, int], first: int, paid: Tensor) -> None:
    """Add what so many tokens of a chunk got, from its token `first` on; a boundary behind it is nobody's."""
    (number, index), document = chunk, context.documents[chunk[0]]
    last_characters = document.token_ends(index)[first : first + len(paid)] - 1
    sentences = np.searchsorted(document.sentence_starts, last_characters, side="right") - 1
    own, place = np.unique(sentences, return_inverse=True)
    for sentence, weight in zip(own.tolist(), np.bincount(place, paid[: len(sentences)].numpy()).tolist(), strict=True):
        found[number, sentence] += weight


def _cite(context: Context, steps: Iterable[Places]) -> list[Citation]:
    """What the sentences got in all these steps together."""
    total: Places = defaultdict(float)
    for step in steps:
        for key, weight in step.items():
            total[key] += weight
    found = []
    for (number, sentence), weight in total.items():
        document = context.documents[number]
        start, stop = _bounds(document.sentence_starts, sentence, len(document.text))
        end = start + len(document.text[start:stop].rstrip())
        chunk = bisect_right(document.chunks, start, key=lambda chunk: chunk.start) - 1
        found.append((number, max(chunk, 0), start, max(end, start + 1), weight))
    return _citations(context, found)


def _bounds(starts: np.ndarray, index: int, length: int) -> tuple[int, int]:
    """Where a sentence begins and the next one does."""
    return int(starts[index]), int(starts[index + 1]) if index + 1 < len(starts) else length


def _citations(context: Context, found: Sequence[tuple[int, int, int, int, float]]) -> list[Citation]:
    """Citations of (document, chunk, first character, behind the last, attention), the most attended first."""
    names = iter(short_names([file for document in context.documents for file in document.files]))
    files = [[replace(file, name=next(names)) for file in document.files] for document in context.documents]
    total, cited = sum(weight for *_, weight in found) or 1.0, []
    for number, index, start, end, weight in found:
        for piece in pieces(files[number], start, end):
            name, first = piece.file.name, piece.file.text_start
            text = context.documents[number].text[first + piece.start : first + piece.end]
            share = weight / total * piece.share
            cited.append(Citation(name, index, piece.start, piece.end, share, text, number, piece.part))
    return sorted(cited, key=lambda citation: -citation.weight)
