"""Truncation: the first and the last half of what a window holds, as LongBench does it (arXiv 2308.14508, section 4.1).

The chat template stays whole. For losses the end of the text is kept, for that is what the labels follow.
"""

from __future__ import annotations

from collections.abc import Sequence

from focusllm.errors import ConfigError
from focusllm.evaluation.example import LossExample
from focusllm.evaluation.method import Prompt, ShortenedMethod


class Truncate(ShortenedMethod):
    """Both ends are kept, whatever they say."""

    name = "truncate"

    @property
    def sees(self) -> str:
        """Both ends."""
        return f"the first and last tokens, {self.size:,} with template and answer; for losses the last ones"

    def choose(self, prompt: Prompt, room: int) -> list[int]:
        """The template, and the first and last half of what it leaves room for."""
        return [*prompt.start, *ends(prompt.body, room - len(prompt.start) - len(prompt.end)), *prompt.end]

    def choose_text(self, example: LossExample) -> Sequence[int]:
        """The end."""
        if self.size < example.labels:
            raise ConfigError(f"{example.labels} labels are more than the {self.size} tokens that are kept.")
        return example.text_ids[-self.size - 1 :]


def ends(ids: list[int], room: int) -> list[int]:
    """The first and the last half of a room, or all that fits.

    Raises:
        ConfigError: there is no room.
    """
    if room < 2:
        raise ConfigError(f"{room} tokens are left for the prompt beside template and answer; use a longer window.")
    return ids if len(ids) <= room else [*ids[: room // 2], *ids[room // 2 - room :]]


METHOD = Truncate
