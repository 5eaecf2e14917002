"""Options that several commands take, and how one definition of them serves all."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="qwen2.5-coder-0.5b (the default), smollm2-135m, a folder, or a hub id."),
]
Adapter = Annotated[str | None, typer.Option(help="Candidate projections: folder, hub id, smollm2-135m (ours), none.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights", help="On a CPU, a second copy for speed: int8 (8 bits), packed (exact), plain (none), or auto."
    ),
]
Encoding = Annotated[str | None, typer.Option(help="Encoding of text files; by default found out.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it computes: arguments of `FocusLLM.from_pretrained` by name."""

    model: Model = None
    adapter: Adapter = None
    dtype: Dtype = "auto"
    device: Device = None
    weights: WeightsOption = "auto"


@dataclass(frozen=True)
class FocusOptions:
    """The settings of `FocusConfig` that are asked for most; what is not given keeps its default."""

    chunk_length: Annotated[
        int | None, typer.Option(help="Tokens of a chunk; the longer, the faster are second questions.")
    ] = None
    chunk_overlap: Annotated[
        int | None,
        typer.Option(help="Tokens that neighbouring chunks share; by default 64, or a quarter of a short one."),
    ] = None
    local_length: Annotated[int | None, typer.Option(help="Tokens of the local context.")] = None
    prompt_length: Annotated[int | None, typer.Option(help="Most tokens of the dynamic prompt.")] = None
    chunks_per_batch: Annotated[
        int | None, typer.Option(help="Most chunks read at once: bounds the scratch memory.")
    ] = None
    far_context: Annotated[
        str | None,
        typer.Option(help="How chunks are seen: condensed (the paper, needs training), opened (needs none), or auto."),
    ] = None
    open_tokens: Annotated[int | None, typer.Option(help="opened: most tokens of the text that are seen at once.")] = (
        None
    )
    decoding: Annotated[str | None, typer.Option(help="cached, or exact (the paper, slow).")] = None
    refresh_rows: Annotated[
        int | None, typer.Option(min=0, help="Chunks seen, and condensed anew for every token; 0: all.")
    ] = None
    kv_dtype: Annotated[str | None, typer.Option(help="How chunks are kept: same (as computed), int8 or int4.")] = None
    kv_place: Annotated[str | None, typer.Option(help="Where chunks are kept: auto, device, host or disk.")] = None

    def given(self) -> dict[str, Any]:
        """As arguments of `FocusConfig`."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.refresh_rows == 0:
            given["refresh_rows"] = None
        return given


def finite(value: float) -> float:
    """For options that take numbers: a range alone lets nan and inf through."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="0 takes the likeliest token each time.")
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, callback=finite, help="Sample from the likeliest tokens up to this share."),
    ] = 1.0
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Makes sampling repeatable.")] = None

    def arguments(self) -> dict[str, Any]:
        """As arguments of transformers' `generate()`; the seed is set."""
        if self.seed is not None:
            from transformers import set_seed

            set_seed(self.seed)
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens}
        chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **chosen}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of its dataclass parameters as options of its own, in their place."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    options = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            found = [(field.name, types[field.name], field.default) for field in fields(groups[name])]
        else:
            found = [(name, hints[name], parameter.default)]
        options += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=t) for n, t, d in found]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **values)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run
