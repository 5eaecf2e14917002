"""Plots: what stands on their axes can be read, and contenders are called by their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from focusllm.bench.report import figures, names_of
from focusllm.evaluation import report
from focusllm.evaluation.results import Row
from focusllm.plots import length_axis, length_name, log_axis, log_ticks

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def labels_of(figure: Figure) -> list[tuple[Axis, list[str]]]:
    """What is written at each axis, once it is known that no two labels touch."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            shown = [tick.label1 for tick in ticks if tick.label1.get_text() and low <= tick.get_loc() <= high]
            boxes = sorted((text.get_window_extent() for text in shown), key=lambda box: (box.x0, box.y0))
            assert not any(a.overlaps(b) for a, b in pairwise(boxes)), [text.get_text() for text in shown]
            found.append((axis, [text.get_text() for text in shown]))
    return found


@pytest.mark.parametrize(
    ("low", "high"),
    [(4, 12_000), (20, 2700), (0.3, 8), (88, 97), (0.0004, 3e7), (1.26, 1.27), (5, 50), (999, 1001), (7, 3e12)],
)
@pytest.mark.parametrize("size", [(6.5, 4.5), (8.0, 5.0)])
def test_labels_of_a_logarithmic_axis_do_not_touch(low: float, high: float, size: tuple[float, float]) -> None:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    axes.plot([low, high], [low, high], "o")
    views = axes.get_xlim(), axes.get_ylim()
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    assert (axes.get_xlim(), axes.get_ylim()) == views
    for _, labels in labels_of(figure):
        assert 3 <= len(labels) <= 16
        assert len(set(labels)) == len(labels)


def test_ticks_are_round() -> None:
    assert log_ticks(4, 300, 0.045) == [5, 10, 20, 50, 100, 200]
    assert log_ticks(0.95, 9.5, 0.045) == list(range(1, 10))
    assert log_ticks(1, 1e6, 0.085) == [1, 10, 100, 1000, 10_000, 100_000, 1_000_000]
    assert log_ticks(88, 97, 0.045) == [88, 90, 92, 94, 96]


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [
        ([4096, 8192, 131072], ["4K", "8K", "128K"]),
        ([100_000, 101_000, 102_000, 1_000_000], ["100,000", "1,000,000"]),
        ([4096], ["4K"]),
    ],
)
def test_lengths_are_labelled_where_there_is_room(lengths: Sequence[int], labels: list[str]) -> None:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log")
    axes.plot(lengths, lengths, "o")
    length_axis(axes.xaxis, lengths)
    assert labels_of(figure)[0][1] == labels


def test_length_name() -> None:
    assert [length_name(tokens) for tokens in (1024, 1 << 20, 1000, 113_108)] == ["1K", "1,024K", "1,000", "113,108"]


def test_contenders_are_called_by_their_names() -> None:
    about: dict[str, dict[str, Any]] = {
        "focus": {"kind": "focus"},
        "exact": {"kind": "focus"},
        "full": {"kind": "full"},
        "llama.cpp": {"kind": "llama.cpp", "file": "smollm2-135m-instruct-q4_1.gguf"},
        "q8_0": {"kind": "llama.cpp", "file": "q8_0.gguf"},
        "mine": {"kind": "llama.cpp", "file": "mine.gguf"},
        "fat": {"kind": "llama.cpp", "file": "Model.BF16.gguf"},
        "small": {"kind": "llama.cpp", "file": "Model-IQ3_XS.gguf"},
        "k": {"kind": "llama.cpp", "file": "Model-Q4_K_M.gguf"},
    }
    assert list(names_of(about).values()) == [
        *("FocusLLM", "FocusLLM exact", "full attention (transformers)"),
        *("llama.cpp Q4_1", "llama.cpp Q8_0", "llama.cpp mine", "llama.cpp BF16", "llama.cpp IQ3_XS"),
        "llama.cpp Q4_K_M",
    ]
    twice = {name: {"kind": "llama.cpp", "file": f"{name}-q8_0.gguf"} for name in ("a", "b")}
    assert list(names_of(twice).values()) == ["llama.cpp Q8_0 (a)", "llama.cpp Q8_0 (b)"]
    assert names_of({"llama.cpp": {"kind": "llama.cpp"}}) == {"llama.cpp": "llama.cpp"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("bench_*.json")), ids=lambda path: path.stem)
def test_plots_of_the_kept_results_can_be_read(path: Path) -> None:
    result = json.loads(path.read_text())
    plots = figures(result)
    assert list(plots) == ["answer", "prefill", "decoding"]
    for figure in plots.values():
        labels_of(figure)
        (legend,) = figure.legends
        shown = [text.get_text() for text in legend.get_texts()]
        assert shown[: len(result["contenders"])] == list(names_of(result["contenders"]).values())
        fits = any(row["status"] == "fit" for row in result["results"])
        assert shown[len(result["contenders"]) :] == ["a fit, not measured"] * fits
        width = figure.get_figwidth() * figure.dpi
        assert 0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= width


def test_the_picture_is_what_reading_and_answering_take() -> None:
    result = json.loads((RESULTS / "bench_bfloat16.json").read_text())
    axes = figures(result)["answer"].axes[0]
    assert axes.get_ylabel() == "seconds to read the text and answer in 24 tokens"
    first = next(row for row in result["results"] if row["contender"] == "focus")
    expected = first["prefill_seconds"]["median"] + 23 * first["seconds_per_token"]["median"]
    assert axes.lines[0].get_ydata()[0] == pytest.approx(expected)


def cell(method: str, length: int, value: float, seconds: float, depth: dict[float, float]) -> Row:
    metric = "accuracy" if value <= 1 else "perplexity"
    return Row("run", "task", length, method, metric, value, None, 3, 0, "", seconds, seconds * 2**30, None, depth)


@pytest.mark.parametrize(
    ("values", "seconds"), [((1.0, 0.5), (0.31, 4.5)), ((22.0, 400.0), (1.2, 1.3)), ((22.0, 23.0), (3.0, 8000.0))]
)
def test_plots_of_an_evaluation_can_be_read(values: tuple[float, float], seconds: tuple[float, float]) -> None:
    lengths = [4096, 5000, 8192, 16384, 131072, 1_000_000]
    depths = {0.0: 1.0, 0.5: 0.0, 1.0: 1.0}
    rows = [
        cell(method, length, values[number], seconds[number] * (1 + place / 2), depths)
        for number, method in enumerate(("focus", "full"))
        for place, length in enumerate(lengths)
    ]
    made = dict(report.figures(rows))
    assert set(made) == {"by-length", "by-seconds", "by-memory", "by-depth"}
    made.pop("by-depth")  # its columns are turned where they are many
    for figure in made.values():
        for _, labels in labels_of(figure):
            assert len(labels) >= 3
            assert not any("10^" in label for label in labels)
