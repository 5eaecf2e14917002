"""Moving keys: a key rotated for one position, rotated on to another (RoPE, arXiv 2104.09864).

Rotations add up, so a key at position p goes to slot i by one more rotation by i - p. Only the bare cos/sin of
`inv_freq` may be used here: an attention scaling (YaRN) is already in the key and must not be applied twice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(delta: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [B, 1, T, rotary_dim / 2], of moves by `delta` [B, T] positions (negative ones too).

    Args:
        inv_freq: [rotary_dim / 2]; computed in float32, or in float64 if it is.
    """
    wide = torch.promote_types(inv_freq.dtype, torch.float32)
    angle = (delta[..., None].to(wide) * inv_freq.to(wide))[:, None]
    return angle.cos(), angle.sin()


def move_keys(keys: Tensor, turn: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Rotate keys on.

    Args:
        keys: [B, K, T, D]; the first dimensions, as many as the rotation has, are rotary, the rest has no position.
        turn: from `rotation`.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...

    Returns:
        [B, K, T, D] in the type of `keys`.
    """
    cos, sin = turn
    rotary_dim = 2 * cos.shape[-1]
    rotary, rest = keys[..., :rotary_dim], keys[..., rotary_dim:]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        moved = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        moved = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    moved = moved.to(keys.dtype)
    return torch.cat([moved, rest], -1) if rest.shape[-1] else moved
