"""Multiplying by weights of 8 bits on a CPU, by torch's own kernels. Nothing is trained, no text is looked at for it.

    out = (input in 8 bits @ weight in 8 bits) * scale of the token * scale of the output

A weight has one scale for each output, taken once; an input one for each token, taken anew in every layer, so that a
token with huge numbers does not coarsen the others.

Sums of two products must fit into 16 bits where a CPU has no instructions for products of 8 bits (VNNI): there, weights
take 7 bits. And many tokens are multiplied no faster than in float32, so that only a few at once are.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

FEW_TOKENS = 32
"""Up to so many, FBGEMM's kernels are the faster ones, beyond oneDNN's."""
HALF = 128
"""What stands for zero in an input, which has no sign: it is rounded to -127..127 and goes from 1 to 255."""


@cache
def has_kernels() -> bool:
    """Whether this CPU has kernels that are faster than those for float32, and torch still has them."""
    able = torch.cpu.get_capabilities()
    known = hasattr(torch.ops.quantized, "linear_dynamic") and hasattr(torch.ops.onednn, "qlinear_pointwise")
    engines = torch.backends.quantized.supported_engines
    return bool(able.get("avx2")) and known and {"fbgemm", "onednn"} <= set(engines)


@cache
def has_dot_products() -> bool:
    """Whether this CPU has instructions for products of 8 bits that both libraries use."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def nbytes_of(weight: Tensor) -> int:
    """Bytes of a weight [out, in] in 8 bits, which may be on the meta device."""
    return weight.numel() * (1 + has_dot_products()) + 4 * len(weight)


class Int8Weight:
    """A weight in 8 bits, in the layouts of its kernels.

    Args:
        weight: [out, in].
    """

    def __init__(self, weight: Tensor):
        rounded, self.scales = rounded_weight(weight)
        self.nbytes = nbytes_of(weight)
        self.few = _for_few(rounded, self.scales)
        self.many = torch.ops.onednn.qlinear_prepack(rounded, None) if has_dot_products() else None

    def takes(self, num_tokens: int) -> bool:
        """Whether so many tokens at once are multiplied faster than in float32."""
        return self.many is not None or num_tokens <= FEW_TOKENS

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out], in the type of the input."""
        flat = input.reshape(-1, input.shape[-1]).float()
        out = self._few(flat) if self.many is None or len(flat) <= FEW_TOKENS else self._many(flat, self.many)
        if bias is not None:
            out.add_(bias)
        return out.to(input.dtype).view(*input.shape[:-1], -1)

    def _few(self, flat: Tensor) -> Tensor:
        """By a kernel that rounds by itself, with one scale for all that it is given, and knows no NaN."""
        largest = _largest(flat)
        even = (flat / largest).nan_to_num_(0.0)  # a token that has none of sense gets none, by its largest number
        out: Tensor = torch.ops.quantized.linear_dynamic(even, self.few)
        return out.mul_(largest)

    def _many(self, flat: Tensor, weight: Tensor) -> Tensor:
        """By a kernel that takes whole numbers."""
        scale = _largest(flat).div_(HALF - 1)
        rounded = (flat / scale).round_().add_(HALF).to(torch.uint8)
        zeros = torch.zeros(len(self.scales), dtype=torch.int32)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rounded, 1.0, HALF, weight, self.scales, zeros, None), *(1.0, 0, torch.float32), *("none", [], "")
        )
        return out.mul_(scale)


def _largest(flat: Tensor) -> Tensor:
    """The largest number of each token, without its sign, and never 0: [T, in] -> [T, 1]."""
    largest: Tensor = torch.linalg.vector_norm(flat, math.inf, 1, keepdim=True)
    return largest.clamp_min_(torch.finfo(flat.dtype).tiny)


def rounded_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as whole numbers (int8), and what they are multiplied by for each output: [out]."""
    most = 127 if has_dot_products() else 63
    wide = weight.detach().float()
    scales = wide.abs().amax(1).div_(most).clamp_min_(torch.finfo(wide.dtype).tiny)
    return (wide / scales[:, None]).round_().to(torch.int8), scales


def _for_few(rounded: Tensor, scales: Tensor) -> Any:
    zeros = torch.zeros(len(rounded), dtype=torch.long)
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():  # of torch, about the type that its kernel takes its weights in
        warnings.simplefilter("ignore", UserWarning)
        whole = torch.quantize_per_channel(rounded * scales[:, None], scales.double(), zeros, 0, torch.qint8)
    torch.backends.quantized.engine = "fbgemm"
    try:
        return torch.ops.quantized.linear_prepack(whole, None)
    finally:
        torch.backends.quantized.engine = before
