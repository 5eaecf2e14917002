"""YaRN (arXiv 2309.00071) as transformers has it: interpolation by parts of the frequencies, sharper attention."""

from __future__ import annotations

from typing import Any

from focusllm.evaluation.methods.pi import PositionInterpolation


class Yarn(PositionInterpolation):
    """Without fine-tuning, as the other methods that leave the base model alone."""

    name = "yarn"

    def parameters(self, factor: float) -> dict[str, Any]:
        """Transformers' rope type `yarn`, its other settings at their defaults."""
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": self.window}


METHOD = Yarn
