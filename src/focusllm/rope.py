"""Moving keys: a key rotated for one position, rotated on to another (RoPE, arXiv 2104.09864).

Rotations add up, so a key at position p goes to slot i by one more rotation by i - p. Only the bare cos/sin of
`inv_freq` may be used here: an attention scaling (YaRN) is already in the key and must not be applied twice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def move_keys(keys: Tensor, delta: Tensor, inv_freq: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate keys by `delta` positions.

    Args:
        keys: [B, K, T, D]; the first 2 * len(inv_freq) dimensions are rotary, the rest has no position.
        delta: [B, T] or anything that broadcasts to it; may be negative.
        inv_freq: [rotary_dim / 2].
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...

    Returns:
        [B, K, T, D] in the type of `keys`; computed in float32, or in float64 if the keys are.
    """
    dtype = torch.promote_types(keys.dtype, torch.float32)
    angle = (delta[..., None].to(dtype) * inv_freq.to(dtype))[:, None]  # [B, 1, T, rotary_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    rotary_dim = 2 * inv_freq.shape[0]
    rotary, rest = keys[..., :rotary_dim].to(dtype), keys[..., rotary_dim:]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        moved = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        moved = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([moved.to(keys.dtype), rest], -1)
