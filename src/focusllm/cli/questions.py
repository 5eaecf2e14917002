"""`focusllm questions`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from focusllm.cli.options import Json
from focusllm.cli.terminal import calm_libraries, if_stopped, make_folder, notify, say


def questions(
    sources: Annotated[
        list[str], typer.Argument(help="Folders or files of text, JSONL, or datasets as hf:owner/name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the questions.")] = Path("questions.jsonl"),
    model: Annotated[str, typer.Option("--model", "-m", help="smollm2-135m, a folder, or a hub id.")] = "smollm2-135m",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Passages to ask about.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Another one draws other passages.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Let a model make questions of your text, to be trained on; run it again to go on where it stopped.

    Kept are those that it answers right with the passage and not without it.
    """
    from tqdm.auto import tqdm

    from focusllm.training.config import Source

    with calm_libraries():
        from focusllm.training.questions import make_questions

        make_folder(output.parent)
        with if_stopped("run the same command again to go on"), tqdm(desc="Asking", unit="passage") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            made = make_questions(
                [Source(source) for source in sources], output, model, count, seed, dtype,
                progress=progress, notify=notify,
            )  # fmt: skip
    if as_json:
        print(json.dumps({**asdict(made), "path": str(made.path)}))
    else:
        say(f"{made.kept} of {made.tried} questions are in {made.path} (questions and objectives of `focusllm train`).")
