"""The seams at which a stock Hugging Face model is used; the only file that knows how such a model is built.

`layout(model)` finds what the method needs (attention layers, projections, rotary frequencies) or refuses the model
by name. `run(...)` is one forward pass of the unchanged model in which the caller decides what tokens attend to, and
which of them are candidates. Both travel in a `_Pass` that exists for that pass only: the model holds no state, and
outside `run` it behaves as if this package did not exist.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

from focusllm.errors import ModelError
from focusllm.method.differentiable import without_cudnn

ATTENTION_NAME = "focusllm"
# What transformers calls the cache, in arguments and in outputs: `cache` since 5.24, which warns of the name before it.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
PROJECTION_NAMES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("qkv_proj",),
    "o": ("o_proj", "dense", "out_proj"),
}


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of the base model: its module, and where its projections are."""

    path: str
    module: nn.Module
    projections: dict[str, str]
    """Letters ("q", "k", "v", "o", or "qkv" for a fused one) to attribute names of `module`."""
    rotary: bool
    """Whether this layer rotates its keys (SmolLM3 has layers that do not)."""


@dataclass(frozen=True)
class Layout:
    """What the method needs to know about a base model."""

    layers: list[AttentionLayer]
    rotary: nn.Module
    interleaved: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int

    @property
    def inv_freq(self) -> Tensor:
        """Rotary frequencies [rotary_dim / 2]; asked for each time, for moving the model replaces the tensor."""
        frequencies: Tensor = self.rotary.inv_freq  # type: ignore[assignment]
        return frequencies

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, as numbers (multiply by the size of the type)."""
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim


LayerAttention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer index, query [B, H, T, D], key and value [B, K, T, D], scale) -> [B, H, T, D]: what a pass attends to."""


@dataclass(frozen=True)
class _Pass:
    attention: LayerAttention
    candidates: slice


_pass: ContextVar[_Pass | None] = ContextVar("focusllm_pass", default=None)
_one_pass_at_a_time = threading.RLock()
_layouts: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


class PassEnded(Exception):
    """Raised by a `LayerAttention` that needs nothing more of a pass without logits."""


NO_TOKENS = slice(0, 0)


def candidate_tokens() -> slice:
    """Which tokens of the pass under way are candidates, along the sequence; none outside a pass."""
    current = _pass.get()
    return current.candidates if current is not None else NO_TOKENS


def in_pass() -> bool:
    """Whether a pass is under way in this thread."""
    return _pass.get() is not None


def run(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    attention: LayerAttention,
    *,
    candidates: slice = NO_TOKENS,
    logits_to_keep: int | Tensor | None = None,
) -> Tensor | None:
    """One forward pass of the base model.

    Args:
        model: a causal language model of transformers, with or without candidate projections.
        input_ids: [B, T]. position_ids: [B, T], or [1, T] for all rows.
        attention: called in every layer instead of the model's own attention function. Without logits it may end the
            pass by raising `PassEnded`.
        candidates: the tokens of each row that are projected by the candidate projections.
        logits_to_keep: logits of so many last tokens (0: all), or of the tokens at these indices; None: none, and
            the head is not run.

    Returns:
        Logits [B, n, V], if asked for.
    """
    arguments: dict[str, Any] = {
        "input_ids": input_ids,
        "position_ids": position_ids.expand(input_ids.shape[0], -1),
        "use_cache": False,
    }
    with _entered(model, _Pass(attention, candidates)):
        if isinstance(logits_to_keep, int) and logits_to_keep:
            length = input_ids.shape[1]  # by index, for in 2-byte types a CPU multiplies a slice ten times slower
            logits_to_keep = torch.arange(length - min(logits_to_keep, length), length, device=input_ids.device)
        if logits_to_keep is None:
            with suppress(PassEnded):
                model.get_decoder()(**arguments)  # type: ignore[operator]
            return None
        logits: Tensor = model(**arguments, logits_to_keep=logits_to_keep).logits
        return logits


def run_plain(model: nn.Module, input_ids: Tensor, cache: Any, logits_to_keep: int) -> Tensor:
    """The base model alone, with its own attention and its own cache: logits [B, n, V].

    While a pass is under way the model's attention is ours, so this waits for it as other passes do. Code that calls
    the model itself must not do so while another thread reads or answers.
    """
    with _one_pass_at_a_time, without_cudnn():
        given = {"input_ids": input_ids, CACHE_NAME: cache, "use_cache": True, "logits_to_keep": logits_to_keep}
        logits: Tensor = model(**given).logits
    return logits


