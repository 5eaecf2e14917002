"""Candidate projections in files: an adapter's folder, or a repository of the hub.

Low-rank projections are stored in PEFT's LoRA layout, full copies under the base model's own names; both with
`adapter_config.json` (PEFT's), `focus_config.json` (what they belong to) and a model card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from focusllm.errors import AdapterError, first_line, shown
from focusllm.files import whole_file
from focusllm.json_text import parse_json
from focusllm.method.adapter import AdapterConfig, CandidateLinear, inject, injected
from focusllm.method.base import layout

WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
FOCUS_CONFIG_NAME = "focus_config.json"
PEFT_PREFIX = "base_model.model."


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The shape of a base model: an adapter fits a model with the same one."""
    layers, config = layout(model).layers, model.config
    return {
        "model_type": config.model_type,  # type: ignore[union-attr]
        "num_hidden_layers": len(layers),
        "hidden_size": config.hidden_size,  # type: ignore[union-attr]
        "num_attention_heads": layers[0].num_heads,
        "num_key_value_heads": layers[0].num_kv_heads,
        "head_dim": layers[0].key_dim,
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's candidate projections, under the names that they have in files."""
    return {
        _file_name(path, name, wrapper.is_low_rank): tensor.detach()
        for path, wrapper in injected(model).items()
        for name, tensor in wrapper.own_parameters().items()
    }


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    config: AdapterConfig,
    base_name: str = "",
    notes: str = "",
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the candidate projections of a model; files are replaced one by one, each whole or not at all.

    A model card that is there stays as it is.

    Args:
        notes: Markdown for the end of the model card.
        tensors: to be written instead of the model's own `adapter_tensors` (other weights, or gathered ones).

    Raises:
        AdapterError: the model has none.
    """
    wrappers = injected(model)
    if not wrappers:
        raise AdapterError("the model has no candidate projections to save; inject an adapter first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors(model) if tensors is None else tensors
    with whole_file(folder / WEIGHTS_NAME) as temporary:
        written = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(written, temporary, metadata={"format": "pt"})
    targets = sorted({path.rpartition(".")[2] for path in wrappers})
    peft_config: dict[str, Any] = {"base_model_name_or_path": base_name, "task_type": "CAUSAL_LM"}
    if config.rank is not None:
        peft_config |= {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha if config.alpha is not None else config.rank,
            "target_modules": targets,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
    else:
        peft_config |= {"candidate_projections": "full", "target_modules": targets}
    focus_config = {"format": 1, "adapter": asdict(config), "base": fingerprint(model)}
    for name, content in ((PEFT_CONFIG_NAME, peft_config), (FOCUS_CONFIG_NAME, focus_config)):
        with whole_file(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    if not (folder / "README.md").exists():
        with whole_file(folder / "README.md") as temporary:
            card = _model_card(config, shown(base_name), sum(t.numel() for t in tensors.values()), notes)
            temporary.write_text(card, encoding="utf-8")


def load_adapter(model: nn.Module, source: str | Path, dtype: torch.dtype | None = None) -> AdapterConfig:
    """Inject candidate projections from a folder or a hub repository; nothing is changed if they do not fit.

    A folder that PEFT wrote (LoRA on any of q, k, v, o) loads as well. dtype: as `inject` takes it.

    Raises:
        AdapterError: no such folder, damaged files, or another model's projections.
    """
    folder = _find(source)
    config = _config_for(model, folder, source)
    tensors = load_tensors(folder)
    expected = _expected_shapes(model, config)
    problems = [
        f"{name} is {tuple(tensors[name].shape) if name in tensors else 'missing'} instead of {shape}"
        for name, shape in expected.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ] + [f"{name} has no place in the model" for name in sorted(set(tensors) - set(expected))]
    if problems:
        raise AdapterError(
            f"the adapter {source} does not fit the model: {problems[0]}"
            f"{f' (and {len(problems) - 1} more)' if problems[1:] else ''}; use an adapter for this model."
        )
    with torch.no_grad():
        for path, wrapper in inject(model, config, dtype).items():
            for name, parameter in wrapper.own_parameters().items():
                parameter.copy_(tensors[_file_name(path, name, wrapper.is_low_rank)])
    return config


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in an adapter's folder, as `adapter_tensors` names them.

    Raises:
        AdapterError: there are none, or they are damaged.
    """
    try:
        return load((folder / WEIGHTS_NAME).read_bytes())  # by its bytes, for not every name is one to safetensors
    except FileNotFoundError as error:
        raise AdapterError(f"the adapter {folder} has no {WEIGHTS_NAME}; save or download it again.") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS_NAME} is damaged ({error}); save or download it again.") from error


def read_adapter_config(model: nn.Module, source: str | Path) -> AdapterConfig:
    """The settings of candidate projections in a folder or a hub repository, without their weights.

    Args:
        model: the one that they are for; it may be on the meta device.

    Raises:
        AdapterError: no such folder, damaged settings, or another model's.
    """
    return _config_for(model, _find(source), source)


