"""`focusllm bench`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from focusllm.cli.options import Encoding, Json, ModelOptions, grouped
from focusllm.cli.terminal import bench_progress, calm_libraries, console, if_stopped, make_folder, notify, say
from focusllm.files import writing_to
from focusllm.huggingface.embedded import SPARE
from focusllm.options import parse_lengths


@grouped
def bench(
    *,
    contenders: Annotated[
        str, typer.Option(help="Of focus, exact (the paper), full (transformers), llama.cpp.")
    ] = "focus,exact,full,llama.cpp",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value,... for focus and exact; NAME:name=value,... adds a variant of focus."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the document: 4096,32K,1M.")] = "4096,8192,16384,32768",
    text: Annotated[
        str | None, typer.Option(help="File with the document; default: the Python language reference.")
    ] = None,
    model: ModelOptions,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after the first question.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds, in which all contenders take turns.")] = 3,
    full_to: Annotated[int, typer.Option(help="Longest text that full reads; beyond: a fit.")] = 32768,
    limit_minutes: Annotated[float, typer.Option(help="Most minutes of one turn; what takes longer is skipped.")] = 10,
    threads: Annotated[int | None, typer.Option(help="Of every contender. Default: as torch has it.")] = None,
    gguf: Annotated[
        list[str] | None, typer.Option(help="FILE of the model for llama.cpp; NAME=FILE adds a contender.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result and its plots.")] = Path(
        "focusllm-bench"
    ),
    kept: Annotated[
        Path | None, typer.Option("--from", help="The bench.json of a run: show and plot it again, measure nothing.")
    ] = None,
    encoding: Encoding = None,
    as_json: Json = False,
) -> None:
    """Measure reading, decoding and memory by length, against full attention and llama.cpp."""
    from focusllm.bench.plan import Plan, parse_contenders, sample_text
    from focusllm.bench.report import read_result, write_plots, write_result
    from focusllm.documents.sources import open_source

    if kept is not None:
        result = read_result(kept)
        make_folder(output)
        with writing_to(output, "make room, or choose another folder"):
            paths = write_plots(result, output)
        _show(result, paths, as_json)
        return
    plan = Plan(
        specs=parse_contenders(contenders, settings or [], gguf or []),
        lengths=parse_lengths(lengths),
        new_tokens=new_tokens,
        repeats=repeats,
        full_to=full_to,
        limit_minutes=limit_minutes,
        threads=threads,
        **{**vars(model), "model": model.model or SPARE},  # the small one, as all that was measured before
    )
    name, document = "the Python language reference", ""
    if text is not None:
        source = open_source(text, encoding)
        for remark in source.remarks:
            notify(remark)
        name, document = source.name, source.text
    make_folder(output)
    with calm_libraries(), bench_progress(as_json) as report:
        from focusllm.bench.run import run

        command = shlex.join(["focusllm", *sys.argv[1:]])

        def keep(found: dict[str, Any]) -> list[Path]:  # what is measured is there even if the rest is not waited for
            with writing_to(output, "make room, or choose another folder"):
                return write_result({"command": command, **found}, output)

        with if_stopped(f"what was measured is in {output}, as far as a length was done"):
            result = run(plan, document or sample_text(), name, report, notify, keep)
    result = {"command": command, **result}
    paths = keep(result)
    _show(result, paths, as_json)


def _show(result: dict[str, Any], paths: list[Path], as_json: bool) -> None:
    """The table and what was written, for people; at the end the result as one line of JSON."""
    from focusllm.bench.report import print_table

    if not as_json:
        out = console()
        print_table(result, out if out.is_terminal else console(width=120))
        say(f"Written: {' '.join(map(str, paths))}")
        if not any(path.suffix == ".png" for path in paths):
            print("There are no plots, for matplotlib is not installed.")
    print(json.dumps(result))
