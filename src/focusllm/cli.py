"""The command line: a thin shell over the library. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from focusllm import __version__
from focusllm.chunking import count_chunks
from focusllm.errors import FocusError
from focusllm.options import parse_lengths, parse_setting

if TYPE_CHECKING:
    from focusllm.llm import Answer, FocusLLM

app = typer.Typer(
    help="Let any decoder-only language model read very long text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2-135m, a folder, or a hub id.")]
Adapter = Annotated[str | None, typer.Option(help="Candidate projections: a folder, a hub id, or none.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")]
ChunkLength = Annotated[int | None, typer.Option(help="Tokens of a chunk.")]
LocalLength = Annotated[int | None, typer.Option(help="Tokens of the local context.")]
PromptLength = Annotated[int | None, typer.Option(help="Most tokens of the dynamic prompt.")]
ChunksPerBatch = Annotated[int | None, typer.Option(help="Chunks read at once: bounds the scratch memory.")]
Decoding = Annotated[str | None, typer.Option(help="cached, or exact (the paper, slow).")]
RefreshRows = Annotated[
    int | None, typer.Option(min=0, help="Chunks condensed anew for every token, the most attended; 0: all.")
]
KvDtype = Annotated[str | None, typer.Option(help="How chunks are kept: same (as computed), int8 or int4.")]
KvPlace = Annotated[str | None, typer.Option(help="Where chunks are kept: auto, device, host or disk.")]
Encoding = Annotated[str, typer.Option(help="Encoding of text files.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens up to this share.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Makes sampling repeatable.")]

EXIT_BAD_INPUT = 2


def main() -> None:
    """Run the command line; a `FocusError` becomes one line and exit code 2."""
    try:
        app()
    except FocusError as error:
        _fail(error)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


def _fail(error: Exception) -> None:
    print(f"focusllm: {error}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def ask(
    documents: Annotated[list[str], typer.Argument(help="Text, Markdown, HTML, PDF or source files; - for stdin.")],
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Ask this; may be repeated. Without: ask at a prompt.")
    ] = None,
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = None,
    chunk_length: ChunkLength = None,
    local_length: LocalLength = None,
    prompt_length: PromptLength = None,
    chunks_per_batch: ChunksPerBatch = None,
    decoding: Decoding = None,
    refresh_rows: RefreshRows = None,
    kv_dtype: KvDtype = None,
    kv_place: KvPlace = None,
    encoding: Encoding = "utf-8",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was read: asked again, it is not read again.")
    ] = None,
    num_citations: Annotated[int, typer.Option("--citations", min=0, help="How many passages to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Read documents once and answer questions about them."""
    from focusllm.readers import read_text

    if question is None and "-" in documents:
        _fail(FocusError("standard input is the document, so questions cannot be typed; give them with -q."))
    texts = [(("stdin" if path == "-" else Path(path).name), read_text(path, encoding)) for path in documents]
    settings = _settings(locals())
    llm = _load(model, adapter, dtype, device, settings, quiet=as_json)
    for text in question or []:
        llm.frame(text)  # a bad question is refused before the long read
    read = []
    for name, text in texts:
        with _reading(name, quiet=as_json) as progress:
            read.append(llm.read_text(text, name=name, progress=progress, store=store))
    sampling = _sampling(max_new_tokens, temperature, top_p, seed)
    answers = []
    for number, text in enumerate(question if question is not None else _typed_questions()):
        if number and not as_json:
            print()
        try:
            answer = llm.ask(read, text, on_text=_printer(as_json), **sampling)
        except FocusError as error:
            if question is not None:
                raise
            _notify(f"focusllm: {error}")  # typed: the next one may be better, and the documents are read
            continue
        if as_json:
            answers.append({"question": text, **answer.to_dict(num_citations)})
        else:
            print()
            _show_origin(answer, num_citations)
    if as_json:
        described = [
            {"name": d.name, "num_tokens": d.num_tokens, "num_chunks": len(d.chunks), "read_seconds": d.read_seconds}
            for d in read
        ]
        print(json.dumps({"model": model, "documents": described, "answers": answers}, indent=2))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="File with the text to go on from; - for stdin.")],
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = None,
    chunk_length: ChunkLength = None,
    local_length: LocalLength = None,
    prompt_length: PromptLength = None,
    chunks_per_batch: ChunksPerBatch = None,
    decoding: Decoding = None,
    refresh_rows: RefreshRows = None,
    kv_dtype: KvDtype = None,
    kv_place: KvPlace = None,
    encoding: Encoding = "utf-8",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Continue a text of any length."""
    from focusllm.readers import read_text

    text = read_text(prompt, encoding)
    llm = _load(model, adapter, dtype, device, _settings(locals()), quiet=as_json)
    sampling = _sampling(max_new_tokens, temperature, top_p, seed)
    with _reading(Path(prompt).name, quiet=as_json) as progress:
        answer = llm.continue_text(text, progress=progress, on_text=_printer(as_json), **sampling)
    if as_json:
        print(json.dumps({"model": model, **answer.to_dict()}, indent=2))
    else:
        print()
        _show_speed(answer)


@app.command()
def verify(
    model: Annotated[str | None, typer.Argument(help="smollm2-135m, a folder, or a hub id.")] = None,
    cases: Annotated[Path | None, typer.Option(help="Run the golden cases in this folder.")] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Check that the method computes on a model what it should, or replay golden cases.

    float32 shows mistakes best; in a 16-bit type the limits are as wide as its rounding.
    """
    if model is None and cases is None:
        _fail(FocusError("there is nothing to verify; name a model, or a folder with --cases."))
    results: list[dict[str, Any]] = []
    if cases is not None:
        results += _verify_cases(cases, quiet=as_json)
    if model is not None:
        results += _verify_model(model, dtype, device, quiet=as_json)
    failed = [result for result in results if not result["passed"]]
    if as_json:
        print(json.dumps({"passed": not failed, "results": results}, indent=2))
    else:
        print(f"{len(results) - len(failed)} of {len(results)} passed")
    if failed:
        raise typer.Exit(1)


