"""What is settled when a model is loaded: type, device, and which settings and candidate projections belong to it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from focusllm.config import FocusConfig
from focusllm.errors import ConfigError, ModelError, first_line
from focusllm.huggingface.adapter_files import may_be_on_hub
from focusllm.huggingface.embedded import boxed_adapter
from focusllm.json_text import parse_json

Model = TypeVar("Model", bound=nn.Module)
UNTRAINED = "none"
ADAPTER_FOLDER = "candidate_projections"
SETTINGS_NAME = "focus_settings.json"
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

    That is so on x86 CPUs without instructions for them (bfloat16: AVX512-BF16 or AMX, float16: AVX512-FP16).
    """
    if device.type != "cpu" or own.itemsize != 2 or platform.machine().lower() not in ("x86_64", "amd64"):
        return own
    if own == torch.float16:
        return own if torch.ops.mkldnn._is_mkldnn_fp16_supported() else torch.float32
    return own if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32


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
    """A device by its name; None: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such kind of device.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(chosen)
    except RuntimeError as error:
        raise _no_device(chosen, error) from error


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
    folder = _saved_folder(path, revision) if looks else Path(path)
    asked = adapter and (boxed_adapter(adapter) or adapter)
    found = None if adapter == UNTRAINED else asked or saved_adapter(folder) or boxed_adapter(name)
    return found, config or saved_settings(folder) or FocusConfig()


def _saved_folder(model: str | Path, revision: str | None) -> Path:
    """Where settings and candidate projections may lie: the model's folder, or what a hub repository has of them."""
    if not may_be_on_hub(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), revision=revision, allow_patterns=[SETTINGS_NAME, f"{ADAPTER_FOLDER}/*"])
        )
    except Exception:  # no such repository, no hub: loading the model will say so
        return Path(model)


def saved_settings(folder: str | Path) -> FocusConfig | None:
    """The lengths and options that were saved with a model, if any.

    Raises:
        ModelError: the file is damaged.
    """
    path = Path(folder) / SETTINGS_NAME
    if not path.exists():
        return None
    try:
        return FocusConfig().replace(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); save the model again.") from error


def saved_adapter(folder: str | Path) -> Path | None:
    """The candidate projections that were saved with a model, if any."""
    path = Path(folder) / ADAPTER_FOLDER
    return path if path.is_dir() else None
