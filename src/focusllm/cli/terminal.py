"""What commands show while they work: the answer on standard output, beside it remarks and progress bars on standard
error; and how they load a model.

What comes from files and models may hold control codes, with which it could command the terminal, and square brackets,
which are no markup: it goes through `visible`, and rich's markup is off everywhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from focusllm.cli.options import ModelOptions
    from focusllm.llm import FocusLLM


class Stopped(Exception):
    """The user stopped a command; no FocusError, for nothing is wrong."""

    def __init__(self, remedy: str | None = ""):
        super().__init__("" if remedy is None else f"Stopped; {remedy}." if remedy else "Stopped.")


@contextmanager
def if_stopped(remedy: str | None = "") -> Iterator[None]:
    """What to say if the user stops what is under way; None: nothing."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(remedy) from error


def visible(text: str) -> str:
    """A text with its control codes spelt out, line ends among them: a single line, which commands no terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, end: str = "\n") -> None:
    """A text of a model on standard output: as it is into files and pipes, on a terminal with control codes visible."""
    if sys.stdout.isatty():
        text = re.sub(r"[^\n\t]+", lambda found: visible(found[0]), text.replace("\r\n", "\n"))
    print(text, end=end, flush=True)


def notify(message: str = "") -> None:
    """A remark beside the output: a line."""
    print(visible(message), file=sys.stderr)


def console(stderr: bool = False, **settings: Any) -> Console:
    """A console that takes text as it is: no markup, no emoji, no guesses at numbers."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, **settings)


def load(options: ModelOptions, settings: dict[str, Any], quiet: bool, needs_candidates: bool = True) -> FocusLLM:
    """The model with its settings; says so if what it needs to find its way in a text was not trained or looked for."""
    with calm_libraries(), status("Loading the model", quiet):
        from focusllm.llm import FocusLLM

        llm = FocusLLM.from_pretrained(**vars(options), notify=notify, **settings)
    if needs_candidates and llm.model.settings.is_opened and llm.model.found_heads is None:
        notify(
            f"Note: the look-up heads of this model were not looked for, so chunks are chosen by the middle of its "
            f"layers, which takes longer; `focusllm heads {llm.name}` finds them, once."
        )
    elif needs_candidates and not llm.model.settings.is_opened and not llm.has_trained_candidates:
        notify(
            "Note: no trained candidate projections are loaded, so little of the text beyond the local context will "
            "reach the answer (--adapter loads some, --far-context opened needs none)."
        )
    return llm


@contextmanager
def calm_libraries() -> Iterator[None]:
    """Keep transformers' own loading bars and remarks off the terminal."""
    import warnings

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
    shown = console(stderr=True)
    with shown.status(text, spinner="line" if shown.options.ascii_only else "dots"):
        yield


def make_folder(folder: Path) -> None:
    """Make a folder, and see that files can be written into it, before anything is computed."""
    import tempfile

    from focusllm.files import writing_to

    with writing_to(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def reading_progress(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of (tokens done, tokens in all); there until the last token."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (_description("Reading "), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with _bar(quiet, *columns) as bar:
        task = bar.add_task(visible(name), total=None)

        def report(done: int, total: int) -> None:
            bar.start()
            bar.update(task, completed=done, total=total)
            if done >= total:
                bar.stop()

        yield report


@contextmanager
def training_progress(
    steps: int, quiet: bool
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str, int], None], dict[str, Any]]]:
    """A live line: step, losses by objective, supervised tokens a second, time left. Evaluations stay above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    columns = (_description(), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    last: dict[str, Any] = {}
    with _bar(quiet, *columns) as bar:
        task = bar.add_task("Preparing", total=None)

        def losses(found: dict[str, Any]) -> str:
            return "  ".join(f"{name} {values['loss']:.2f}" for name, values in found["objectives"].items())

        def report(entry: dict[str, Any]) -> None:
            bar.start()
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
            bar.start()
            bar.update(task, description=f"Reading {visible(source)}: {tokens:,} tokens")

        yield report, reading, last


@contextmanager
def evaluation_progress(quiet: bool) -> Iterator[Callable[[str, float, float], None]]:
    """A live line: what is measured, the share that is done, time left."""
    from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

    columns = (_description(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with _bar(quiet, *columns, speed_estimate_period=600) as bar:
        task = bar.add_task("Preparing", total=None)

        def report(title: str, done: float, total: float) -> None:
            bar.start()
            bar.update(task, description=visible(title), completed=done, total=total)

        yield report


@contextmanager
def bench_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A live line: turns done, what is under way, time since the start."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

    columns = (_description(), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with _bar(quiet, *columns) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.start()
            bar.update(task, description=visible(what), completed=done, total=total)

        yield report


def _description(before: str = "") -> ProgressColumn:
    from rich.progress import TextColumn

    return TextColumn(f"{before}{{task.description}}", markup=False)


@contextmanager
def _bar(quiet: bool, *columns: ProgressColumn, **settings: Any) -> Iterator[Progress]:
    """A bar that is not started yet, for bad input is one line; and that is gone when its work ends in an error."""
    from rich.progress import Progress

    bar = Progress(*columns, console=console(stderr=True), disable=quiet, **settings)
    try:
        yield bar
    except BaseException:
        bar.live.transient = True
        bar.live.stop()
        raise
    if bar.live.is_started:  # else it would leave an empty line
        bar.stop()