@app.command()
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

    names = ("model", "init_adapter", "dtype", "steps", "learning_rate", "rank", "projections", "memories_per_step")
    changes = {name: value for name in (*names, "seed") if (value := given[name]) is not None}
    if sources:
        changes["sources"] = sources
    settings = TrainConfig.from_file(config, **changes) if config else TrainConfig.from_dict(changes)
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    with _calm_libraries(), _training_progress(settings.steps, as_json or not is_first) as (report, reading, last):
        from focusllm.training.run import train as run_training

        try:
            folder = run_training(
                settings, output, report=report, reading=reading, notify=_notify if is_first else lambda _: None
            )
        except KeyboardInterrupt:
            if is_first:
                _notify(f"Stopped. Run the same command again to go on from the last checkpoint in {output}.")
            sys.exit(130)
    if not is_first:
        return
    if as_json:
        print(json.dumps({"adapter": str(folder), **last}, indent=2))
    else:
        curve = f", the curve in {output / 'loss.png'}" if (output / "loss.png").exists() else ""
        print(f"The adapter is in {folder} (focusllm ask --adapter {folder} ...){curve}.")


@app.command()
def bench(
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
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = None,
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
    encoding: Encoding = "utf-8",
    as_json: Json = False,
) -> None:
    """Measure reading, decoding and memory by length, against full attention and llama.cpp."""
    from focusllm.bench.plan import Plan, parse_contenders, sample_text
    from focusllm.bench.report import print_table, write_result
    from focusllm.readers import read_text

    plan = Plan(
        specs=parse_contenders(contenders, settings or [], gguf or []),
        lengths=parse_lengths(lengths),
        model=model,
        adapter=adapter,
        dtype=dtype,
        device=device,
        new_tokens=new_tokens,
        repeats=repeats,
        full_to=full_to,
        limit_minutes=limit_minutes,
        threads=threads,
    )
    name, document = "the Python language reference", ""
    if text is not None:
        name, document = Path(text).name, read_text(text, encoding)
    with _writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
    with _calm_libraries(), _bench_progress(as_json) as report:
        from focusllm.bench.run import run

        command = " ".join(["focusllm", *sys.argv[1:]])

        def keep(found: dict[str, Any]) -> list[Path]:  # what is measured is there even if the rest is not waited for
            with _writing_to(output):
                return write_result({"command": command, **found}, output)

        result = run(plan, document or sample_text(), name, report, _notify, keep)
    result = {"command": command, **result}
    paths = keep(result)
    if not as_json:
        from rich.console import Console

        console = Console()
        print_table(result, console if console.is_terminal else Console(width=120))
        print("Written:", *paths)
        if len(paths) == 1:
            print("There are no plots, for matplotlib is not installed.")
    print(json.dumps(result))


