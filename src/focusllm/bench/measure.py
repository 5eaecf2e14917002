"""How numbers are made: spread, the machine's limits at the model's own shapes, and fits over lengths."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Shapes = Counter[tuple[int, int]]
"""How often a matrix [out, in] is applied to a token."""

TOKENS_AT_ONCE = 4096
"""Rows of the products that the limit is measured with: as many as a few chunks have."""
COPIED_BYTES = 2**28
"""Far more than the caches of a processor hold."""
SECONDS_A_LIMIT = 0.2
"""How long one product or the copy is repeated."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the range around it."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def linear_shapes(model: nn.Module) -> Shapes:
    """The matrices that every token of a text goes through: all linear layers but the head.

    Candidate projections are not counted: they see one token a chunk.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return Counter((layer.out_features, layer.in_features) for layer in layers)


def flops_per_token(shapes: Shapes) -> int:
    """Additions and multiplications of one token."""
    return 2 * sum(count * rows * columns for (rows, columns), count in shapes.items())


def bytes_of_weights(model: nn.Module) -> int:
    """Bytes of weights that decoding one token reads: all, but of an embedding that is not the head too one row."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return total if head is None or head.weight is embedding.weight else total - int(embedding.weight.nbytes)


def product_rate(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of matrix products in the proportions in which a model uses them.

    Each shape is timed alone; the rate is that of one token's products one after another.
    """
    seconds = 0.0
    for (rows, columns), count in shapes.items():
        weight = torch.randn(rows, columns, dtype=dtype, device=device)
        tokens = torch.randn(TOKENS_AT_ONCE, columns, dtype=dtype, device=device)
        seconds += count * _median_seconds(lambda w=weight, x=tokens: F.linear(x, w), device)  # type: ignore[misc]
    return flops_per_token(shapes) * TOKENS_AT_ONCE / seconds


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes both counted."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPIED_BYTES / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    timed()  # warms up
    times = [timed() for _ in range(3)]
    while sum(times) < SECONDS_A_LIMIT:
        times.append(timed())
    return statistics.median(times)


@dataclass(frozen=True)
class Fit:
    """A sum of powers of the length, e.g. a*n + b*n^2."""

    powers: tuple[int, ...]
    coefficients: tuple[float, ...]
    lengths: tuple[int, ...]
    """Where it was measured."""

    def at(self, length: int) -> float:
        """Its value at a length."""
        return float(sum(c * float(length) ** p for p, c in zip(self.powers, self.coefficients, strict=True)))


def fit(lengths: Sequence[int], values: Sequence[float], powers: tuple[int, int]) -> Fit | None:
    """Least squares of the relative errors, with no negative coefficient; None: fewer lengths than coefficients.

    Relative, so that short lengths count as much as long ones; what noise makes negative is left out of the sum.
    """
    if len(set(lengths)) < len(powers):
        return None
    x, y = np.asarray(lengths, dtype=float), np.asarray(values, dtype=float)
    best: tuple[float, tuple[float, ...]] | None = None
    for kept in ((True, True), (True, False), (False, True)):
        columns = np.stack([x**power / y for power, keep in zip(powers, kept, strict=True) if keep], 1)
        found = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
        error = float(((columns @ found - 1) ** 2).sum())
        if (found >= 0).all() and (best is None or error < best[0]):
            numbers = iter(found.tolist())
            best = error, tuple(next(numbers) if keep else 0.0 for keep in kept)
    assert best is not None  # one positive column alone always fits
    return Fit(powers, best[1], tuple(lengths))


def expected_seconds(lengths: Sequence[int], seconds: Sequence[float], length: int, is_quadratic: bool) -> float | None:
    """How long a contender will take at a length; None: nothing was measured yet.

    From one measured length alone it is a lower limit: in proportion.
    """
    if not lengths:
        return None
    found = fit(lengths, seconds, (1, 2) if is_quadratic else (0, 1))
    return found.at(length) if found else seconds[-1] * length / lengths[-1]
