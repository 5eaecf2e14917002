"""The seams at which a stock Hugging Face model is used; the only file that knows how such a model is built.

`layout(model)` finds what the method needs (attention layers, projections, rotary frequencies, windows) or refuses the
model by name. It asks the model rather than its settings: the model calls its layers for one token, and each layer's
attention, and what they are called with is noted. `run(...)` is one forward pass of the unchanged model in which the
caller decides what tokens attend to, and which of them are candidates. Both travel in a `Pass` that exists for that
pass only: the model holds no state, and outside `run` it behaves as if this package did not exist.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from focusllm.errors import ModelError, first_line
from focusllm.method.differentiable import without_cudnn
from focusllm.method.passes import NO_TOKENS, LayerAttention, Pass, PassEnded, entered, one_pass_at_a_time
from focusllm.method.scoring import Scoring

# What transformers calls the cache, in arguments and in outputs: `cache` since 5.24, which warns of the name before it.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
PROJECTION_NAMES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("qkv_proj",),
    "o": ("o_proj", "dense", "out_proj"),
}


LAYER_TYPES = ("full_attention", "sliding_attention")
"""What a layer may be; a model that does not say has layers of the first type, or of the second if it has a window."""


@dataclass(frozen=True)
class Rotary:
    """A set of rotary frequencies: the module that has it, and its name there (some models have one a layer type)."""

    module: nn.Module
    name: str = "inv_freq"

    @property
    def inv_freq(self) -> Tensor:
        """Frequencies [rotary_dim / 2]; asked for each time, for moving the model replaces the tensor."""
        frequencies: Tensor = getattr(self.module, self.name)
        return frequencies

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by (YaRN)."""
        return float(getattr(self.module, self.name.removesuffix("inv_freq") + "attention_scaling", 1.0))


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of the base model: its module, where its projections are, and what it sees."""

    path: str
    module: nn.Module
    projections: dict[str, str]
    """Letters ("q", "k", "v", "o", or "qkv" for a fused one) to attribute names of `module`."""
    rotary: Rotary | None
    """What its keys are rotated by; None: they are not (SmolLM3 and Cohere2 have such layers)."""
    window: int | None
    """A token sees this many positions, its own the last; None: all before it."""
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Layout:
    """What the method needs to know about a base model."""

    layers: list[AttentionLayer]
    interleaved: bool
    max_positions: int

    @property
    def rotaries(self) -> list[Rotary]:
        """The sets of rotary frequencies that its layers use, in the order of the layers."""
        return list(dict.fromkeys(layer.rotary for layer in self.layers if layer.rotary))

    @property
    def window(self) -> int | None:
        """The smallest window of a layer; None: all have full attention."""
        return min((layer.window for layer in self.layers if layer.window is not None), default=None)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, as numbers (multiply by the size of the type)."""
        return sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)


_layouts: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


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
    last = None if layout(model).window is None else int(position_ids.max())
    with entered(model, Pass(attention, candidates, position_ids, last)):
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
    with one_pass_at_a_time, without_cudnn():
        given = {"input_ids": input_ids, CACHE_NAME: cache, "use_cache": True, "logits_to_keep": logits_to_keep}
        logits: Tensor = model(**given).logits
    return logits


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
            f"{kind} models are not supported: {reason}. Supported are decoders with rotary positions whose layers "
            f"have full attention or a sliding window (Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo, Phi-3, GPT-OSS, "
            f"Granite, Cohere, ...)."
        )

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder")
    if not hasattr(model, "get_decoder") or not getattr(model, "can_generate", lambda: False)():
        raise refuse("it is not a causal language model")
    if getattr(config, "text_config", None) is not None:
        raise refuse("it is a multimodal model; load its text model alone")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if odd:
        raise refuse(f"it has layers of type {', '.join(odd)}")
    if getattr(config, "num_kv_shared_layers", None):
        raise refuse("some of its layers have no keys and values of their own (num_kv_shared_layers)")
    if getattr(config, "kv_lora_rank", None):
        raise refuse("its keys and values are latent (multi-head latent attention, kv_lora_rank)")
    if not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        raise refuse("it has no rotary positions (absolute, ALiBi or learned ones cannot be moved)")
    found = []
    for path, module in model.named_modules():
        names = {
            letter: name
            for letter, choices in PROJECTION_NAMES.items()
            for name in choices
            if isinstance(getattr(module, name, None), nn.Module)
        }
        if hasattr(module, "layer_idx") and "o" in names and ({"q", "k", "v"} <= set(names) or "qkv" in names):
            found.append((path, module, names))
    found.sort(key=lambda layer: int(layer[1].layer_idx))
    if len(found) != getattr(config, "num_hidden_layers", None):
        raise refuse(
            f"{len(found)} of its {getattr(config, 'num_hidden_layers', '?')} layers have q, k, v and o projections "
            f"under known names"
        )
    try:
        calls = _calls(model, {path: module for path, module, _ in found})
    except _STRANGE as error:
        raise refuse(f"its layers cannot be called one by one ({type(error).__name__}: {first_line(error)})") from error
    if any(len(made) != 1 for made in calls.values()):
        raise refuse("its layers do not call transformers' attention function once each")
    if not any(call.rotary for (call,) in calls.values()):
        raise refuse("its rotary positions do not reach its attention")
    most = _max_positions(config)
    layers = []
    for path, module, names in found:
        (call,) = calls[path]
        window = call.window if call.window is not None and call.window < most else None
        layers.append(
            AttentionLayer(
                *(path, module, names, call.rotary, window, call.query.shape[1]),
                *(call.key.shape[1], call.key.shape[3], call.value.shape[3]),
            )
        )
    return Layout(layers, _is_interleaved(layers[0].module, refuse), most)


