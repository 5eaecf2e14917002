"""`focusllm serve` and `focusllm key`."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from focusllm.cli.options import FocusOptions, ModelOptions, grouped
from focusllm.cli.terminal import load, notify

OPEN_SHARE = 0.2
"""Of the memory that is free at the start, so much may documents hold that wait to be asked again."""


@grouped
def serve(
    *,
    model: ModelOptions,
    focus: FocusOptions,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's need --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default as --model.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys (see `focusllm key`); without: no keys.")] = None,
    is_open: Annotated[bool, typer.Option("--open", help="Listen beyond this machine without keys.")] = False,
    library: Annotated[
        Path | None,
        typer.Option(help="Library: its sets can be asked as MODEL@SET, and files are kept in it; else until the end."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that are worked on at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait for that; more are refused.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 1_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 32 * 2**20,
    grace: Annotated[int, typer.Option(min=1, help="Seconds for requests under way when it is to stop.")] = 30,
) -> None:
    """Serve a model over HTTP, to clients of OpenAI's and Anthropic's APIs and to browsers."""
    from focusllm.huggingface.embedded import DEFAULT
    from focusllm.serving.keys import Keys as KeyFile
    from focusllm.serving.settings import ServerSettings

    known = KeyFile.load(keys) if keys is not None else KeyFile()
    settings = ServerSettings(
        host=host,
        port=port,
        model_id=name or model.model or DEFAULT,
        is_open=is_open,
        max_running=max_running,
        max_waiting=max_waiting,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        max_body=max_body,
        grace_seconds=grace,
    )
    settings.check(bool(known))
    from focusllm.errors import missing_package

    try:
        import torch

        from focusllm.library.library import Library
        from focusllm.memory.cost import free_memory
        from focusllm.serving.app import serve as run
    except ModuleNotFoundError as error:
        raise missing_package("the server needs", error.name or "fastapi", "server") from error
    given = focus.given() if library is None else {"far_context": "opened", **focus.given()}
    llm = load(model, given, quiet=False)
    settings = replace(settings, model_id=name or llm.name)  # where the default cannot be fetched, another stands in
    access = logging.getLogger("focusllm.access")
    access.setLevel(logging.INFO)
    access.addHandler(logging.StreamHandler(sys.stderr))
    access.propagate = False
    with ExitStack() as until_the_end:
        folder = library
        if folder is None and llm.model.settings.is_opened:  # what is uploaded has to lie somewhere
            folder = Path(until_the_end.enter_context(TemporaryDirectory(prefix="focusllm-"))) / "library"
        budget = int(OPEN_SHARE * free_memory(torch.device("cpu")))  # where what they hold lies, whatever computes
        kept = Library(folder, llm, memory_budget=budget, notify=notify) if folder is not None else None
        run(llm, settings, known, kept, lambda address: notify(f"Serving {settings.model_id} at {address}/v1"))


def key(
    owner: Annotated[str, typer.Argument(help="Whose key it is: a name for the log.")],
    keys: Annotated[Path, typer.Option(help="File that it is added to; only its hash is kept there.")],
) -> None:
    """Make an API key for a server, and print it once."""
    from focusllm.serving.keys import Keys as KeyFile

    print(KeyFile.create(keys, owner))
