"""The base model with full attention, as far as its positions go: the quality that the others are held against."""

from __future__ import annotations

from focusllm.evaluation.method import WindowMethod


class Full(WindowMethod):
    """Nothing is left out; longer texts do not fit."""

    name = "full"

    def fits(self, num_tokens: int) -> str | None:
        """Inside the base model's positions only."""
        if num_tokens > self.window:
            return f"the base model has {self.window:,} positions"
        return super().fits(num_tokens)


METHOD = Full
