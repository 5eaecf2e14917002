"""Weights once more, in a form that a CPU multiplies by faster: second copies, for the passes of the method.

    packed    in oneDNN's own layout. Decoding multiplies a handful of tokens by every weight of the model, and torch's
              general kernels read weights at a fraction of the memory's speed there; this is 1.2 to 2.4 times faster.
    int8      the linear layers in 8 bits (`int8.py`), but for the tokens at the first positions of a text, and the
              candidate projections packed. A fourth of the memory's traffic, and results that differ by more.

The model stays what it was: its weights are untouched, and outside a pass of `base.run` (or with gradients) it computes
as before, bit for bit.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from focusllm.config import Weights
from focusllm.machine import computes_on_cpu
from focusllm.method import int8
from focusllm.method.int8 import Int8Weight
from focusllm.method.passes import first_tokens, in_pass

Kept = Literal["plain", "packed", "int8"]
DEFAULT_LIMIT = 2**30
"""Bytes that second copies may take without being asked for."""
FEW_TOKENS = 16
"""What oneDNN's layout is made for; more tokens are not slower than with the general one."""


class PackedWeight:
    """A weight in oneDNN's own layout.

    Args:
        weight: [out, in].
    """

    def __init__(self, weight: Tensor):
        self.nbytes = weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW_TOKENS)

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, bias, "none", [], "")
        return out


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] -> [..., out], within passes by the copy of the weight if there is one."""
    copy, made_from = _copies.get(weight, (None, None))
    usable = copy is not None and in_pass() and not torch.is_grad_enabled()
    if copy is None or not usable or made_from != _state(weight):
        return F.linear(input, weight, bias)
    if isinstance(copy, Int8Weight):
        first = first_tokens(input)
        if not copy.takes(input.shape[:-1].numel()) or (first and first == input.shape[-2]):
            return F.linear(input, weight, bias)
        if first:
            return torch.cat([F.linear(input[:, :first], weight, bias), copy.linear(input[:, first:], bias)], 1)
    return copy.linear(input, bias)


class PackedLinear(nn.Linear):
    """An `nn.Linear` that has its weight twice. `pack` makes it, `unpack` makes it what it was."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


# Beside the weights, not in the modules: what is packed can be neither copied nor pickled, but a model can.
_copies: MutableMapping[Tensor, tuple[PackedWeight | Int8Weight, tuple[int, int]]] = WeakIdKeyDictionary()


def pack(model: nn.Module, weights: Kept = "packed") -> int:
    """Give linear layers and candidate projections a second copy of their weights; again when weights have changed.

    A copy is not used any more once its weight is written to, but torch does not tell of writing into `weight.data`, as
    merging a LoRA does: then pack anew.

    Returns:
        The bytes of the copies; 0 where there is nothing to gain (a GPU, a type without such kernels).
    """
    unpack(model)
    for module, weight, kind in _suitable(model, weights):
        if isinstance(module, nn.Linear):
            module.__class__ = PackedLinear  # as torch's own parametrizations do: names and weights stay as they are
        _copies[weight] = kind(weight), _state(weight)
    return packed_bytes(model)


def unpack(model: nn.Module) -> None:
    """Drop the copies."""
    for module in model.modules():
        for weight in _weights(module):
            _copies.pop(weight, None)
        if isinstance(module, PackedLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the copies that a model has."""
    return sum(copy.nbytes for copy in _copies_of(model))


def kept_as(model: nn.Module) -> Kept:
    """What copies a model has."""
    kinds = {type(copy) for copy in _copies_of(model)}
    return "int8" if Int8Weight in kinds else "packed" if kinds else "plain"


def packable_bytes(model: nn.Module, weights: Kept = "packed") -> int:
    """Bytes that copies of a model would take, which may be on the meta device; 0 where `pack` does nothing."""
    return sum(int8.nbytes_of(w) if kind is Int8Weight else w.nbytes for _, w, kind in _suitable(model, weights))


def chosen(model: nn.Module, weights: Weights, notify: Callable[[str], None] = lambda _: None) -> Kept:
    """What copies loading a model makes, which may be on the meta device, where so much was asked for.

    Args:
        notify: told where there are no 8 bits though they were asked for.
    """
    if weights == "int8" and not any(kind is Int8Weight for *_, kind in _suitable(model, "int8")):
        where = "this CPU, or torch for it," if computes_on_cpu(next(model.parameters()).device) else "a GPU"
        notify(f"Weights stay as they are: {where} has no kernels for weights='int8'.")
        weights = "auto"
    if weights == "auto":
        return "packed" if packable_bytes(model) <= DEFAULT_LIMIT else "plain"
    return weights


def _copies_of(model: nn.Module) -> Iterator[PackedWeight | Int8Weight]:
    weights = (weight for module in model.modules() for weight in _weights(module))
    return (_copies[weight][0] for weight in weights if weight in _copies)


def _suitable(
    model: nn.Module, weights: Kept
) -> Iterator[tuple[nn.Module, Tensor, type[PackedWeight] | type[Int8Weight]]]:
    """What has a kernel: module, weight, and what is to be made of it."""
    if weights == "plain":
        return
    for module in model.modules():
        for weight in _weights(module):
            if weights == "int8" and isinstance(module, nn.Linear) and _has_int8_kernel(weight):
                yield module, weight, Int8Weight
            elif _has_kernel(weight):
                yield module, weight, PackedWeight


def _weights(module: nn.Module) -> Sequence[Tensor]:
    """A linear layer's weight, or the matrices of a module that multiplies by `linear` itself and says by which."""
    if type(module) in (nn.Linear, PackedLinear):  # not other subclasses, whose forward is their own
        return (module.weight,)  # type: ignore[return-value]
    return getattr(module, "matrices", ())


def _has_kernel(weight: Tensor) -> bool:
    is_known = platform.machine() in ("x86_64", "AMD64") and torch._C._has_mkldnn
    if not is_known or not _is_watched(weight):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _has_int8_kernel(weight: Tensor) -> bool:
    return int8.has_kernels() and _is_watched(weight) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _is_watched(weight: Tensor) -> bool:
    """Whether a weight is computed with on the CPU, and tells when it changes."""
    return computes_on_cpu(weight.device) and not weight.is_inference()


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight is replaced, moved or written to (not through `weight.data`)."""
    return weight.data_ptr(), weight._version
