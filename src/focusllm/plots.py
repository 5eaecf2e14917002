"""Logarithmic axes that people can read: which numbers stand on them and how they are written. No torch.

All plots of the project use these, so labels never overlap and a length is written alike everywhere. matplotlib's own
formatters either label every minor tick or write 3 x 10^1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis

DIGITS = (range(1, 10), (1, 2, 5), (1,))
"""What may be labelled in a decade, the most first."""
STRIDES = (1, 2, 3, 5, 10, 20)
"""Every how many decades, where one a decade would be too many."""
CLOSEST = {"x": 0.085, "y": 0.045}
"""How near labels may come, as a share of the axis: numbers are wider than high."""


def length_name(tokens: int) -> str:
    """4096 as 4K, 5000 as 5,000."""
    return f"{tokens // 1024:,}K" if tokens % 1024 == 0 else f"{tokens:,}"


def log_axis(axis: Axis) -> None:
    """Label an axis that is logarithmic, once all is drawn; between the labels there are no ticks."""
    low, high = sorted(axis.get_view_interval())
    ticks = log_ticks(low, high, CLOSEST[_name(axis)])
    _label(axis, ticks, [f"{tick:,.10g}" for tick in ticks], (low, high))


def _name(axis: Axis) -> str:
    name: str = axis.axis_name  # type: ignore[attr-defined]
    return name


def length_axis(axis: Axis, lengths: Sequence[int]) -> None:
    """Label a logarithmic axis with the lengths in tokens that were measured, as many as there is room for."""
    low, high = sorted(axis.get_view_interval())
    ticks: list[int] = []
    for length in sorted(set(lengths)):
        if not ticks or math.log(length / ticks[-1]) >= CLOSEST[_name(axis)] * math.log(high / low):
            ticks.append(length)
    _label(axis, ticks, [length_name(tick) for tick in ticks], (low, high))


def log_ticks(low: float, high: float, closest: float) -> list[float]:
    """Round numbers from `low` to `high`, as many as may be without two being nearer than the share `closest`."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    scales = [[digit * 10.0**power for power in range(first, last + 1) for digit in digits] for digits in DIGITS]
    scales += [[10.0**power for power in range(first, last + 1) if power % stride == 0] for stride in STRIDES]
    if sum(low <= tick <= high for tick in scales[0]) < 3:  # so short an axis is hardly curved
        scales.insert(0, _even_ticks(low, high))
    inside: list[float] = []
    for scale in scales:
        inside = [tick for tick in scale if low <= tick <= high]
        if all(math.log(b / a) >= closest * math.log(high / low) for a, b in pairwise(inside)):
            break
    return inside


def _even_ticks(low: float, high: float) -> list[float]:
    """Some five round numbers at equal distances."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(digit for digit in (1, 2, 5, 10) if digit * unit >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _label(axis: Axis, ticks: Sequence[float], labels: Sequence[str], view: tuple[float, float]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(ticks, labels)
    axis.set_view_interval(*view, ignore=True)  # ticks never widen an axis
