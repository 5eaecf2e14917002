"""`focusllm info` and `focusllm verify`: what a model costs, and whether the method is right on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from focusllm.cli.options import Adapter, Device, Dtype, FocusOptions, Json, Model, WeightsOption, grouped
from focusllm.cli.terminal import calm_libraries, console, notify, status, visible
from focusllm.config import KvPlace, parse_weights
from focusllm.errors import ConfigError, FocusError
from focusllm.machine import readable_bytes
from focusllm.memory.chunking import count_chunks


@grouped
def info(
    *,
    model: Model = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    weights: WeightsOption = "auto",
    focus: FocusOptions,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-n", min=1, help="Lengths to estimate; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model, its candidate projections, and what lengths will cost in memory; loads no weights."""
    from focusllm.checks.info import describe
    from focusllm.huggingface.embedded import cache_folder, default_model
    from focusllm.memory.cost import estimate, find_place
    from focusllm.method.base import layout

    kept = parse_weights(weights)
    lengths = tokens or [8192, 32768, 131072, 409600, 1048576]
    found, skeleton, config, heads = describe(model or default_model(notify), adapter, dtype, focus.given(), notify)
    costs = []
    for length in lengths:
        place = find_place(skeleton, config, length, cache_folder(), weights=kept, heads=heads)
        cost = estimate(skeleton, config, length, place=place or "device", weights=kept, heads=heads)
        try:
            if not config.is_opened:
                config.check_num_chunks(count_chunks(length, config), layout(skeleton).max_positions)
        except ConfigError:
            place = place and "too many chunks"
        costs.append((length, place, cost))
    if as_json:
        rows = [{"tokens": length, "place": place, **cost.to_dict()} for length, place, cost in costs]
        print(json.dumps({**found, "costs": rows}, indent=2))
        return
    from rich.table import Table
    from rich.text import Text

    out = console()
    about = Table(show_header=False, box=None)
    for name, value in found.items():
        about.add_row(
            name.replace("_", " "),
            visible(str(value)) if isinstance(value, bool) or not isinstance(value, int) else f"{value:,}",
        )
    out.print(about)
    table = Table(title=f"Memory of one question; {readable_bytes(costs[0][2].free)} are free")
    for title in ("tokens", "chunks", "kept", "weights, libraries", "chunk KV", "rows", "scratch", "total"):
        table.add_column(title, justify="right", no_wrap=title == "kept")
    for length, place, cost in costs:
        parts = (cost.runtime + cost.weights, cost.chunks, cost.rows, cost.scratch, cost.total)
        num_chunks = count_chunks(length, config)
        table.add_row(
            f"{length:,}",
            f"{num_chunks:,}",
            place if place in get_args(KvPlace) else Text(place or "too much", "red"),
            *map(readable_bytes, parts),
        )
    out.print(table)


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
        raise FocusError("there is nothing to verify; name a model, or a folder with --cases.")
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


def _verify_cases(folder: Path, quiet: bool) -> list[dict[str, Any]]:
    from focusllm.checks.conformance import find_cases, run_case

    results = []
    for case in find_cases(folder):
        result = run_case(case)
        results.append(
            {"name": result.name, "passed": result.passed, "errors": result.errors, "failures": result.failures}
        )
        if not quiet:
            errors = ", ".join(f"{name} {error:.1e}" for name, error in result.errors.items())
            said = "; ".join([f"{'pass' if result.passed else 'FAIL'}  {result.name}: {errors}", *result.failures])
            print(visible(said))
    return results


def _verify_model(model: str, dtype: str, device: str | None, quiet: bool) -> list[dict[str, Any]]:
    base = _load_base(model, dtype, device, quiet)
    from focusllm.checks.verify import verify as run_checks

    results = []
    for check in run_checks(base):
        results.append({"name": check.name, "passed": check.passed, "error": check.error, "limit": check.limit})
        if not quiet:
            print(
                f"{'pass' if check.passed else 'FAIL'}  {check.name}: error {check.error:.1e}, limit {check.limit:.1e}"
            )
    return results


def _load_base(model: str, dtype: str, device: str | None, quiet: bool) -> Any:
    with calm_libraries(), status("Loading the model", quiet):
        from focusllm.huggingface.embedded import resolve_model
        from focusllm.huggingface.loading import on_device, parse_device, parse_dtype
        from focusllm.huggingface.modeling import FocusForCausalLM

        chosen, place = parse_dtype(dtype), parse_device(device)
        path = resolve_model(model, notify)  # without a tokenizer, and whatever its positions allow
        return on_device(FocusForCausalLM.from_pretrained(path, dtype=chosen), place).base
