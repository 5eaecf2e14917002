"""`focusllm train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from focusllm.cli.options import Json
from focusllm.cli.terminal import calm_libraries, if_stopped, notify, say, training_progress


def train(
    sources: Annotated[
        list[str] | None, typer.Argument(help="Folders or files of text, JSONL, or datasets as hf:owner/name.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, logs and the adapter.")
    ] = Path("focusllm-training"),
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings as TOML; options change them.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="smollm2-135m, a folder, or a hub id.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="labels, or distill: what the base says with the passage in its window.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="At which the two are compared.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Of the base's likeliest tokens; 0: all.")] = None,
    init_adapter: Annotated[str | None, typer.Option("--adapter", help="Begin from these projections.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen base: auto, float32 or bfloat16.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Highest rate.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Rank of the projections; 0: full copies.")] = None,
    projections: Annotated[str | None, typer.Option(help="Which ones: any of the letters q, k, v, o.")] = None,
    memories_per_step: Annotated[int | None, typer.Option(min=1, help="Global batch; a multiple of processes.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another one draws other samples.")] = None,
    as_json: Json = False,
) -> None:
    """Train candidate projections on your text; run it again to go on where it stopped.

    Under `accelerate launch` or `torchrun` the processes share each step's memories.
    """
    given = locals()
    from focusllm.training.config import TrainConfig

    not_settings = ("sources", "output", "config", "as_json")
    changes = {name: value for name, value in given.items() if name not in not_settings and value is not None}
    if sources:
        changes["sources"] = sources
    settings = TrainConfig.from_file(config, **changes) if config else TrainConfig.from_dict(changes)
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    with calm_libraries(), training_progress(settings.steps, as_json or not is_first) as (report, reading, last):
        from focusllm.training.run import train as run_training

        remedy = f"run the same command again to go on from the last checkpoint in {output}"
        with if_stopped(remedy if is_first else None):
            folder = run_training(
                settings, output, report=report, reading=reading, notify=notify if is_first else lambda _: None
            )
    if not is_first:
        return
    if as_json:
        print(json.dumps({"adapter": str(folder), **last}, indent=2))
    else:
        curve = f", the curve in {output / 'loss.png'}" if (output / "loss.png").exists() else ""
        say(f"The adapter is in {folder} (focusllm ask --adapter {folder} ...){curve}.")
