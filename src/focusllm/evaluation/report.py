"""Runs as one page to look at: tables and plots in one HTML file that needs no other, the plots as PNG. No torch.

All tasks by all methods in one table, also as Markdown; a table a task (methods by lengths); plots of score against
length, seconds and memory; a heat map of depth by length where examples have a depth. Several runs are joined
(`results`), and what runs of a task differ in is said.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focusllm.errors import missing_package
from focusllm.evaluation.results import Row, by_sentence, differences_of, read, rows_of
from focusllm.files import whole_file, writing_to
from focusllm.plots import length_axis, length_name, log_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.note{color:#666;font-size:13px}img{max-width:100%}"""


LEAST_OF_FAMILY = 3
"""Tasks of which a mean is shown."""


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write report.html, overview.md and the plots: their paths, the page first.

    Raises:
        ConfigError, DocumentError: as `load`; or matplotlib is not installed.
        FocusError: the folder cannot be written; every file in it is whole, of this report or of an earlier one.
    """
    runs = read(folders)
    rows, differ = rows_of(runs), differences_of(runs)
    whole = overview(rows)
    parts, plots = [_as_html(whole)], dict[Path, bytes]()
    notes = "".join(f"\n{line}\n" for line in by_sentence(differ))
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        parts.append(f"<h2>{html.escape(task)}</h2>\n{table(mine)}")
        said = [f"Note: {differ[task]}"] if task in differ else []
        for results, _ in runs.values():
            said += [note for note in results.get("notes", {}).get(task, ()) if note not in said]
        if said:
            parts.append(f'<p class="note">{"<br>".join(map(html.escape, said))}</p>')
        for name, figure in figures(mine):
            plots[output / f"{task}-{name}.png"] = _drawn(figure, "png", dpi=150)
            parts.append(_inline(figure, f"{task}: {name.replace('-', ' ')}"))
    about = "".join(f"<h3>{html.escape(name)}</h3>\n{_about(results)}" for name, (results, _) in runs.items())
    body = "\n".join([*parts, "<h2>Runs</h2>", about])
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>FocusLLM evaluation</title>\n'
        f"<style>{STYLE}</style>\n<h1>FocusLLM evaluation</h1>\n{body}\n</html>\n"
    )
    texts = {output / "report.html": page, output / "overview.md": _as_markdown(whole) + notes}
    contents = {path: text.encode(errors="replace") for path, text in texts.items()} | plots
    with writing_to(output, "make room, or choose another folder"):
        output.mkdir(parents=True, exist_ok=True)
        for path in reversed(contents):  # the page last: it is there with all that belongs to it
            with whole_file(path) as part:
                part.write_bytes(contents[path])
    return list(contents)


def overview(rows: Sequence[Row]) -> list[list[str]]:
    """All results as a table, its first line the head: a line a task and length, a column a method; at the end the
    means of families of tasks, of methods that have all of them.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [["task", "tokens", "score", "examples", *methods]]
    order = list(dict.fromkeys(row.task for row in rows))
    for task, length in sorted(
        {(row.task, row.length) for row in rows}, key=lambda at: (order.index(at[0]), at[1] or 0)
    ):
        cells = {row.method: row for row in rows if (row.task, row.length) == (task, length)}
        first = next(iter(cells.values()))
        shown = [cells[method].shown if method in cells else "" for method in methods]
        count = _examples(list(cells.values()))
        lines.append([task, f"{length:,}" if length else "its own", first.metric, count or "0", *shown])
    return lines + _means(rows, methods)


def _means(rows: Sequence[Row], methods: Sequence[str]) -> list[list[str]]:
    """A line a family (`ruler` of `ruler-vt` and others, `lost-in-the-middle` of those with a number) and length."""
    families: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        numbered = re.fullmatch(r"(.+)-\d+", row.task)
        family = numbered[1] if numbered else row.task.partition("-")[0]
        if family != row.task and not row.is_loss:
            families.setdefault((family, row.length), []).append(row)
    lines = []
    for (family, length), members in families.items():
        names = {row.task for row in members}
        if len(names) < LEAST_OF_FAMILY:
            continue
        means = []
        for method in methods:
            scores = [
                row.value for row in members if row.method == method and row.value is not None and not row.skipped
            ]
            means.append(f"{100 * sum(scores) / len(scores):.1f}" if len(scores) == len(names) else "")
        title = f"{family}: mean of {len(names)} tasks"
        lines.append([title, f"{length:,}" if length else "its own", "mean", "", *means])
    return lines


def _examples(rows: Sequence[Row]) -> str:
    """How many examples cells have: the least and the most; empty: none has any."""
    counts = [row.examples for row in rows if row.examples]
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else ""


def _as_markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *others = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *others]) + "\n"


def _as_html(lines: Sequence[Sequence[str]]) -> str:
    head, *others = [[html.escape(cell) for cell in line] for line in lines]
    rows = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in others)
    return f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>{rows}</table>"