@app.command()
def info(
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    chunk_length: ChunkLength = None,
    local_length: LocalLength = None,
    prompt_length: PromptLength = None,
    chunks_per_batch: ChunksPerBatch = None,
    refresh_rows: RefreshRows = None,
    kv_dtype: KvDtype = None,
    kv_place: KvPlace = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-n", min=1, help="Lengths to estimate; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model, its candidate projections, and what lengths will cost in memory; loads no weights."""
    from focusllm.cost import GIB, estimate, find_place
    from focusllm.embedded import cache_folder
    from focusllm.info import describe

    lengths = tokens or [8192, 32768, 131072, 409600, 1048576]
    found, skeleton, config = describe(model, adapter, dtype, _settings(locals()), _notify)
    places = [find_place(skeleton, config, length, cache_folder()) for length in lengths]
    costs = [
        (length, place, estimate(skeleton, config, length, place=place or "device"))
        for length, place in zip(lengths, places, strict=True)
    ]
    if as_json:
        rows = [{"tokens": length, "place": place, **cost.to_dict()} for length, place, cost in costs]
        print(json.dumps({**found, "costs": rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table(show_header=False, box=None)
    for name, value in found.items():
        about.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    console.print(about)
    table = Table(title=f"Memory in GiB, one question; {costs[0][2].free / GIB:.1f} are free")
    for title in ("tokens", "chunks", "kept", "weights, libraries", "chunk KV", "rows", "scratch", "total"):
        table.add_column(title, justify="right", no_wrap=title == "kept")
    for length, place, cost in costs:
        parts = (cost.runtime + cost.weights, cost.chunks, cost.rows, cost.scratch, cost.total)
        num_chunks = count_chunks(length, config.chunk_length)
        table.add_row(
            f"{length:,}",
            f"{num_chunks:,}",
            place or "[red]too much[/red]",
            *(f"{part / GIB:.2f}" for part in parts),
        )
    console.print(table)


class _RunByDefault(typer.core.TyperGroup):
    """`focusllm eval TASK ...` is `focusllm eval run TASK ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluation = typer.Typer(cls=_RunByDefault, no_args_is_help=True, help="Measure methods on long-text tasks.")
app.add_typer(evaluation, name="eval")


@evaluation.command("run")
def evaluate(
    tasks: Annotated[list[str], typer.Argument(help="Tasks by name; `focusllm eval list` shows them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder; a stopped run goes on in it.")],
    methods: Annotated[
        list[str], typer.Option("--method", help="A method, or method:option=value,...; may be repeated.")
    ] = ["focus"],  # noqa: B006
    lengths: Annotated[str, typer.Option(help="Tokens, as in 4096,8192; of the whole prompt with its answer.")] = "",
    limit: Annotated[int, typer.Option(help="Most examples of a task at a length.")] = 100,
    model: Model = "smollm2-135m",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = None,
    chunk_length: ChunkLength = None,
    local_length: LocalLength = None,
    prompt_length: PromptLength = None,
    chunks_per_batch: ChunksPerBatch = None,
    decoding: Decoding = None,
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
    given = locals()
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
    config = {**_settings(given), **dict(map(parse_setting, settings or []))}
    llm = _load(model, adapter, dtype, device, config, quiet=as_json)
    with _calm_libraries(), _measuring(as_json) as report:
        from focusllm.evaluation.runner import evaluate as run_evaluation

        try:
            results = run_evaluation(plan, llm, output, report)
        except KeyboardInterrupt:
            _notify(f"Stopped. Run the same command again to go on with what is in {output}.")
            sys.exit(130)
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        _show_results([output])


@evaluation.command("list")
def list_evaluation(as_json: Json = False) -> None:
    """Show the tasks and methods."""
    from focusllm.evaluation.methods import NAMES
    from focusllm.evaluation.tasks import registry

    needs = {"": "made up", "text": "needs --text", "files": "needs --data or --hub"}
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
    from focusllm.evaluation.report import load, write_report

    paths = write_report(runs, output)
    if as_json:
        print(json.dumps({"files": [str(path) for path in paths], "rows": [vars(row) for row in load(runs)]}, indent=1))
        return
    _show_results(runs)
    print(f"The report is {paths[0]}, with {len(paths) - 1} plots beside it.")


# --- pieces -----------------------------------------------------------------------------------------------------------


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    names = ("chunk_length", "local_length", "prompt_length", "chunks_per_batch", "decoding", "kv_dtype", "kv_place")
    settings = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("refresh_rows") is not None:
        settings["refresh_rows"] = given["refresh_rows"] or None
    return settings


def _sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p}


def _notify(message: str) -> None:
    print(message, file=sys.stderr)


def _load(
    model: str, adapter: str | None, dtype: str, device: str | None, settings: dict[str, Any], quiet: bool
) -> FocusLLM:
    with _calm_libraries(), _status("Loading the model", quiet):
        from focusllm.llm import FocusLLM

        llm = FocusLLM.from_pretrained(model, adapter=adapter, dtype=dtype, device=device, notify=_notify, **settings)
    if not llm.has_trained_candidates:
        _notify(
            "Note: no trained candidate projections are loaded, so little of the text beyond the local context will "
            "reach the answer (--adapter loads some)."
        )
    return llm


@contextmanager
def _reading(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of (tokens done, tokens in all); there from the first call to the last token."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Reading {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet)
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
def _training_progress(
    steps: int, quiet: bool
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str, int], None], dict[str, Any]]]:
    """A live line: step, losses by objective, supervised tokens a second, time left. Evaluations stay above it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    last: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
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
def _measuring(quiet: bool) -> Iterator[Callable[[str, float, float], None]]:
    """A live line: what is measured, the share that is done, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, speed_estimate_period=600) as bar:
        task = bar.add_task("Preparing", total=None)
        yield lambda title, done, total: bar.update(task, description=title, completed=done, total=total)


def _show_results(folders: list[Path]) -> None:
    """A table a task: methods by lengths."""
    from rich.console import Console
    from rich.table import Table

    from focusllm.evaluation.report import load

    rows, console = load(folders), Console()
    for task in dict.fromkeys(row.task for row in rows):
        mine = {(row.method, row.length): row for row in rows if row.task == task}
        lengths = sorted({length for _, length in mine}, key=lambda length: length or 0)
        table = Table("method", title=f"{task}: {next(iter(mine.values())).metric}")
        for length in lengths:
            table.add_column(f"{length:,}" if length else "own lengths", justify="right")
        for method in dict.fromkeys(method for method, _ in mine):
            cells = [mine.get((method, length)) for length in lengths]
            table.add_row(method, *(cell.shown if cell else "" for cell in cells))
        console.print(table)
        for row in mine.values():
            if row.skipped:
                which = f"at {row.length:,} tokens" if row.length else f"{row.skipped} examples"
                console.print(f"{row.method}, {which}: left out, for {row.reason}.")


@contextmanager
def _bench_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A live line: turns done, what is under way, time since the start."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
    task = bar.add_task("", total=None)

    def report(what: str, done: int, total: int) -> None:
        bar.start()  # not before: bad input is one line
        bar.update(task, description=what, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """A folder that cannot be written is bad input."""
    try:
        yield
    except OSError as error:
        raise FocusError(f"{folder} cannot be written ({error.strerror or error}); choose another folder.") from error


def _typed_questions() -> Iterator[str]:
    """Questions from the terminal until an empty one or the end of input."""
    while True:
        try:
            print("\nQuestion (empty to leave): ", end="", file=sys.stderr, flush=True)
            text = input()
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _printer(quiet: bool) -> Callable[[str], None]:
    return (lambda _: None) if quiet else (lambda piece: print(piece, end="", flush=True))


def _show_origin(answer: Answer, count: int) -> None:
    if answer.citations and count:
        print("\nLooked for in:")
        for citation in answer.citations[:count]:
            start = " ".join(citation.text.split())[:90]
            place = f"{citation.document}, characters {citation.start:,}-{citation.end:,}"
            print(f"  {citation.weight:6.1%}  {place}: {start}...")
    _show_speed(answer)


def _show_speed(answer: Answer) -> None:
    print(
        f"\n{answer.num_generated_tokens} tokens; first after {answer.time_to_first_token:.2f} s, then "
        f"{answer.tokens_per_second:.1f} tokens/s; peak memory {answer.peak_memory / 2**30:.2f} GiB"
    )


def _verify_cases(folder: Path, quiet: bool) -> list[dict[str, Any]]:
    from focusllm.conformance import find_cases, run_case

    results = []
    for case in find_cases(folder):
        result = run_case(case)
        results.append(
            {"name": result.name, "passed": result.passed, "errors": result.errors, "failures": result.failures}
        )
        if not quiet:
            errors = ", ".join(f"{name} {error:.1e}" for name, error in result.errors.items())
            print(f"{'pass' if result.passed else 'FAIL'}  {result.name}: {errors}", *result.failures, sep="; ")
    return results


def _verify_model(model: str, dtype: str, device: str | None, quiet: bool) -> list[dict[str, Any]]:
    llm_model = _load_base(model, dtype, device, quiet)
    from focusllm.verify import verify as run_checks

    results = []
    for check in run_checks(llm_model):
        results.append({"name": check.name, "passed": check.passed, "error": check.error, "limit": check.limit})
        if not quiet:
            print(
                f"{'pass' if check.passed else 'FAIL'}  {check.name}: error {check.error:.1e}, limit {check.limit:.1e}"
            )
    return results


def _load_base(model: str, dtype: str, device: str | None, quiet: bool) -> Any:
    with _calm_libraries(), _status("Loading the model", quiet):
        from focusllm.embedded import resolve_model
        from focusllm.modeling import FocusForCausalLM, on_device, parse_dtype

        path = resolve_model(model, _notify)  # without a tokenizer, and whatever its positions allow
        return on_device(FocusForCausalLM.from_pretrained(path, dtype=parse_dtype(dtype)), device).base


@contextmanager
def _status(text: str, quiet: bool) -> Iterator[None]:
    if quiet:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def _calm_libraries() -> Iterator[None]:
    """Keep transformers' own loading bars and remarks off the terminal."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    main()
