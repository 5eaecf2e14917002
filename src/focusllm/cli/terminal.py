"""What commands show on the terminal while they work: remarks, progress bars; and how they load a model."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focusllm.cli.options import ModelOptions
from focusllm.errors import FocusError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from focusllm.llm import FocusLLM


def notify(message: str) -> None:
    """A remark beside the output."""
    print(message, file=sys.stderr)


def load(options: ModelOptions, settings: dict[str, Any], quiet: bool, needs_candidates: bool = True) -> FocusLLM:
    """The model with its settings; says so if its candidates are untrained, and needed."""
    with calm_libraries(), status("Loading the model", quiet):
        from focusllm.llm import FocusLLM

        llm = FocusLLM.from_pretrained(**vars(options), notify=notify, **settings)
    if needs_candidates and not llm.has_trained_candidates:
        notify(
            "Note: no trained candidate projections are loaded, so little of the text beyond the local context will "
            "reach the answer (--adapter loads some)."
        )
    return llm


@contextmanager
def calm_libraries() -> Iterator[None]:
    """Keep transformers' own loading bars and remarks off the terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def status(text: str, quiet: bool) -> Iterator[None]:
    """A spinner with a text."""
    if quiet:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A folder that cannot be written is bad input."""
    try:
        yield
    except OSError as error:
        raise FocusError(f"{folder} cannot be written ({error.strerror or error}); choose another folder.") from error


def make_folder(folder: Path) -> None:
    """Make a folder, and see that files can be written into it, before anything is computed."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def reading_progress(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of (tokens done, tokens in all); there from the first call to the last token."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Reading {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    bar = _bar(quiet, *columns, TimeRemainingColumn())
    task = bar.add_task(name, total=None)

    def report(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    try:
        yield report
    finally:
        bar.stop()


@contextmanager
def training_progress(
    steps: int, quiet: bool
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str, int], None], dict[str, Any]]]:
    """A live line: step, losses by objective, supervised tokens a second, time left. Evaluations stay above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    last: dict[str, Any] = {}
    with _bar(quiet, *columns) as bar:
        task = bar.add_task("Preparing", total=None)

        def losses(found: dict[str, Any]) -> str:
            return "  ".join(f"{name} {values['loss']:.2f}" for name, values in found["objectives"].items())

        def report(entry: dict[str, Any]) -> None:
            last.update(entry)
            if "evaluation" in entry:
                bar.console.print(f"step {entry['step']}, held out: {losses(entry['evaluation'])}")
                if "without_memory" in entry:
                    bar.console.print(f"the same without memory: {losses(entry['without_memory'])}")
            else:
                rate = entry["labels"] / entry["seconds"]
                text = f"{losses(entry)}  {rate:.0f} tokens/s"
                bar.update(task, description=text, completed=entry["step"], total=steps)

        def reading(source: str, tokens: int) -> None:
            bar.update(task, description=f"Reading {source}: {tokens:,} tokens")

        yield report, reading, last


@contextmanager
def evaluation_progress(quiet: bool) -> Iterator[Callable[[str, float, float], None]]:
    """A live line: what is measured, the share that is done, time left."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with _bar(quiet, *columns, speed_estimate_period=600) as bar:
        task = bar.add_task("Preparing", total=None)
        yield lambda title, done, total: bar.update(task, description=title, completed=done, total=total)


@contextmanager
def bench_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A live line: turns done, what is under way, time since the start."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    bar = _bar(quiet, *columns)
    task = bar.add_task("", total=None)

    def report(what: str, done: int, total: int) -> None:
        bar.start()  # not before: bad input is one line
        bar.update(task, description=what, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


def _bar(quiet: bool, *columns: ProgressColumn, **settings: Any) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), disable=quiet, **settings)
