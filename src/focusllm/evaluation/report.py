"""Runs as one page to look at: tables and plots in one HTML file that needs no other, the plots as PNG. No torch.

All tasks by all methods in one table, also as Markdown; a table a task (methods by lengths); plots of score against
length, seconds and memory; a heat map of depth by length where examples have a depth. Several runs are joined; methods
that two of them have, or that were run otherwise, are told apart by run; what else runs of a task differ in is said.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focusllm.errors import ConfigError, DocumentError
from focusllm.evaluation import tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.note{color:#666;font-size:13px}img{max-width:100%}"""


LEAST_OF_FAMILY = 3
"""Tasks of which a mean is shown."""


@dataclass(frozen=True)
class Row:
    """A cell of a run."""

    run: str
    task: str
    length: int | None
    method: str
    metric: str
    value: float | None
    standard_error: float | None
    examples: int
    skipped: int
    reason: str
    seconds: float | None
    """Mean of an example's, from reading to the last token or label."""
    memory: float | None
    """Mean of the most bytes that the process held during an example, or GPU memory; the model is among them."""
    known: float | None
    """Mean share of an example's chunks that needed no reading: they repeat, or the example before has them."""
    by_depth: dict[float, float]
    """Mean score by depth."""
    first_seconds: float | None = None
    """Mean of the first questions' of documents that several questions share."""
    later_seconds: float | None = None
    """Mean of the others'."""

    @property
    def is_loss(self) -> bool:
        """Whether smaller is better."""
        return self.metric == "perplexity"

    @property
    def left_out(self) -> str:
        """What was left out and why; empty: nothing."""
        if not self.skipped:
            return ""
        what = f"{self.skipped} of {self.examples + self.skipped} examples" if self.examples or not self.length else ""
        where = f"at {self.length:,} tokens" if self.length else ""
        return f"{self.method}, {' '.join(part for part in (what, where) if part)}: left out, for {self.reason}."

    @property
    def shown(self) -> str:
        """The value as people read it: perplexity as it is, a score in percent."""
        if self.value is None:
            return "-"
        some = f" ({self.examples} of {self.examples + self.skipped})" if self.skipped else ""
        scale, places = (1, 2) if self.is_loss else (100, 1)
        error = f" ± {scale * self.standard_error:,.{places}f}" if self.standard_error else ""  # equal scores have none
        return f"{scale * self.value:,.{places}f}{error}{some}"


Runs = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]
"""Results and timings of runs, by the runs' names."""


def load(folders: Sequence[Path]) -> list[Row]:
    """The cells of finished runs.

    Raises:
        ConfigError: no folders. DocumentError: a folder without finished results.
    """
    return _rows_of(_read(folders))


def differences(folders: Sequence[Path]) -> dict[str, str]:
    """By task, in what the runs that have it differ besides method and adapter: a sentence. Of the others nothing.

    Raises:
        ConfigError, DocumentError: as `load`.
    """
    return _differences(_read(folders))


def _read(folders: Sequence[Path]) -> Runs:
    """Runs by the names of their folders, or by their paths where names are alike."""
    if not folders:
        raise ConfigError("no runs are named; give the folders that `focusllm eval ... --output` has written.")
    names, runs = Counter(folder.name for folder in folders), {}
    for folder in folders:
        try:
            found = [json.loads((folder / name).read_text()) for name in ("results.json", "timings.json")]
        except OSError as error:
            raise DocumentError(f"{folder} has no results; repeat the run's command until it is finished.") from error
        except ValueError as error:
            raise DocumentError(f"the results in {folder} are damaged ({error}); repeat the run's command.") from error
        runs[folder.name if names[folder.name] == 1 else str(folder)] = (found[0], found[1])
    return runs


