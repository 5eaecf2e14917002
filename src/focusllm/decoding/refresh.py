"""Focused refresh: few rows are advanced at every token and seen by the local pass, the others when they matter.

    cold rows   chunk and prompt lie where they were read; the candidate of then stays in its slot, only scored
    hot rows    at most `RefreshPolicy.rows` of each chunk length, side by side in a buffer of their own:
                the ones that a decode step reads, and whose candidates, made anew, the local context sees;
                the last rows before the local context, and those that get most attention

When the local pass would pay more to a cold row's candidate than to a hot row's, in a running mean over tokens, they
change places: the cold row is copied into the buffer and catches up with the tokens it has not seen, all at once. So
the cost of a token does not grow with the text, and many candidates that have nothing to say take no attention from the
few that have. With all rows hot (`rows=None`) this is plain cached decoding and nothing here is used.

Letters: R rows, k hot rows, C tokens of a chunk, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from focusllm.memory.chunks import ChunkBlock
from focusllm.method.focus import candidate_pass
from focusllm.method.kv import KV, GrowingKV, Segment, concat


@dataclass(frozen=True)
class RefreshPolicy:
    """Which rows are advanced at a token."""

    rows: int | None
    """How many rows of a chunk length are hot; None: all, the exact setting."""
    margin: float = 1.5
    """How many times the attention of the coldest hot row a cold one must get to take its place: avoids a to and fro
    between rows that hardly matter."""
    memory: float = 0.95
    """How much of the running mean of attention stays when a token is counted. By single tokens rows would change
    places at every token, the more often the more rows there are, and each change costs about as much as a token."""

    @property
    def recent(self) -> int:
        """How many of the last rows are always hot: what stands right before the local context helps to continue it,
        whatever gets more attention.
        """
        return 0 if self.rows is None else self.rows // 4

    def wanted(self, attention: Sequence[float], hot: Sequence[int]) -> list[tuple[int, int]]:
        """Which rows change places, as (hot row that leaves, cold row that enters).

        Args:
            attention: paid to every row of the group.
            hot: indices of the hot rows.
        """
        last = len(attention) - self.recent
        leaving = sorted((row for row in hot if row < last), key=lambda row: attention[row])
        entering = sorted(set(range(len(attention))) - set(hot), key=lambda row: -attention[row])
        pairs = zip(leaving, entering, strict=False)
        return [(old, new) for old, new in pairs if attention[new] > self.margin * attention[old]]


@dataclass(frozen=True)
class Row:
    """Where a cold row is: its chunk, and its prompt's keys and values [1, K, P, D] a layer."""

    chunk: ChunkBlock
    tail: KV
    slot: int


@dataclass(eq=False)
class HotRows:
    """The hot rows of one chunk length.

    Args:
        rows: all rows of this chunk length, hot and cold.
        hot: indices (into `rows`) of those that are in the buffer, in its order.
    """

    rows: list[Row]
    hot: list[int]
    kv: GrowingKV
    """[k, K, C + T, D] a layer: chunk, then ordinary prompt and generated tokens. Joined, for each piece would be a
    product of its own in a decode step."""
    attention: Tensor
    """Running mean over tokens of what was paid, or would have been, to each of `rows`."""
    parked: dict[int, KV] = field(default_factory=dict)
    """What rows that were hot before have read behind their prompt."""

    @classmethod
    def load(cls, model: nn.Module, rows: list[Row], hot: list[int], attention: Tensor) -> HotRows:
        """Bring rows into a new buffer."""
        chunk_length, prompt_length = rows[0].chunk.length, rows[0].tail.length
        kv = GrowingKV(rows[0].tail, len(hot), chunk_length + prompt_length + GrowingKV.STEP)  # not to grow at once
        for place, i in enumerate(hot):
            kv.fill_rows(place, rows[i].chunk.rows(model, 0, 1))
            kv.fill_rows(place, rows[i].tail, chunk_length)
        kv.length = chunk_length + prompt_length
        return cls(rows, hot, kv, attention)

    @property
    def nothing_before(self) -> KV:
        """Rows of no tokens, where others have a chunk in front of what grows; attention leaves them out unread."""
        empty, num_layers = self.kv.keys[0][:, :, :0], len(self.kv.keys)
        return KV([empty] * num_layers, [empty] * num_layers)

    @property
    def slots(self) -> list[int]:
        """The candidates' slots of the hot rows, in the buffer's order."""
        return [self.rows[i].slot for i in self.hot]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer and of what is parked."""
        return self.kv.nbytes + sum(kv.nbytes for kv in self.parked.values())

    def copy(self) -> HotRows:
        """An independent copy."""
        return HotRows(self.rows, list(self.hot), self.kv.copy(), self.attention, dict(self.parked))

    def update(self, model: nn.Module, policy: RefreshPolicy, attention: Tensor, row_ids: Sequence[int]) -> None:
        """Let rows change places after a token.

        Args:
            attention: [R of the request], what the newest token paid to every slot.
            row_ids: what every up-to-date row has read behind its chunk; the last one was the candidate.
        """
        if len(self.hot) == len(self.rows):
            return
        paid = attention[[row.slot for row in self.rows]]
        self.attention = policy.memory * self.attention + (1 - policy.memory) * paid
        alike: dict[int, list[tuple[int, int, KV]]] = defaultdict(list)
        for old, new in policy.wanted(self.attention.tolist(), self.hot):
            row, place = self.rows[new], self.hot.index(old)
            prompt_end = row.chunk.length + row.tail.length
            self.parked[old] = self.kv.rows(place, place + 1).tokens(prompt_end).map(torch.clone)
            seen = concat([row.tail, self.parked.pop(new)], 2) if new in self.parked else row.tail
            alike[seen.length].append((place, new, seen))
        for group in alike.values():
            self._enter(model, group, row_ids)

    def _enter(self, model: nn.Module, group: Sequence[tuple[int, int, KV]], row_ids: Sequence[int]) -> None:
        """Put cold rows in places of the buffer: (place, row, what it has read behind its chunk), of equal lengths."""
        chunks = [self.rows[new].chunk.rows(model, 0, 1) for _, new, _ in group]
        seen = [kv for *_, kv in group]
        missed = torch.tensor([row_ids[seen[0].length :]] * len(group), device=seen[0].keys[0].device)
        start = torch.full((len(group),), chunks[0].length + seen[0].length, device=missed.device)
        # The candidates are not used: the next step makes the rows' new ones.
        ordinary, _ = candidate_pass(model, missed, start, [Segment(chunks), Segment(seen)])
        for i, (place, new, kv) in enumerate(group):
            self.kv.fill_rows(place, chunks[i])
            self.kv.fill_rows(place, concat([kv, ordinary.rows(i, i + 1)], 2), chunks[i].length)
            self.hot[place] = new


def hottest(model: nn.Module, rows: list[Row], attention: Tensor, policy: RefreshPolicy) -> list[HotRows]:
    """The rows that begin as hot ones: the last few, and by the attention [R] that each would get. One group a chunk
    length.
    """
    lengths = sorted({row.chunk.length for row in rows})
    found = []
    for length in lengths:
        group = [row for row in rows if row.chunk.length == length]
        paid = attention[[row.slot for row in group]]
        first = paid.clone()
        first[max(len(group) - policy.recent, 0) :] = torch.inf
        count = len(group) if policy.rows is None else min(policy.rows, len(group))
        found.append(HotRows.load(model, group, sorted(first.topk(count).indices.tolist()), paid))
    return found
