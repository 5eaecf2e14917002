"""Weights in the layout that a CPU multiplies few tokens by fastest: a second copy, for the passes of the method.

Decoding multiplies a handful of tokens by every weight of the model, and torch's general kernels read weights at a
fraction of the memory's speed there. oneDNN's own layout is 1.2 to 2.4 times faster. The model stays what it was: its
weights are untouched, and outside a pass of `base.run` (or with gradients) it computes as before, bit for bit.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, MutableMapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from focusllm.machine import computes_on_cpu
from focusllm.method.passes import in_pass

DEFAULT_LIMIT = 2**30
"""Bytes that a second copy may take without being asked for."""
FEW_TOKENS = 16
"""What the layout is made for; more tokens are not slower than with the general one."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] -> [..., out], within passes by the copy of the weight if there is one."""
    packed, made_from = _copies.get(weight, (None, None))
    usable = packed is not None and in_pass() and not torch.is_grad_enabled()
    if not usable or made_from != _state(weight):
        return F.linear(input, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return out


class PackedLinear(nn.Linear):
    """An `nn.Linear` that has its weight twice. `pack` makes it, `unpack` makes it what it was."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


# Beside the weights, not in the modules: what is packed can be neither copied nor pickled, but a model can.
_copies: MutableMapping[Tensor, tuple[Tensor, tuple[int, int]]] = WeakIdKeyDictionary()


def pack(model: nn.Module) -> int:
    """Give linear layers and candidate projections a second copy of their weights; again when weights have changed.

    A copy is not used any more once its weight is written to, but torch does not tell of writing into `weight.data`, as
    merging a LoRA does: then pack anew.

    Returns:
        The bytes of the copies; 0 where there is nothing to gain (a GPU, a type without such kernels).
    """
    for module, weight in _suitable(model):
        if isinstance(module, nn.Linear):
            module.__class__ = PackedLinear  # as torch's own parametrizations do: names and weights stay as they are
        _copies[weight] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW_TOKENS), _state(weight)
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
    return sum(weight.nbytes for _, weight in _suitable(model) if weight in _copies)


def packable_bytes(model: nn.Module) -> int:
    """Bytes that copies of a model would take, which may be on the meta device; 0 where `pack` does nothing."""
    return sum(weight.nbytes for _, weight in _suitable(model))


def is_packed_by_default(model: nn.Module) -> bool:
    """Whether loading a model packs it without being asked."""
    return packable_bytes(model) <= DEFAULT_LIMIT


def _suitable(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    for module in model.modules():
        yield from ((module, weight) for weight in _weights(module) if _has_kernel(weight))


def _weights(module: nn.Module) -> Sequence[Tensor]:
    """A linear layer's weight, or the matrices of a module that multiplies by `linear` itself and says by which."""
    if type(module) in (nn.Linear, PackedLinear):  # not other subclasses, whose forward is their own
        return (module.weight,)  # type: ignore[return-value]
    return getattr(module, "matrices", ())


def _has_kernel(weight: Tensor) -> bool:
    on_cpu = computes_on_cpu(weight.device)
    is_known = platform.machine() in ("x86_64", "AMD64") and torch._C._has_mkldnn
    if not (on_cpu and is_known) or weight.is_inference():  # those do not tell when they change
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight is replaced, moved or written to (not through `weight.data`)."""
    return weight.data_ptr(), weight._version
