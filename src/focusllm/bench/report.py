"""What a run leaves to look at: a table, two plots, and the result as JSON. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from focusllm.files import whole_file

GIB = 2**30
Row = dict[str, Any]


def write_result(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write `bench.json`, `bench-prefill.png` and `bench-decoding.png`; without matplotlib the first alone.

    Returns:
        What was written.
    """
    paths = [folder / "bench.json"]
    with whole_file(paths[0]) as part:
        part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, panels in {"bench-prefill.png": (_PREFILL,), "bench-decoding.png": (_DECODING, _MEMORY)}.items():
        path = folder / name
        if _plot(result["results"], panels, path):
            paths.append(path)
    return paths


def print_table(result: dict[str, Any], console: Any) -> None:
    """The table for people: a row for every length and contender; then what was skipped and why, and the limits."""
    from rich import box
    from rich.table import Table

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("contender", no_wrap=True)
    for title in (
        "first\ntoken, s",
        "of the\nproducts",
        "tokens/s",
        "of the\nbandwidth",
        "second\none, s",
        "peak\nGiB",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    rows: list[Row] = result["results"]
    for length in sorted({row["tokens"] for row in rows}):
        for row in (row for row in rows if row["tokens"] == length and row["status"] != "skipped"):
            table.add_row(*_cells(row), style="dim" if row["status"] == "fit" else None)
        table.add_section()
    console.print(table)
    say("Medians of the rounds, ± half their range; ~ is a fit to shorter texts, not a measurement.")
    words = {"fit": "fitted", "skipped": "skipped", "measured": "not in all rounds"}
    without: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            without.setdefault((row["contender"], row["status"], row["reason"]), []).append(f"{row['tokens']:,}")
    for (name, status, reason), lengths in without.items():
        say(f"{name} at {', '.join(lengths)} tokens {words[status]}: {reason}.")
    for length, limits in result["limits"].items():
        rates = limits["flops_per_second"]["median"] / 1e9, limits["bytes_per_second"]["median"] / 1e9
        say(f"The machine beside {length:,} tokens: products {rates[0]:,.0f} GFLOP/s, bandwidth {rates[1]:,.1f} GB/s.")


def _cells(row: Row) -> list[str]:
    mark = "~" if row["status"] == "fit" else ""

    def median(key: str) -> str:
        found = row[key]
        half = (found.get("max", 0) - found.get("min", 0)) / 2 / found["median"]
        return f"{mark}{_number(found['median'])}" + (f" ±{half:.0%}" if half else "")

    def share(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key]:.0%}"

    return [
        f"{row['tokens']:,}",
        row["contender"],
        median("prefill_seconds"),
        share("share_of_products"),
        median("tokens_per_second"),
        share("share_of_bandwidth"),
        median("second_question_seconds"),
        f"{mark}{row['peak_memory'] / GIB:.2f}",
    ]


def _number(value: float) -> str:
    """Three digits, or all in front of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


Panel = tuple[str, Callable[[Row], float]]
_PREFILL: Panel = ("seconds to the first token", lambda row: float(row["prefill_seconds"]["median"]))
_DECODING: Panel = ("milliseconds a token", lambda row: 1e3 * float(row["seconds_per_token"]["median"]))
_MEMORY: Panel = ("peak memory, GiB", lambda row: float(row["peak_memory"]) / GIB)


def _plot(rows: list[Row], panels: tuple[Panel, ...], path: Path) -> bool:
    """Both axes logarithmic; hollow markers and dashes are fits. False: matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullLocator
    except ImportError:
        return False
    figure = Figure(figsize=(6.5 * len(panels), 4.5), layout="constrained")
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lengths = sorted({row["tokens"] for row in rows})
    for axes, (label, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row["contender"] == name and row["status"] != "skipped"]
            measured = [row for row in own if row["status"] == "measured"]
            fitted = [row for row in own if row["status"] == "fit"]
            color = f"C{number}"
            if measured:
                axes.plot([r["tokens"] for r in measured], [value(r) for r in measured], "o-", color=color, label=name)
            if fitted:
                joined = [*measured[-1:], *fitted]
                axes.plot([r["tokens"] for r in joined], [value(r) for r in joined], "--", color=color, lw=1)
                points = [r["tokens"] for r in fitted], [value(r) for r in fitted]
                axes.plot(*points, "o", color=color, mfc="none", label=f"{name}, a fit")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(lengths)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x % 1024 == 0 else f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(FuncFormatter(lambda y, _: _number(y)))
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")
    return True
