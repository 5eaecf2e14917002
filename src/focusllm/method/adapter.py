"""Candidate projections: the trainable q, k, v, o that a candidate token uses instead of the base model's.

    ordinary tokens ---> base projection ------------------------> output
    candidate tokens --> a full copy of it (the paper), or base + low rank (LoRA, arXiv 2106.09685) --> output

`inject` wraps the base model's projections, `remove` puts the very same modules back. Untrained, a candidate gets what
the base gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from focusllm.config import is_whole
from focusllm.errors import ConfigError
from focusllm.method.base import AttentionLayer, layout
from focusllm.method.packed import linear
from focusllm.method.passes import NO_TOKENS, candidate_tokens


@dataclass(frozen=True)
class AdapterConfig:
    """Which projections are trainable, and how.

    Raises:
        ConfigError: letters other than q, k, v, o, or a rank below 1.
    """

    projections: str = "qkvo"
    """Any subset of the letters q, k, v, o."""
    rank: int | None = None
    """Rank of low-rank projections; None: full copies, as in the paper."""
    alpha: float | None = None
    """Low-rank updates are scaled by alpha / rank. None: the rank, so by 1."""
    sink_token: int | None = None
    """Token that stands in front of the candidates in the local pass, as the projections were trained. None: none."""
    trained: dict[str, Any] = field(default_factory=dict)
    """What the adapter was trained with (lengths, steps, data), for the reader; has no effect."""

    def __post_init__(self) -> None:
        if not self.projections or set(self.projections) - set("qkvo"):
            raise ConfigError(f"projections is {self.projections!r}; it must be one or more of the letters q, k, v, o.")
        if self.rank is not None and not is_whole(self.rank, 1):
            raise ConfigError(
                f"rank is {self.rank!r}; it must be a whole number of at least 1, or none for full copies."
            )
        if self.alpha is not None and not (type(self.alpha) in (int, float) and math.isfinite(self.alpha)):
            raise ConfigError(f"alpha is {self.alpha!r}; it must be a number, or none for the rank.")
        if self.sink_token is not None and not is_whole(self.sink_token, 0):
            raise ConfigError(f"sink_token is {self.sink_token!r}; it must be the number of a token, or none.")

    def replace(self, **changes: Any) -> AdapterConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    @property
    def scale(self) -> float:
        """Factor of the low-rank update."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank


class CandidateLinear(nn.Module):
    """A base projection, and beside it the trainable one for the candidates of a pass.

    Args:
        base: the projection that is wrapped; its own forward is called, so a quantised one works (low rank only).
        config: full copy or low rank.
        trainable_rows: of a fused projection, the output rows that belong to the chosen letters; None: all.
        dtype: of the trainable weights; None: the base's (float32 if that is quantised).
    """

    trainable_rows: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        config: AdapterConfig,
        trainable_rows: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.base = base
        self.config = config
        self.scale = config.scale
        self.register_buffer("trainable_rows", trainable_rows, persistent=False)
        if dtype is None:
            dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
        place: dict[str, Any] = {"device": base.weight.device, "dtype": dtype}
        if config.rank is None:
            self.weight = nn.Parameter(base.weight.detach().to(dtype, copy=True))
            self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().to(dtype, copy=True))
        else:
            self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, **place))
            self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, **place))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def is_low_rank(self) -> bool:
        """Whether this is base + low rank rather than a full copy."""
        return hasattr(self, "lora_A")

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What candidates are multiplied by, for `packed`."""
        return (self.lora_A, self.lora_B) if self.is_low_rank else (self.weight,)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name (`weight`, `bias`, or `lora_A`, `lora_B`)."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, in] -> [B, T, out]; the pass says which tokens are candidates."""
        out: Tensor = self.base(x)
        chosen = candidate_tokens()
        if chosen == NO_TOKENS:
            return out
        candidates = x[:, chosen]
        if self.is_low_rank:
            update = linear(linear(candidates.to(self.lora_A.dtype), self.lora_A), self.lora_B)
            if self.scale != 1:
                update = update * self.scale
            if self.trainable_rows is not None:
                update = update * self.trainable_rows
            if candidates.shape == x.shape:  # in training, where a change in place would cost a copy
                return out + update.to(out.dtype)
            out[:, chosen].add_(update.to(out.dtype))
            return out
        projected = linear(candidates.to(self.weight.dtype), self.weight, self.bias).to(out.dtype)
        if self.trainable_rows is not None:
            projected = torch.where(self.trainable_rows, projected, out[:, chosen])
        if candidates.shape == x.shape:
            return projected
        out[:, chosen] = projected
        return out


def inject(model: nn.Module, config: AdapterConfig, dtype: torch.dtype | None = None) -> dict[str, CandidateLinear]:
    """Give a base model candidate projections; a call with other settings replaces earlier ones.

    Args:
        dtype: of the trainable weights (training wants float32 beside a 16-bit base); None: the base's.

    Returns:
        The new modules by the path of the projection that they wrap.

    Raises:
        ModelError: the model is not supported.
    """
    remove(model)
    injected = {}
    for layer in layout(model).layers:
        for letters, name in layer.projections.items():
            chosen = [letter for letter in letters if letter in config.projections]
            if chosen:
                wrapper = CandidateLinear(
                    getattr(layer.module, name), config, _rows_of(letters, chosen, layer, name), dtype
                )
                setattr(layer.module, name, wrapper)
                injected[f"{layer.path}.{name}"] = wrapper
    return injected


def remove(model: nn.Module) -> None:
    """Put the base model's own projections back: afterwards it is the base, bit for bit."""
    for path, wrapper in injected(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapper.base)


def injected(model: nn.Module) -> dict[str, CandidateLinear]:
    """The candidate projections of a model by path, empty if it has none."""
    return {
        f"{layer.path}.{name}": module
        for layer in layout(model).layers
        for name in layer.projections.values()
        if isinstance(module := getattr(layer.module, name), CandidateLinear)
    }


def injected_config(model: nn.Module) -> AdapterConfig | None:
    """The settings of the candidate projections that a model has now; None: it has none."""
    for layer in layout(model).layers:  # asked for at every token: the first one found will do
        for name in layer.projections.values():
            if isinstance(module := getattr(layer.module, name), CandidateLinear):
                return module.config
    return None


def sink_token(model: nn.Module) -> int | None:
    """The token in front of the candidates in a model's local pass, an attention sink (arXiv 2309.17453), if any."""
    config = injected_config(model)
    return None if config is None else config.sink_token


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training can change, by path.

    The last layer's q and o are left out: of its candidates only the key and the value are read, so they never get a
    gradient.
    """
    last = layout(model).layers[-1]
    without_gradient = {f"{last.path}.{last.projections[letter]}" for letter in "qo" if letter in last.projections}
    return {
        f"{path}.{name}": parameter
        for path, wrapper in injected(model).items()
        if path not in without_gradient
        for name, parameter in wrapper.own_parameters().items()
    }


def _rows_of(letters: str, chosen: list[str], layer: AttentionLayer, name: str) -> Tensor | None:
    """Of a fused projection, a mask over its output rows: True for the chosen letters. None: all of them."""
    if len(chosen) == len(letters):
        return None
    width = {
        "q": layer.num_heads * layer.key_dim,
        "k": layer.num_kv_heads * layer.key_dim,
        "v": layer.num_kv_heads * layer.value_dim,
    }
    base: nn.Linear = getattr(layer.module, name)
    rows = torch.cat([torch.full((width[x],), x in chosen) for x in letters])
    return rows.to(base.weight.device)
