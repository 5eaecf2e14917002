"""What is settled when a model is loaded: type, device, and which settings and candidate projections belong to it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from focusllm.config import FocusConfig
from focusllm.errors import ConfigError, ModelError, first_line
from focusllm.huggingface.adapter_files import may_be_on_hub
from focusllm.huggingface.embedded import boxed_adapter
from focusllm.huggingface.head_files import HEADS_NAME
from focusllm.json_text import parse_json

Model = TypeVar("Model", bound=nn.Module)
UNTRAINED = "none"
ADAPTER_FOLDER = "candidate_projections"
GENERATE_NAME = "custom_generate/generate.py"  # where transformers looks for it
SETTINGS_NAME = "focus_settings.json"
INSTRUCTIONS = {  # as torch.cpu.get_capabilities() calls them: of x86, then of ARM
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""What computes in a 16-bit type; one of them is enough."""
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def cannot_load(model: str | Path, error: Exception) -> ModelError:
    """The error of a model that transformers cannot load, with the first line of the reason."""
    return ModelError(f"the model {model} cannot be loaded: {first_line(error)}")


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """`auto` (left to `computing_dtype`), or a type by its name.

    Raises:
        ConfigError: anything else.
    """
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}.")
    chosen: torch.dtype = DTYPES[dtype]
    return chosen


def computing_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that `auto` stands for: a checkpoint's own, but float32 where 16-bit types are several times slower.

    That is so on CPUs without instructions for them, whatever their architecture, and is taken to be so on those of
    which it is not known.
    """
    if device.type != "cpu" or own not in INSTRUCTIONS:
        return own
    able = torch.cpu.get_capabilities()
    return own if any(able.get(name, False) for name in INSTRUCTIONS[own]) else torch.float32


def in_type(model: Model, dtype: torch.dtype) -> Model:
    """A model with its parameters in a type; buffers stay, for in 16 bits the angles of positions would be others."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def on_device(model: Model, device: str | torch.device | None) -> Model:
    """Move a model; None: to a GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such device, or no room on it.
    """
    chosen = parse_device(device)
    try:
        return model.to(chosen)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise _no_device(chosen, error) from error


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device by its name, on which something was computed; None: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such device, or one that computes nothing (meta).
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():  # of torch, about names of devices that are going to be dropped
            warnings.simplefilter("ignore")
            found = torch.device(device)
            torch.ones(1, device=found).add(1).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        raise _no_device(device, error) from error
    return found


def _no_device(device: str | torch.device, error: Exception) -> ConfigError:
    return ConfigError(f"device is {str(device)!r}, which cannot be used ({first_line(error)}); try cpu or cuda.")


def find_saved(
    name: str | Path,
    path: str | Path,
    adapter: str | Path | None,
    config: FocusConfig | None,
    revision: str | None = None,
) -> tuple[str | Path | None, FocusConfig]:
    """Candidate projections (None: untrained ones) and settings that a model is loaded with.

    Args:
        name: the model, as it was asked for. path: where it lies, a folder or a hub repository of this revision.
        adapter: as it was asked for: a folder or hub repository, the name of a model that this package has some for,
            "none", or None for what there is.
        config: as it was asked for; None: what was saved with the model, else the defaults.

    Raises:
        ModelError: the saved settings are damaged.
    """
    looks = adapter is None or config is None
    folder = saved_folder(path, revision) if looks else Path(path)
    asked = adapter and (boxed_adapter(adapter) or adapter)
    found = None if adapter == UNTRAINED else asked or saved_adapter(folder) or boxed_adapter(name)
    return found, config or saved_settings(folder) or FocusConfig()


def saved_folder(model: str | Path, revision: str | None) -> Path:
    """Where settings and candidate projections may lie: the model's folder, or what a hub repository has of them."""
    if not may_be_on_hub(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model), revision=revision, allow_patterns=[SETTINGS_NAME, HEADS_NAME, f"{ADAPTER_FOLDER}/*"]
            )
        )
    except Exception:  # no such repository, no hub: loading the model will say so
        return Path(model)


def saved_settings(folder: str | Path) -> FocusConfig | None:
    """The lengths and options that were saved with a model, if any.

    Raises:
        ModelError: the file is damaged.
    """
    path = Path(folder) / SETTINGS_NAME
    if not os.path.exists(path):
        return None
    try:
        return FocusConfig().replace(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); save the model again.") from error


def saved_adapter(folder: str | Path) -> Path | None:
    """The candidate projections that were saved with a model, if any."""
    path = Path(folder) / ADAPTER_FOLDER
    return path if os.path.isdir(path) else None
