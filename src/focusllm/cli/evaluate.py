"""`focusllm eval`: `run` (which need not be said), `list` and `report`."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from focusllm.cli.options import FocusOptions, Json, ModelOptions, grouped
from focusllm.cli.terminal import (
    calm_libraries,
    console,
    evaluation_progress,
    if_stopped,
    load,
    make_folder,
    notify,
    say,
    visible,
)
from focusllm.config import FocusConfig
from focusllm.errors import ConfigError
from focusllm.options import parse_lengths, parse_setting


class _RunByDefault(typer.core.TyperGroup):
    """`focusllm eval TASK ...` is `focusllm eval run TASK ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            meant = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.7)  # no task is called so
            if meant:
                raise ConfigError(f"there is no task {args[0]!r}; did you mean `focusllm eval {meant[0]}`?")
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluation = typer.Typer(cls=_RunByDefault, no_args_is_help=True, help="Measure methods on long-text tasks.")


@evaluation.command("run")
@grouped
def evaluate(
    tasks: Annotated[list[str], typer.Argument(help="Tasks by name; `focusllm eval list` shows them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder; a stopped run goes on in it.")],
    *,
    methods: Annotated[
        list[str], typer.Option("--method", help="A method, or method:option=value,...; may be repeated.")
    ] = ["focus"],  # noqa: B006
    lengths: Annotated[str, typer.Option(help="Tokens, as in 4096,8192; of the whole prompt with its answer.")] = "",
    limit: Annotated[int, typer.Option(help="Most examples of a task at a length.")] = 100,
    model: ModelOptions,
    focus: FocusOptions,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="name=value: any other setting of FocusConfig; may be repeated.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmarks' own files.")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Load data sets from the hub.")] = False,
    text: Annotated[
        str | None, typer.Option(help="Plain text: a file, a folder, hf:owner/name, pg19, proof-pile, codeparrot.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure methods on tasks; run it again to go on where it stopped."""
    from focusllm.evaluation.plan import Plan

    plan = Plan(
        tuple(tasks),
        tuple(methods),
        tuple(parse_lengths(lengths) if lengths else ()),
        limit,
        seed,
        str(data) if data else None,
        text,
        hub,
    )
    chosen = {**focus.given(), **dict(map(parse_setting, settings or []))}
    FocusConfig.check_names(chosen)  # before they stand beside the model's arguments
    make_folder(output)
    llm = load(model, chosen, quiet=as_json, needs_candidates=any(name.startswith("focus") for name in methods))
    with calm_libraries(), evaluation_progress(as_json) as report:
        from focusllm.evaluation.runner import evaluate as run_evaluation

        with if_stopped(f"run the same command again to go on with what is in {output}"):
            results = run_evaluation(plan, llm, output, report)
    from focusllm.evaluation.report import write_report

    if as_json:
        print(json.dumps(results, indent=1))
    else:
        _show_results([output])
    try:
        page = write_report([output], output / "report")[0]
    except ConfigError as error:  # the results are there all the same
        notify(f"No report is made: {error}")
    else:
        notify(f"The report is {page}.")


@evaluation.command("list")
def list_evaluation(as_json: Json = False) -> None:
    """Show the tasks and methods."""
    from focusllm.evaluation.methods import NAMES
    from focusllm.evaluation.tasks import registry

    needs = {
        "": "made up",
        "text": "needs --text",
        "data": "needs --data",
        "files": "needs --data or --hub",
        "text and files": "needs --data and --text, or --hub",
    }
    if as_json:
        tasks = [{"name": task.name, "needs": task.needs, "metric": task.metric} for task in registry().values()]
        print(json.dumps({"tasks": tasks, "methods": NAMES}, indent=1))
        return
    for task in registry().values():
        print(f"{task.name:36} {needs[task.needs]}, {task.metric}")
    print(f"\nMethods: {', '.join(NAMES)}")


@evaluation.command("report")
def report_evaluation(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html and plots.")] = Path("report"),
    as_json: Json = False,
) -> None:
    """Make one page with tables and plots of several runs."""
    from focusllm.evaluation.report import write_report
    from focusllm.evaluation.results import load as load_runs

    make_folder(output)
    paths = write_report(runs, output)
    if as_json:
        rows = [vars(row) for row in load_runs(runs)]
        print(json.dumps({"files": [str(path) for path in paths], "rows": rows}, indent=1))
        return
    _show_results(runs)
    say(f"The report is {paths[0]}, with its plots and overview.md beside it.")


def _show_results(folders: list[Path]) -> None:
    """A table a task: methods by lengths."""
    from rich.table import Table

    from focusllm.evaluation.results import by_sentence, differences_of, read, rows_of

    runs, out = read(folders), console()
    rows = rows_of(runs)
    for task in dict.fromkeys(row.task for row in rows):
        mine = {(row.method, row.length): row for row in rows if row.task == task}
        lengths = sorted({length for _, length in mine}, key=lambda length: length or 0)
        table = Table("method", title=visible(f"{task}: {next(iter(mine.values())).metric}"))
        for length in lengths:
            table.add_column(f"{length:,}" if length else "own lengths", justify="right")
        for method in dict.fromkeys(method for method, _ in mine):
            cells = [mine.get((method, length)) for length in lengths]
            table.add_row(visible(method), *(cell.shown if cell else "" for cell in cells))
        out.print(table)
        for row in mine.values():
            if row.left_out:
                out.print(visible(row.left_out))
    for line in by_sentence(differences_of(runs)):
        out.print(visible(line))
