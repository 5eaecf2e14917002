"""Which causal language models of the installed transformers the method works with, and why not with the others.

    python benchmarks/models_table.py            # rewrites the table in docs/models.md
    python benchmarks/models_table.py gemma2 gpt_oss

Each model type is built tiny, without weights (on the meta device), and asked what the method needs of it.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from focusllm.errors import FocusError, first_line
from focusllm.method.base import Layout, layout

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
START, END = "<!-- table: benchmarks/models_table.py -->", "<!-- end of table -->"

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 8192,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
"""Sizes under the names that most families have; a family takes those that it knows."""
WITH_WINDOWS: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
}
"""What checkpoints of a family may have besides, where the family knows windows."""


def main(names: Sequence[str]) -> None:
    """The table of the types that are named, or of all into the document."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    table = render([row(name) for name in names or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))])
    if names:
        print(table)
        return
    before, _, rest = DOCUMENT.read_text().partition(START)
    DOCUMENT.write_text(f"{before}{START}\n{table}{END}{rest.partition(END)[2]}")


def render(rows: Sequence[tuple[str, str, str]]) -> str:
    """A Markdown table: the supported first."""
    count = sum(state == "supported" for _, state, _ in rows)
    lines = [
        f"transformers {transformers.__version__}: {count} of {len(rows)} types of causal language models.",
        *("", "| model type | | |", "|---|---|---|"),
    ]
    for name, state, what in sorted(rows, key=lambda row: ["supported", "refused", "not known"].index(row[1])):
        lines.append(f"| {name} | {state} | {what} |")
    return "\n".join(lines) + "\n"


def row(name: str) -> tuple[str, str, str]:
    """A model type; supported, refused or not known; and what it has or why."""
    try:
        found = described(name)
    except FocusError as error:
        reason = first_line(error).partition(" are not supported: ")[2].partition(". Supported are ")[0]
        return name, "refused", reason or first_line(error)
    except Exception as error:  # what a type wants that is not known here
        return name, "not known", f"could not be built without settings of its own ({type(error).__name__})"
    return name, "supported", found


def described(name: str) -> str:
    """What of a supported type is out of the ordinary, in its default settings and where it has windows."""
    model = skeleton(name)
    has = special(model, layout(model))
    try:
        windowed = skeleton(name, **WITH_WINDOWS)
        if (found := layout(windowed)).window is not None and layout(model).window is None:
            has = [*has, f"sliding windows ({number_of_windows(found)})"]
    except Exception:
        pass
    return "; ".join(has)


def special(model: torch.nn.Module, found: Layout) -> list[str]:
    """What a model has besides full attention and rotary positions of one kind in every layer."""
    has = []
    if found.window is not None:
        has.append(f"sliding windows ({number_of_windows(found)})")
    if len(found.rotaries) > 1:
        has.append(f"{len(found.rotaries)} sets of rotary frequencies")
    if any(layer.rotary is None for layer in found.layers):
        has.append("layers without positions")
    if any(getattr(layer.module, "sinks", None) is not None for layer in found.layers):
        has.append("learned sinks")
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        has.append("capped scores")
    if found.interleaved:
        has.append("interleaved rotary")
    return has


def number_of_windows(found: Layout) -> str:
    """In all layers, or in some."""
    return "in all layers" if all(layer.window is not None for layer in found.layers) else "in some layers"


def skeleton(name: str, **changes: Any) -> torch.nn.Module:
    """A model of a type without weights: tiny where the type takes such sizes, else as it is by default."""
    config_class = CONFIG_MAPPING[name]
    known = set(inspect.signature(config_class.__init__).parameters)
    wanted = {key: value for key, value in {**TINY, **changes}.items() if key in known}
    if changes and not set(changes) & set(wanted):
        raise ValueError(f"{name} has no windows")
    failures = []
    for settings in (wanted, {k: v for k, v in wanted.items() if k in ("num_hidden_layers", *changes)}, {}):
        try:
            config = config_class(**settings)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        except Exception as error:
            failures.append(error)
            if changes:
                break
    raise failures[0]


if __name__ == "__main__":
    main(sys.argv[1:])