def table(rows: Sequence[Row]) -> str:
    """Methods by lengths, as HTML; what was left out is said below."""
    lengths = sorted({row.length for row in rows}, key=lambda length: length or 0)
    names = "".join(f"<th>{f'{length:,}' if length else 'own lengths'}</th>" for length in lengths)
    lines, notes = [f"<tr><th>{html.escape(rows[0].metric)}</th>{names}</tr>"], []
    for method in dict.fromkeys(row.method for row in rows):
        cells = {row.length: row for row in rows if row.method == method}
        shown = "".join(f"<td>{cells[length].shown if length in cells else ''}</td>" for length in lengths)
        lines.append(f"<tr><td>{html.escape(method)}</td>{shown}</tr>")
        for row in cells.values():
            if row.left_out:
                notes.append(row.left_out)
            if row.known:
                where = f"at {row.length:,} tokens" if row.length else "at its own lengths"
                notes.append(f"{method}, {where}: {row.known:.0%} of the chunks needed no reading.")
            if row.known is not None and row.first_seconds is not None and row.later_seconds is not None:
                notes.append(
                    f"{method}{f', {row.length:,} tokens' if row.length else ''}: {row.first_seconds:.1f} s for a "
                    f"document's first question, {row.later_seconds:.1f} s for later ones."
                )
    count = _examples(rows)
    notes.append(f"Examples a cell: {count}." if count else "")
    below = "<br>".join(map(html.escape, notes))
    return f'<table>{"".join(lines)}</table>\n<p class="note">{below}</p>'


def figures(rows: Sequence[Row]) -> list[tuple[str, Figure]]:
    """The plots of one task, by name.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    measured = [row for row in rows if row.value is not None]
    made = []
    if len({row.length for row in measured}) > 1:
        made.append(("by-length", _lines(measured, lambda row: row.length, "tokens")))
    if any(row.seconds for row in measured):
        timed = [row for row in measured if row.seconds]
        made.append(("by-seconds", _lines(timed, lambda row: row.seconds, "seconds an example")))
    if any(row.memory for row in measured):
        held = [row for row in measured if row.memory]
        made.append(("by-memory", _lines(held, lambda row: (row.memory or 0) / 2**30, "most GiB held")))
    if any(len(row.by_depth) > 1 for row in measured):
        made.append(("by-depth", _heat_maps(measured)))
    return made


def _lines(rows: Sequence[Row], x: Callable[[Row], float | None], label: str) -> Figure:
    """A line a method, its points the lengths."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        mine = sorted((row for row in rows if row.method == method), key=lambda row: row.length or 0)
        values = [_scaled(row) for row in mine]
        line = "-" if number < 10 else "--"
        axes.plot([x(row) or 0 for row in mine], values, ls=line, marker="o", ms=4, color=f"C{number}", label=method)
    axes.set_xscale("log")
    if label == "tokens":
        length_axis(axes.xaxis, [row.length for row in rows if row.length])
    else:
        log_axis(axes.xaxis)
    axes.set(xlabel=label, ylabel=_unit(rows), title=rows[0].task)
    if rows[0].is_loss:
        best = min(value for row in rows if (value := row.value) is not None)
        if max(_scaled(row) for row in rows) > 10 * best:
            axes.set_yscale("log")
            log_axis(axes.yaxis)
    else:
        axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _heat_maps(rows: Sequence[Row]) -> Figure:
    """A map a method: depth down, length across."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lengths = sorted({row.length for row in rows}, key=lambda length: length or 0)
    depths = sorted({depth for row in rows for depth in row.by_depth})
    names = [length_name(length) if length else "own" for length in lengths]
    turned = 0 if max(map(len, names)) * len(names) <= 24 else 60
    figure = _figure(1.5 + 3.2 * len(methods), 4)
    image = None
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        found = {row.length: row.by_depth for row in rows if row.method == method}
        grid = [[found.get(length, {}).get(depth, float("nan")) * 100 for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_facecolor("#ddd")
        axes.set_xticks(range(len(lengths)), names, rotation=turned)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=method, xlabel="tokens", ylabel="depth")
    assert image is not None
    figure.colorbar(image, ax=figure.axes, label=_unit(rows))
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("a report needs", "matplotlib", "eval") from error
    return Figure(figsize=(width, height), layout="constrained")


def _inline(figure: Figure, title: str) -> str:
    """A plot as an image in the page."""
    data = base64.b64encode(_drawn(figure, "svg", metadata={"Date": None})).decode()
    return f'<p><img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}"></p>'


def _drawn(figure: Figure, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **settings)
    return buffer.getvalue()


def _about(results: dict[str, Any]) -> str:
    facts = {name: value for name, value in results.items() if name not in ("results", "examples", "notes")}
    lines = []
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        lines.append(f"<b>{html.escape(name)}</b>: {html.escape(text)}")
    return f'<p class="note">{"<br>".join(lines)}</p>'


def _scaled(row: Row) -> float:
    assert row.value is not None
    return row.value if row.is_loss else 100 * row.value


def _unit(rows: Sequence[Row]) -> str:
    return rows[0].metric if rows[0].is_loss else f"{rows[0].metric}, %"
