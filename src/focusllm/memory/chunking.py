"""Cutting token ids: every token is in a chunk or in the local context, in several only where they overlap.

Pure functions over lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from focusllm.config import FocusConfig


def cut(num_tokens: int, config: FocusConfig) -> list[tuple[int, int]]:
    """Bounds of chunks cut from the left; the last one may be shorter (paper section 3.1)."""
    starts = (number * config.stride for number in range(count_chunks(num_tokens, config)))
    return [(start, min(start + config.chunk_length, num_tokens)) for start in starts]


def count_chunks(num_tokens: int, config: FocusConfig) -> int:
    """How many chunks `cut` gives."""
    if num_tokens <= 0:
        return 0
    return 1 + max(0, -(-(num_tokens - config.chunk_length) // config.stride))


def count_by_length(num_tokens: int, config: FocusConfig) -> Counter[int]:
    """How many chunks of which length `cut` gives: the last one may be shorter."""
    count = count_chunks(num_tokens, config)
    found = Counter({config.chunk_length: count - 1} if count > 1 else {})
    if count:
        found[num_tokens - (count - 1) * config.stride] += 1
    return found


def split(token_ids: Sequence[int], config: FocusConfig) -> tuple[list[int], list[int]]:
    """Split a text into far context and local context.

    Returns:
        The far context (empty if the text goes to the base model alone) and the local context.
    """
    ids = list(token_ids)
    if config.is_plain(len(ids)):
        return [], ids
    return ids[: -config.local_length], ids[-config.local_length :]


def split_start(far: Sequence[int], config: FocusConfig) -> tuple[list[int], list[int]]:
    """The first tokens of a far context, which its chunks are read behind where they are opened, and the others."""
    count = config.start_length if config.is_opened and config.start_length < len(far) else 0
    return list(far[:count]), list(far[count:])


def steps(starts: Sequence[int], num_tokens: int) -> list[int]:
    """Tokens from the start of each chunk to the start of the next; of the last one, to the end of its text."""
    return [later - start for start, later in pairwise([*starts, num_tokens])]


def num_local_chunks(chunk_steps: Sequence[int], num_other_tokens: int, config: FocusConfig) -> int:
    """How many chunks at the end of a document fit into the local context beside `num_other_tokens` tokens.

    They are decoded from directly, not condensed; a document that fits as a whole, or is the base model's by its length
    (`plain_below`), is the base model's alone.

    Args:
        chunk_steps: as `steps` gives them; of several documents, one after the other.
    """
    if config.is_plain(sum(chunk_steps) + num_other_tokens):
        return len(chunk_steps)
    room, count = config.local_length - num_other_tokens, 0
    for step in reversed(chunk_steps):
        if step > room:
            break
        room, count = room - step, count + 1
    return count