def push_adapter(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload an adapter folder to the hub and return its address (needs a hub token, see `hf auth login`)."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def _file_name(path: str, name: str, low_rank: bool) -> str:
    """What the file calls a weight of the projection at a path: PEFT's name, or for a full copy the base's."""
    return f"{PEFT_PREFIX}{path}.{name}.weight" if low_rank else f"{path}.{name}"


def _expected_shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an adapter with this config has for this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layout(model).layers:
        for letters, name in layer.projections.items():
            if set(letters) & set(config.projections):
                module = getattr(layer.module, name)
                base: nn.Linear = module.base if isinstance(module, CandidateLinear) else module
                path = f"{layer.path}.{name}"
                if config.rank is not None:
                    shapes[_file_name(path, "lora_A", True)] = (config.rank, base.in_features)
                    shapes[_file_name(path, "lora_B", True)] = (base.out_features, config.rank)
                else:
                    shapes[_file_name(path, "weight", False)] = (base.out_features, base.in_features)
                    if base.bias is not None:
                        shapes[_file_name(path, "bias", False)] = (base.out_features,)
    return shapes


def may_be_on_hub(source: str | Path) -> bool:
    """Whether this is no folder, and can be a hub repository by its name (owner/name)."""
    is_path = os.path.isdir(source) or os.path.isabs(source) or str(source).startswith((".", "~"))
    return not is_path and str(source).count("/") == 1


def _find(source: str | Path) -> Path:
    """A folder as it is, anything else as a hub repository."""
    if os.path.isdir(source):
        return Path(source)
    if not may_be_on_hub(source):
        raise AdapterError(f"there is no adapter folder {source}; give a folder or a hub repository (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except Exception as error:  # whatever the hub, its client, a proxy or the disk objects to
        raise AdapterError(
            f"the adapter {source} is neither a folder nor can it be fetched from the hub ({first_line(error)})."
        ) from error


def _config_for(model: nn.Module, folder: Path, source: str | Path) -> AdapterConfig:
    """The settings in a folder; refused if they belong to a model of another shape or vocabulary."""
    config, base = _read_config(folder)
    own, size = fingerprint(model), model.config.vocab_size  # type: ignore[union-attr]
    odd = [f"{name} {base[name]} instead of {own[name]}" for name in own if name in base and base[name] != own[name]]
    if config.sink_token is not None and config.sink_token >= size:  # type: ignore[operator]
        odd.append(f"token {config.sink_token} of {size}")
    if odd:
        raise AdapterError(f"the adapter {source} belongs to another model ({', '.join(odd)}); use one for this model.")
    return config


def _read_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """An adapter's own settings and the base model's shape, from our file or from PEFT's."""
    try:
        if (folder / FOCUS_CONFIG_NAME).exists():
            content = parse_json((folder / FOCUS_CONFIG_NAME).read_bytes())
            return AdapterConfig(**content["adapter"]), dict(content["base"])
        content = parse_json((folder / PEFT_CONFIG_NAME).read_bytes())
        letters = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "dense": "o", "qkv_proj": "qkv"}
        if content.get("peft_type") != "LORA" or set(content["target_modules"]) - set(letters):
            raise AdapterError(
                f"{folder / PEFT_CONFIG_NAME} is not LoRA on attention projections; train one with q, k, v, o."
            )
        for name in ("use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern"):
            if content.get(name):
                raise AdapterError(f"{folder / PEFT_CONFIG_NAME} uses {name}, which is not supported; use plain LoRA.")
        projections = "".join(sorted(letters[name] for name in content["target_modules"]))
        rank, alpha = content["r"], content["lora_alpha"]
        alpha = alpha * rank**0.5 if content.get("use_rslora") else alpha  # scaled by alpha / sqrt(rank)
        return AdapterConfig(projections=projections, rank=rank, alpha=alpha), {}
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder} is not an adapter: it has neither {FOCUS_CONFIG_NAME} nor {PEFT_CONFIG_NAME}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"the settings of the adapter in {folder} are damaged ({error!r}).") from error


def _model_card(config: AdapterConfig, base_name: str, num_parameters: int, notes: str) -> str:
    kind = "full copies" if config.rank is None else f"low rank ({config.rank}, alpha {config.alpha or config.rank})"
    letters = ", ".join(config.projections)
    trained = "\n".join(f"| {name} | {value} |" for name, value in config.trained.items())
    front = "---\nlibrary_name: focusllm\ntags:\n- focusllm\n- long-context\n"
    if base_name:
        front += f"base_model: {base_name}\n"
    load = f'llm = FocusLLM.from_pretrained("{base_name}", adapter="this folder")'
    return (
        f"{front}---\n\n# FocusLLM candidate projections\n\n"
        f"Trainable {letters} projections for the candidate tokens of FocusLLM (arXiv 2408.11745), {kind}, "
        f"{num_parameters:,} parameters, for the base model {base_name or '(not named)'}.\n\n"
        f"```python\nfrom focusllm import FocusLLM\n\n{load}\n```\n"
        + (f"\n| trained with | |\n|---|---|\n{trained}\n" if trained else "")
        + "\nApplied as an ordinary LoRA it changes every token, which is not what it was trained for.\n"
        + notes
    )