def _rows_of(runs: Runs) -> list[Row]:
    rows, ways, versions = list[Row](), list[str](), list[int]()
    for name, (results, timings) in runs.items():
        try:
            rows += _rows(name, results, timings)
            ways += [_way(results, cell["method"]) for cell in results["results"]]
            versions += [results["plan"]["task_versions"][cell["task"]] for cell in results["results"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise DocumentError(
                f"the results of {name} are not those of a run ({type(error).__name__}: {error}); repeat its command."
            ) from error
    return _told_apart(rows, ways, versions)


def _rows(run: str, results: dict[str, Any], timings: list[dict[str, Any]]) -> Iterator[Row]:
    seconds = {(cell["task"], cell["length"], cell["method"]): cell for cell in timings}
    for cell in results["results"]:
        key = (cell["task"], cell["length"], cell["method"])
        mine = [line for line in results["examples"] if (line["task"], line["length"], line["method"]) == key]
        timed = seconds[key]
        first, later = _by_question(mine, timed["examples"])
        yield Row(
            run=run,
            task=cell["task"],
            length=cell["length"],
            method=cell["method"],
            metric=cell["metric"],
            value=cell["value"],
            standard_error=cell.get("standard_error"),
            examples=cell["examples"],
            skipped=cell["skipped"],
            reason=cell.get("reason", ""),
            seconds=timed["seconds"],
            memory=timed.get("peak_memory"),
            known=timed.get("known_chunks"),
            by_depth=_by_depth(mine),
            first_seconds=first,
            later_seconds=later,
        )


def _differences(runs: Runs) -> dict[str, str]:
    found = {}
    for task in dict.fromkeys(name for results, _ in runs.values() for name in results["plan"]["tasks"]):
        facts = {name: _facts(*run, task) for name, run in runs.items() if task in run[0]["plan"]["tasks"]}
        limits: dict[int | None, set[str | None]] = {}
        for name, of_run in facts.items():
            for cell in runs[name][0]["results"]:
                if cell["task"] == task:
                    limits.setdefault(cell["length"], set()).add(of_run["limit"])
        parts = []
        for fact in next(iter(facts.values())):
            values = {name: of_run[fact] for name, of_run in facts.items()}
            if fact == "limit" and all(len(of_length) == 1 for of_length in limits.values()):
                continue  # the examples of other lengths are others anyway
            if None not in values.values() and len(set(values.values())) > 1:
                parts.append(f"{fact} ({'; '.join(f'{name}: {value}' for name, value in values.items())})")
        if parts:
            found[task] = f"the runs differ in {', '.join(parts)}."
    return found


def by_sentence(differ: dict[str, str]) -> list[str]:
    """Differences as lines of text, tasks of which the same is said together."""
    tasks_of: dict[str, list[str]] = {}
    for task, sentence in differ.items():
        tasks_of.setdefault(sentence, []).append(task)
    return [f"{', '.join(named)}: {sentence}" for sentence, named in tasks_of.items()]


def _facts(results: dict[str, Any], timings: list[dict[str, Any]], task: str) -> dict[str, str | None]:
    """What must be equal for numbers of two runs to be compared; None: it is not known."""
    plan, inputs, about = results["plan"], results.get("inputs", {}), tasks.registry().get(task)
    needs = about.needs if about is not None else "text and files"
    measured = [cell for cell in timings if cell["task"] == task]
    processors = {each.get("processor") for cell in measured for each in cell["examples"]} - {None}
    facts = {
        "model": results["model"],
        "weights": results.get("weights"),
        "type": results["dtype"],
        "processor": ", ".join(sorted(processors or {results.get("machine", {}).get("processor", "unknown")})),
        "version of the task": plan["task_versions"][task],
        "text": inputs.get("text") or plan["text"] or "none" if "text" in needs else "any",
        "data": inputs.get("data") or plan["data"] or "none" if "data" in needs or "files" in needs else "any",
        "seed": plan["seed"],
        "limit": plan["limit"],
        "local budget": results["settings"]["local_length"],
    }
    if about is not None and about.metric == "perplexity":
        facts["greatest length"] = max(plan["lengths"])  # it says which texts are taken
    return {name: None if value is None else str(value) for name, value in facts.items()}


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write report.html, overview.md and the plots: their paths, the page first.

    Raises:
        ConfigError, DocumentError: as `load`; or matplotlib is not installed.
    """
    runs = _read(folders)
    rows, differ = _rows_of(runs), _differences(runs)
    output.mkdir(parents=True, exist_ok=True)
    paths, parts = [output / "report.html", output / "overview.md"], [_as_html(overview(rows))]
    notes = "".join(f"\n{line}\n" for line in by_sentence(differ))
    paths[1].write_text(_as_markdown(overview(rows)) + notes, encoding="utf-8")
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        parts.append(f"<h2>{html.escape(task)}</h2>\n{table(mine)}")
        said = [f"Note: {differ[task]}"] if task in differ else []
        for results, _ in runs.values():
            said += [note for note in results.get("notes", {}).get(task, ()) if note not in said]
        if said:
            parts.append(f'<p class="note">{"<br>".join(map(html.escape, said))}</p>')
        for name, figure in figures(mine):
            paths.append(output / f"{task}-{name}.png")
            figure.savefig(paths[-1], dpi=150)
            parts.append(_inline(figure, f"{task}: {name.replace('-', ' ')}"))
    about = "".join(f"<h3>{html.escape(name)}</h3>\n{_about(results)}" for name, (results, _) in runs.items())
    body = "\n".join([*parts, "<h2>Runs</h2>", about])
    paths[0].write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>FocusLLM evaluation</title>\n'
        f"<style>{STYLE}</style>\n<h1>FocusLLM evaluation</h1>\n{body}\n</html>\n",
        encoding="utf-8",
    )
    return paths


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
        counts = sorted({cell.examples for cell in cells.values() if cell.examples})
        count = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "0"
        lines.append([task, f"{length:,}" if length else "its own", first.metric, count, *shown])
    return lines + _means(rows, methods)


def _means(rows: Sequence[Row], methods: Sequence[str]) -> list[list[str]]:
    """A line a family (`ruler` of `ruler-vt` and others) and length."""
    families: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        family, hyphen, _ = row.task.partition("-")
        if hyphen and not row.is_loss:
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
    counts = sorted({row.examples for row in rows if row.examples})
    notes.append(f"Examples a cell: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}." if counts else "")
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
    axes.set_xscale("log", base=2 if label == "tokens" else 10)
    if label == "tokens":
        lengths = sorted({row.length for row in rows if row.length})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.set(xlabel=label, ylabel=_unit(rows), title=rows[0].task)
    if rows[0].is_loss:
        best = min(value for row in rows if (value := row.value) is not None)
        if max(_scaled(row) for row in rows) > 10 * best:
            axes.set_yscale("log")
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
    figure = _figure(1.5 + 3.2 * len(methods), 4)
    image = None
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        found = {row.length: row.by_depth for row in rows if row.method == method}
        grid = [[found.get(length, {}).get(depth, float("nan")) * 100 for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_facecolor("#ddd")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" if length else "own" for length in lengths], rotation=60)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=method, xlabel="tokens", ylabel="depth")
    assert image is not None
    figure.colorbar(image, ax=figure.axes, label=_unit(rows))
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a report needs the package matplotlib: pip install 'focusllm[eval]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _inline(figure: Figure, title: str) -> str:
    """A plot as an image in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}"></p>'


def _about(results: dict[str, Any]) -> str:
    facts = {name: value for name, value in results.items() if name not in ("results", "examples", "notes")}
    lines = []
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        lines.append(f"<b>{html.escape(name)}</b>: {html.escape(text)}")
    return f'<p class="note">{"<br>".join(lines)}</p>'


def _told_apart(rows: list[Row], ways: Sequence[str], versions: Sequence[int]) -> list[Row]:
    """Rows of several runs, with the run behind a method's name where another run has the same cell, has measured the
    method otherwise (with another adapter, say), or another version of the task.
    """
    seen = Counter((row.task, row.length, row.method) for row in rows)
    used = Counter(method for method, _ in {(row.method, way) for row, way in zip(rows, ways, strict=True)})
    made = {(row.task, row.method, version) for row, version in zip(rows, versions, strict=True)}
    drawn = Counter((task, method) for task, method, _ in made)
    shared = {row.method for row in rows if seen[row.task, row.length, row.method] > 1}
    shared |= {row.method for row in rows if used[row.method] > 1 or drawn[row.task, row.method] > 1}
    return [
        Row(**{**vars(row), "method": f"{row.method} ({row.run})"}) if row.method in shared else row for row in rows
    ]


def _way(results: dict[str, Any], method: str) -> str:
    """What results must have in common to stand under a method's name; the adapter has a part in FocusLLM's alone."""
    of_focus = method.partition(":")[0] == "focus"
    parts = [results.get(name) for name in ("model", "dtype", "device")]
    parts += [results["adapter"], results["settings"]] if of_focus else [results["settings"]["local_length"]]
    return json.dumps(parts, sort_keys=True)


def _by_depth(lines: Sequence[dict[str, Any]]) -> dict[float, float]:
    scores: dict[float, list[float]] = {}
    for line in lines:
        if "score" in line and "depth" in line["meta"]:
            scores.setdefault(line["meta"]["depth"], []).append(line["score"])
    return {depth: sum(found) / len(found) for depth, found in scores.items()}


def _by_question(lines: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Mean seconds of the first and of the later questions on documents that several share (None: there are none)."""
    seconds = {line["id"]: line["seconds"] for line in timed}
    asked: dict[str, list[float | None]] = {}
    for line in lines:
        if "document" in line["meta"]:
            asked.setdefault(line["meta"]["document"], []).append(seconds.get(line["id"]))
    first = [times[0] for times in asked.values() if len(times) > 1 and times[0] is not None]
    later = [each for times in asked.values() for each in times[1:] if each is not None]
    return (sum(first) / len(first), sum(later) / len(later)) if first and later else (None, None)


def _scaled(row: Row) -> float:
    assert row.value is not None
    return row.value if row.is_loss else 100 * row.value


def _unit(rows: Sequence[Row]) -> str:
    return rows[0].metric if rows[0].is_loss else f"{rows[0].metric}, %"
