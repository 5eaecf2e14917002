"""All commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from focusllm import __version__
from focusllm.cli.ask import ask, generate
from focusllm.cli.bench import bench
from focusllm.cli.evaluate import evaluation
from focusllm.cli.heads import heads
from focusllm.cli.inspect import info, verify
from focusllm.cli.library import library
from focusllm.cli.questions import questions
from focusllm.cli.serve import key, serve
from focusllm.cli.terminal import if_stopped
from focusllm.cli.train import train


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with if_stopped():  # before typer makes an exit without a word of it
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Let decoder-only language models read very long text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (ask, generate, info, heads, verify, train, questions, bench, serve, key):
    app.command()(command)
app.add_typer(library, name="library")
app.add_typer(evaluation, name="eval")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
