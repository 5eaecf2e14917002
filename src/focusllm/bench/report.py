"""What a run leaves to look at: a table, plots, and the result as JSON. No torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focusllm.errors import DocumentError, first_line
from focusllm.files import whole_file
from focusllm.plots import length_axis, log_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
Row = dict[str, Any]


def write_result(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write `bench.json` and the plots (`write_plots`); without matplotlib the first alone.

    Returns:
        What was written.
    """
    path = folder / "bench.json"
    with whole_file(path) as part:
        part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return [path, *write_plots(result, folder)]


def write_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw `bench-answer.png`, `bench-prefill.png` and `bench-decoding.png`.

    Returns:
        What was written: nothing where matplotlib is not installed.
    """
    paths = []
    for name, figure in figures(result).items():
        paths.append(folder / f"bench-{name}.png")
        with whole_file(paths[-1]) as part:
            figure.savefig(part, dpi=130, format="png")
    return paths


def read_result(path: Path) -> dict[str, Any]:
    """A result that `write_result` wrote.

    Raises:
        DocumentError: there is none in the file.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for row in result["results"]:
            if row["status"] != "skipped":
                _cells(row)
        names_of({row["contender"]: result["contenders"][row["contender"]] for row in result["results"]})
        _ = int(result["plan"]["new_tokens"]), [rates["flops_per_second"] for rates in result["limits"].values()]
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DocumentError(f"{path} cannot be read ({reason}); name the bench.json of a run.") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DocumentError(f"{path} is no result of focusllm bench; name the bench.json of a run.") from error
    return result


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
        where = f"beside {int(length):,} tokens"  # a name in a result that was read from its file
        say(f"The machine {where}: products {rates[0]:,.0f} GFLOP/s, bandwidth {rates[1]:,.1f} GB/s.")


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
TITLES = {"focus": "FocusLLM", "full": "full attention (transformers)", "llama.cpp": "llama.cpp"}
"""Kinds of contenders as people know them."""
_BITS = re.compile(r"(?<![a-z0-9])(i?q\d(?:_\w+?)?|bf16|f16|f32)(?![a-z0-9_])", re.IGNORECASE)


def names_of(contenders: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What plots call contenders, by the names that they have in a command: FocusLLM, llama.cpp Q8_0.

    A variant has its own name behind that of its kind; so has llama.cpp whose file does not say how many bits it has.
    """
    names = {}
    for name, about in contenders.items():
        kind = about["kind"]
        bits = _BITS.search(about.get("file", "")) or _BITS.search(name) if kind == "llama.cpp" else None
        own = bits[1].upper() if bits else "" if name == kind else name
        names[name] = f"{TITLES[kind]} {own}".rstrip()
    count = Counter(names.values())
    return {name: title if count[title] == 1 else f"{title} ({name})" for name, title in names.items()}


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """The plots by name; none where matplotlib is not installed."""
    more = result["plan"]["new_tokens"] - 1
    answer: Panel = (
        f"seconds to read the text and answer in {more + 1} tokens",
        lambda row: float(row["prefill_seconds"]["median"]) + more * float(row["seconds_per_token"]["median"]),
    )
    plots = {"answer": (answer,), "prefill": (_PREFILL,), "decoding": (_DECODING, _MEMORY)}
    try:
        return {name: _plot(result, panels) for name, panels in plots.items()}
    except ImportError:
        return {}


def _plot(result: dict[str, Any], panels: tuple[Panel, ...]) -> Figure:
    """Both axes logarithmic; hollow markers and dashes are fits. One legend above all panels hides no point."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows: list[Row] = [row for row in result["results"] if row["status"] != "skipped"]
    names = names_of(result["contenders"])
    figure = Figure(figsize=(6.5 * len(panels), 4.5), layout="constrained")
    for axes, (label, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the text", ylabel=label)
        for number, (contender, name) in enumerate(names.items()):
            own = [row for row in rows if row["contender"] == contender]
            measured = [row for row in own if row["status"] == "measured"]
            fitted = [row for row in own if row["status"] == "fit"]
            color = f"C{number}"
            if measured:
                axes.plot([r["tokens"] for r in measured], [value(r) for r in measured], "o-", color=color, label=name)
            if fitted:
                joined = [*measured[-1:], *fitted]
                axes.plot([r["tokens"] for r in joined], [value(r) for r in joined], "--", color=color, lw=1)
                points = [r["tokens"] for r in fitted], [value(r) for r in fitted]
                axes.plot(*points, "o", color=color, mfc="none")
        if rows:
            length_axis(axes.xaxis, [row["tokens"] for row in rows])
            log_axis(axes.yaxis)
        axes.grid(alpha=0.3)
    lines = figure.axes[0].get_legend_handles_labels()[0]
    if any(row["status"] == "fit" for row in rows):
        lines.append(Line2D([], [], color="gray", ls="--", lw=1, marker="o", mfc="none", label="a fit, not measured"))
    if lines:
        figure.legend(handles=lines, loc="outside upper center", ncols=2 * len(panels), frameon=False)
    return figure