_STRANGE = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
"""What a model raises whose layers are called in a way that `_calls` does not know."""


@dataclass(frozen=True)
class _Call:
    """How one attention layer calls the attention function."""

    rotary: Rotary | None
    window: int | None
    query: Tensor
    key: Tensor
    value: Tensor


@torch.no_grad()
def _calls(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, list[_Call]]:
    """How the model calls its attention layers, and these the attention function, by path: for one token.

    The model's own forward goes from layer to layer, of which only the attention is called. Nothing is computed but a
    token's projections; works on the meta device.
    """
    rotary: dict[int, Rotary] = {}
    kept: list[Any] = []  # so that an address stands for one tensor
    calls: dict[str, list[_Call]] = {path: [] for path in modules}

    def rotary_called(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        kind = next((given for given in (*args, *kwargs.values()) if isinstance(given, str)), None)
        rotary[id(out[0])] = Rotary(module, "inv_freq" if kind is None else f"{kind}_inv_freq")
        kept.append(out)

    def layer_called(path: str, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        hidden = given.pop("hidden_states")
        turn = next((x[0] for x in given.values() if isinstance(x, tuple) and id(x[0]) in rotary), None)
        takes = inspect.signature(modules[path].forward).parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values()):
            given = {name: value for name, value in given.items() if name in takes}

        def attention(_: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
            calls[path].append(_Call(rotary[id(turn)] if using.seen else None, how.window, query, key, value))
            return query.new_zeros(*query.shape[:3], value.shape[3])

        with _Using(turn) as using, entered(model, Pass(attention, NO_TOKENS, ids, sys.maxsize)):
            modules[path](hidden, **given)
        return hidden  # type: ignore[no-any-return]

    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with ExitStack() as undo:
        for module in model.modules():
            if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
                # Without the frequencies' update by length, which reads positions: there are none on the meta device.
                undo.enter_context(_forward(module, partial(inspect.unwrap(type(module).forward), module)))
                undo.callback(module.register_forward_hook(rotary_called, with_kwargs=True).remove)
        for path in modules:
            layer = model.get_submodule(path.rpartition(".")[0])
            undo.enter_context(_forward(layer, partial(layer_called, path, inspect.signature(layer.forward))))
        undo.enter_context(entered(model, Pass(lambda *_: ids, NO_TOKENS, ids, None)))  # so that no masks are made
        model.get_decoder()(input_ids=ids, position_ids=ids, use_cache=False)  # type: ignore[operator]
    return calls


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """A module that does something else, for a while."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


class _Using(TorchFunctionMode):
    """Sees whether anything is computed from a tensor."""

    def __init__(self, tensor: Tensor | None):
        super().__init__()
        self.tensor, self.seen = tensor, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= self.tensor is not None and any(given is self.tensor for given in args)
        return func(*args, **(kwargs or {}))


def _is_interleaved(attention: nn.Module, refuse: Any) -> bool:
    """Which dimensions a model's own rotation pairs, found by trying it on four numbers."""
    file = sys.modules[type(attention).__module__]
    numbers = torch.arange(4.0, device="cpu")
    turned = None
    if hasattr(file, "rotate_half"):
        turned = file.rotate_half(numbers).tolist()
    elif hasattr(file, "apply_rotary_pos_emb"):  # by a quarter, cosines and sines one a pair
        none, one = torch.zeros(1, 1, 2, device="cpu"), torch.ones(1, 1, 2, device="cpu")
        with suppress(RuntimeError):
            turned = file.apply_rotary_pos_emb(*[numbers.view(1, 1, 1, 4)] * 2, none, one)[1].flatten().tolist()
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
