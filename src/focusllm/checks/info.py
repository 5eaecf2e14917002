"""What a model is, without loading its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from focusllm.config import FocusConfig
from focusllm.decoding.opened import check_settings
from focusllm.huggingface.adapter_files import read_adapter_config
from focusllm.huggingface.embedded import ADAPTERS, resolve_model
from focusllm.huggingface.head_files import known_heads
from focusllm.huggingface.loading import (
    cannot_load,
    computing_dtype,
    find_saved,
    parse_device,
    parse_dtype,
    saved_folder,
)
from focusllm.memory.lookup import Heads
from focusllm.method.adapter import AdapterConfig, inject
from focusllm.method.base import layout


def describe(
    model: str | Path,
    adapter: str | Path | None,
    dtype: str,
    settings: dict[str, Any],
    notify: Callable[[str], None] = lambda _: None,
    device: str | None = None,
) -> tuple[dict[str, Any], nn.Module, FocusConfig, Heads | None]:
    """A model's facts, its skeleton on the meta device (shapes only), the settings that it would be used with, and the
    look-up heads that are known of it.

    Args:
        device: where it would compute; None: a GPU if there is one, else the CPU.

    Raises:
        ModelError, AdapterError, ConfigError: as loading the model would.
    """
    asked, place = parse_dtype(dtype), parse_device(device)
    path = resolve_model(model, notify)
    source, config = find_saved(model, path, adapter, None)
    config = config.replace(**settings).settled(source is not None)
    try:
        base_config = AutoConfig.from_pretrained(path)
    except Exception as error:  # as when loading the model
        raise cannot_load(model, error) from error
    own = getattr(base_config, "dtype", None) or torch.float32
    chosen = asked if isinstance(asked, torch.dtype) else computing_dtype(own, place)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(base_config, dtype=chosen)
    except Exception as error:
        raise cannot_load(model, error) from error
    found = layout(skeleton)
    check_settings(config, found.max_positions)
    adapter_config: AdapterConfig | None = None
    weights = sum(parameter.nbytes for parameter in skeleton.parameters())
    if source is not None:
        adapter_config = read_adapter_config(skeleton, source)
        inject(skeleton, adapter_config)
    facts: dict[str, Any] = {
        "model": str(model),
        "model_type": base_config.model_type,
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "dtype": str(chosen).removeprefix("torch."),
        "weights_bytes": weights,
        "layers": len(found.layers),
        "positions": found.max_positions,
        "kv_bytes_per_token": found.kv_bytes_per_token * chosen.itemsize,
        "adapter": _origin(source),
        "adapter_rank": "" if adapter_config is None else adapter_config.rank or "full copies",
        **{name: value for name, value in config.resolved().to_dict().items() if value is not None},
    }
    return facts, skeleton, config, known_heads(skeleton, str(model), saved_folder(path, None), notify)


def _origin(source: str | Path | None) -> str:
    if source is None:
        return "none (untrained)"
    return "in the package" if Path(source).parent == ADAPTERS else str(source)
