"""The command line: a thin shell over the library. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from focusllm import __version__
from focusllm.cli.ask import ask, generate
from focusllm.cli.bench import bench
from focusllm.cli.evaluate import evaluation
from focusllm.cli.inspect import info, verify
from focusllm.cli.terminal import notify
from focusllm.cli.train import train
from focusllm.errors import FocusError

EXIT_BAD_INPUT = 2

app = typer.Typer(
    help="Let decoder-only language models read very long text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (ask, generate, info, verify, train, bench):
    app.command()(command)
app.add_typer(evaluation, name="eval")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a `FocusError` becomes one line and exit code 2."""
    try:
        app()
    except FocusError as error:
        notify(f"focusllm: {error}")
        sys.exit(EXIT_BAD_INPUT)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
