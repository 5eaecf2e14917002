"""One model in the memory of several processes: its weights are split up among them (FSDP2, torch's `fully_shard`).

    each decoder layer                             gathered for its pass, split up again right behind it
    the last one, embeddings, norms, head          gathered for a whole memory, forward and backward

Candidate projections, their gradients and the optimizer's state are split up with the layers that they are in. The last
layer stays with what is around the layers because of its candidates only keys and values are read, which do not pass
through its output: FSDP gathers weights for the backward pass when a gradient reaches the output.

Weights are gathered by all processes together, so these must run the same passes in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from focusllm.method.base import decoder_layers

Module = TypeVar("Module", bound=nn.Module)


def shard(module: Module, model: nn.Module, device: torch.device) -> Module:
    """Split the weights of a module up among all processes, in place, and move it.

    Args:
        module: what is called, with all of its parameters. model: the base model in it; passes go through `module`.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in decoder_layers(model)[:-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # by default a root stays gathered when evaluated
    return module


def whole(tensor: Tensor) -> Tensor:
    """A tensor as if it were not split up (all processes take part)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors in main memory, one gathered after the other (all processes take part).

    Args:
        keep: whether this process wants them; else it gets none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if keep:
            found[name] = one.cpu()
    return found
