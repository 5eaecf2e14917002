"""A model with its tokenizer, from a folder or the hub and into a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from focusllm.config import FocusConfig, parse_weights
from focusllm.decoding.opened import check_settings
from focusllm.errors import ModelError, first_line
from focusllm.huggingface.embedded import resolve_model
from focusllm.huggingface.head_files import known_heads
from focusllm.huggingface.loading import (
    UNTRAINED,
    computing_dtype,
    find_saved,
    in_type,
    on_device,
    parse_device,
    parse_dtype,
    saved_folder,
)
from focusllm.huggingface.modeling import FocusForCausalLM
from focusllm.method.base import layout
from focusllm.method.packed import chosen, pack


def load(
    model: str | Path,
    adapter: str | Path | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    config: FocusConfig | None,
    weights: str,
    notify: Callable[[str], None],
    settings: dict[str, Any],
) -> tuple[FocusForCausalLM, Any]:
    """Model and tokenizer, ready to compute; for the arguments see `FocusLLM.from_pretrained`."""
    dtype, device = parse_dtype(dtype), parse_device(device)  # refused before anything is fetched
    asked = parse_weights(weights)
    path = resolve_model(model, notify)
    folder = saved_folder(path, None)
    found, config = find_saved(model, folder, adapter, config)
    config = config.replace(**settings)
    loaded = FocusForCausalLM.from_pretrained(path, focus_config=config, adapter=found or UNTRAINED, dtype=dtype)
    loaded.found_heads = known_heads(loaded.base, str(model), folder, notify)
    check_settings(loaded.settings, layout(loaded.base).max_positions)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged or newer tokenizer.json raises a bare one
        raise ModelError(f"the tokenizer of {model} cannot be loaded: {first_line(error)}") from error
    loaded = on_device(loaded, device)
    if dtype == "auto" and not getattr(loaded.base, "is_quantized", False):
        loaded = in_type(loaded, computing_dtype(loaded.dtype, loaded.device))
    pack(loaded, chosen(loaded, asked, notify))
    return loaded, tokenizer


def save(model: FocusForCausalLM, tokenizer: Any, folder: str | Path) -> None:
    """Write base model, candidate projections, settings and tokenizer into a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
