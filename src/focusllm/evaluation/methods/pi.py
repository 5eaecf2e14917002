"""Position interpolation (arXiv 2306.15595): positions are divided so that the text fits into the trained range."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from focusllm.evaluation.example import Example, LossExample
from focusllm.evaluation.method import Prediction, WindowMethod
from focusllm.method.base import layout


class PositionInterpolation(WindowMethod):
    """Full attention under one of transformers' rope scalings; the factor is length over positions, at least 1."""

    name = "pi"
    defaults = {"factor": None}  # noqa: RUF012
    least = {"factor": 1}  # noqa: RUF012

    def parameters(self, factor: float) -> dict[str, Any]:
        """Changes of the model configuration's `rope_parameters`."""
        return {"rope_type": "linear", "factor": factor}

    def fits(self, num_tokens: int) -> str | None:
        """On models with one set of frequencies that are not scaled already, as far as the memory goes."""
        if [rotary.name for rotary in layout(self.base).rotaries] != ["inv_freq"]:
            return "the base model has several sets of rotary frequencies"
        kind = self.base.config.rope_parameters.get("rope_type", "default")
        if kind != "default":
            return f"the base model's positions are scaled already ({kind})"
        return super().fits(num_tokens)

    def generate(self, example: Example) -> Prediction:
        """With scaled positions."""
        with self._scaled(self.num_tokens(example)):
            return super().generate(example)

    def loss(self, example: LossExample) -> tuple[float, int]:
        """With scaled positions."""
        with self._scaled(self.num_tokens(example)):
            return super().loss(example)

    @contextmanager
    def _scaled(self, num_tokens: int) -> Iterator[None]:
        """The model with another rotary embedding of its own class, for a while."""
        rotary: Any = layout(self.base).rotaries[0].module
        factor = self.options["factor"] or max(1.0, num_tokens / self.window)
        config = copy.deepcopy(rotary.config)
        config.rope_parameters = {**config.rope_parameters, **self.parameters(factor)}
        path = next(path for path, module in self.base.named_modules() if module is rotary)
        parent, _, name = path.rpartition(".")
        owner = self.base.get_submodule(parent)
        with torch.device(self.base.device):
            setattr(owner, name, type(rotary)(config))
        try:
            yield
        finally:
            setattr(owner, name, rotary)


METHOD = PositionInterpolation
