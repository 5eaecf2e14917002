"""Finished runs as rows, a cell each, those of several runs joined and told apart; what the runs differ in. No torch.

Methods that two runs have, or that were run otherwise, have the run behind their name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focusllm.errors import ConfigError, DocumentError
from focusllm.evaluation import tasks
from focusllm.json_text import parse_json


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
    return rows_of(read(folders))


def read(folders: Sequence[Path]) -> Runs:
    """Runs by the names of their folders, or by their paths where names are alike.

    Raises:
        ConfigError: no folders. DocumentError: a folder without finished results.
    """
    if not folders:
        raise ConfigError("no runs are named; give the folders that `focusllm eval ... --output` has written.")
    names, runs = Counter(folder.name for folder in folders), {}
    for folder in folders:
        try:
            found = [parse_json((folder / name).read_bytes()) for name in ("results.json", "timings.json")]
        except OSError as error:
            raise DocumentError(f"{folder} has no results; repeat the run's command until it is finished.") from error
        except ValueError as error:
            raise DocumentError(f"the results in {folder} are damaged ({error}); repeat the run's command.") from error
        runs[folder.name if names[folder.name] == 1 else str(folder)] = (found[0], found[1])
    return runs


def rows_of(runs: Runs) -> list[Row]:
    """The cells of runs that were read.

    Raises:
        DocumentError: what was read is no run.
    """
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


def differences_of(runs: Runs) -> dict[str, str]:
    """By task, in what the runs that have it differ besides method and adapter: a sentence. Of the others nothing."""
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
