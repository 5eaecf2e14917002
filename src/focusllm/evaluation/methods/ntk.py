"""NTK-aware scaling (arXiv 2309.00071, 3.1): the rotary base grows; slow frequencies stretch and fast ones stay."""

from __future__ import annotations

from typing import Any

from focusllm.evaluation.methods.pi import PositionInterpolation
from focusllm.method.base import layout


class NtkAware(PositionInterpolation):
    """base * factor ** (d / (d - 2)), d the rotary dimension: the slowest frequency is interpolated by the factor."""

    name = "ntk"

    def parameters(self, factor: float) -> dict[str, Any]:
        """Another base, no other scaling."""
        width = 2 * len(layout(self.base).rotaries[0].inv_freq)
        theta = self.base.config.rope_parameters["rope_theta"]
        return {"rope_type": "default", "rope_theta": theta * factor ** (width / (width - 2))}


METHOD = NtkAware