@contextmanager
def _entered(model: nn.Module, this: _Pass) -> Iterator[None]:
    """Route the model's attention to ours for one pass. Passes of several threads take turns."""
    config: Any = model.config
    with _one_pass_at_a_time:
        before, token = config._attn_implementation, _pass.set(this)
        config._attn_implementation = ATTENTION_NAME
        try:
            yield
        finally:
            config._attn_implementation = before
            _pass.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls inside a pass (its AttentionInterface).

    No mask function is registered under this name, so transformers builds none: the masks are ours.
    """
    this = _pass.get()
    if this is None:
        raise RuntimeError("attention 'focusllm' is for passes of focusllm only; call focusllm.method.base.run.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return this.attention(module.layer_idx, query, key, value, scale).transpose(1, 2), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, _attention)


def layout(model: nn.Module) -> Layout:
    """Find the seams of a model, once.

    Raises:
        ModelError: naming the model type and the reason why the method cannot work with it.
    """
    found = _layouts.get(model)
    if found is None:
        found = _layouts[model] = _inspect(model)
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that the model calls one after another, each with an attention layer in it."""
    return [model.get_submodule(layer.path.rpartition(".")[0]) for layer in layout(model).layers]


def _inspect(model: nn.Module) -> Layout:
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)

    def refuse(reason: str) -> ModelError:
        return ModelError(
            f"{kind} models are not supported: {reason}. Supported are decoders with rotary positions and full "
            f"attention in every layer (Llama, Mistral without a sliding window, Qwen2, Qwen3, Gemma, OLMo2, Phi-3, "
            f"SmolLM3, Granite, StableLM, ...)."
        )

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder")
    if not hasattr(model, "get_decoder") or not getattr(model, "can_generate", lambda: False)():
        raise refuse("it is not a causal language model")
    if getattr(config, "text_config", None) is not None:
        raise refuse("it is a multimodal model; load its text model alone")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if odd:
        raise refuse(f"it has layers of type {', '.join(odd)}")
    window = getattr(config, "sliding_window", None)
    is_limit = window is not None and window < _max_positions(config)
    if is_limit and getattr(config, "use_sliding_window", True):
        raise refuse(f"its attention is limited to a sliding window of {window} tokens (sliding_window)")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise refuse("its attention scores are soft-capped (attn_logit_softcapping)")

    rotary: Any = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if len(rotary) != 1:
        raise refuse(
            "it has no rotary positions (absolute, ALiBi or learned ones cannot be moved)"
            if not rotary
            else f"it has {len(rotary)} sets of rotary frequencies"
        )
    layers = []
    for path, module in model.named_modules():
        names = {
            letter: name
            for letter, choices in PROJECTION_NAMES.items()
            for name in choices
            if isinstance(getattr(module, name, None), nn.Module)
        }
        if hasattr(module, "layer_idx") and "o" in names and ({"q", "k", "v"} <= set(names) or "qkv" in names):
            layers.append(AttentionLayer(path, module, names, bool(getattr(module, "use_rope", True))))
    layers.sort(key=lambda layer: int(layer.module.layer_idx))  # type: ignore[arg-type]
    if len(layers) != getattr(config, "num_hidden_layers", None):
        raise refuse(
            f"{len(layers)} of its {getattr(config, 'num_hidden_layers', '?')} layers have q, k, v and o projections "
            f"under known names"
        )
    if any(hasattr(layer.module, "sinks") for layer in layers):
        raise refuse("its attention has learned sinks")
    return Layout(
        layers=layers,
        rotary=rotary[0],
        interleaved=_is_interleaved(layers[0].module, refuse),
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_positions=_max_positions(config),
    )


def _is_interleaved(attention: nn.Module, refuse: Any) -> bool:
    """Which dimensions a model's own `rotate_half` pairs, found by trying it on four numbers."""
    rotate_half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    turned = rotate_half(torch.arange(4.0)).tolist() if rotate_half is not None else None
    if turned == [-2.0, -3.0, 0.0, 1.0]:
        return False
    if turned == [-1.0, 0.0, -3.0, 2.0]:
        return True
    raise refuse("its rotary embedding pairs dimensions in an unknown way")


def _max_positions(config: Any) -> int:
    """Positions up to which the rotary frequencies stay as they are (some scalings change them with the length)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if parameters.get("rope_type") in ("dynamic", "longrope") and original:
        return int(original)
    return int(config.max_position_embeddings)
