"""Golden cases: recorded runs of the authors' released code, replayed on ours.

A case is a folder with `case.json` (configuration, token ids, what was fixed) and `golden.safetensors` (logits,
candidate keys and values, gradients), in float32 and float64. Inference cases are replayed through the engine in exact
mode with the `paper` preset, training cases through `exact_loss` and its gradients.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from focusllm.config import FocusConfig
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.errors import FocusError
from focusllm.json_text import parse_json
from focusllm.memory.chunking import cut, split
from focusllm.memory.chunks import encode
from focusllm.method.adapter import AdapterConfig, inject, injected, trainable_parameters
from focusllm.method.base import layout
from focusllm.method.kv import KV
from focusllm.method.rope import move_keys, rotation
from focusllm.training.dense import exact_loss

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
GRADIENT_TOLERANCE = 1e-6


class CaseError(FocusError):
    """A folder of cases that cannot be read."""


@dataclass
class CaseResult:
    """How far one case is from its golden numbers: largest absolute errors by quantity."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all quantities are within their limits."""
        return not self.failures and all(self.errors[name] <= self.limits[name] for name in self.errors)

    def record(self, quantity: str, actual: Tensor, golden: Tensor, limit: float) -> None:
        """Compare one quantity; the largest error of several with the same name counts."""
        if actual.shape != golden.shape:
            self.failures.append(f"{quantity} has shape {tuple(actual.shape)} instead of {tuple(golden.shape)}")
            return
        error = (actual.double() - golden.double()).abs().max().item()
        if error != error:
            self.failures.append(f"{quantity} is not a number")
        self.errors[quantity], self.limits[quantity] = max(self.errors.get(quantity, 0.0), error), limit


def find_cases(folder: str | Path) -> list[Path]:
    """The case folders below a folder, in order.

    Raises:
        CaseError: there are none.
    """
    cases = sorted(path.parent for path in Path(folder).glob("*/case.json")) if os.path.isdir(folder) else []
    if not cases:
        raise CaseError(f"there are no golden cases in {folder}; give a folder of folders with a case.json.")
    return cases


def run_case(folder: Path) -> CaseResult:
    """Replay one case in float32 and float64.

    Raises:
        CaseError: the case cannot be read.
    """
    try:
        case = parse_json((folder / "case.json").read_bytes())
        golden = load_file(folder / "golden.safetensors")
        weights = load_file(folder / case["weights"])
        replay = {"inference": _replay_inference, "training": _replay_training}[case["kind"]]
        result = CaseResult(case["name"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CaseError(f"the golden case {folder.name} is damaged ({error!r}).") from error
    try:
        for dtype in TOLERANCE:
            replay(case, golden, _build(case, weights, dtype), dtype, result)
    except KeyError as error:  # nothing else: what the method gets wrong is no damage of the case
        raise CaseError(f"the golden case {folder.name} is damaged (it has no {error}).") from error
    return result


def _build(case: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The case's model with its candidate projections, in one type throughout."""
    fields = {k: v for k, v in case["config"].items() if k not in ("memory_stride", "local_window", "beacon_param")}
    theta = fields.pop("rope_theta")
    config = LlamaConfig(
        **fields, rope_parameters={"rope_type": "default", "rope_theta": theta}, max_position_embeddings=8192
    )
    model: nn.Module = LlamaForCausalLM(config).eval().to(dtype).requires_grad_(False)
    candidate = {name: tensor for name, tensor in weights.items() if "beacon" in name}
    base = {name: tensor for name, tensor in weights.items() if "beacon" not in name}
    base.setdefault("lm_head.weight", base["model.embed_tokens.weight"])
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in base.items()})
    if dtype == torch.float64:
        widen(model)
    for path, wrapper in inject(model, AdapterConfig("".join(case["config"]["beacon_param"]))).items():
        name = path.replace("self_attn.", "self_attn.beacon_") + ".weight"
        with torch.no_grad():
            wrapper.weight.copy_(candidate[name])
    return model


def widen(model: nn.Module) -> None:
    """Make a Llama compute its norms and rotary tables in float64 too (transformers does them in float32)."""

    class Norm(nn.Module):
        def __init__(self, weight: Tensor, eps: float):
            super().__init__()
            self.weight, self.eps = nn.Parameter(weight.double(), requires_grad=False), eps

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    class Rotary(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
            self.inv_freq = nn.Buffer(config.rope_parameters["rope_theta"] ** -exponents, persistent=False)

        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            angle = position_ids[..., None].double() * self.inv_freq
            return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if type(module).__name__ == "LlamaRMSNorm":
            setattr(model.get_submodule(parent), name, Norm(module.weight, module.variance_epsilon))
        elif type(module).__name__ == "LlamaRotaryEmbedding":
            setattr(model.get_submodule(parent), name, Rotary(model.config))


def _replay_inference(
    case: dict[str, Any], golden: dict[str, Tensor], model: nn.Module, dtype: torch.dtype, result: CaseResult
) -> None:
    bits, limit = ("f32", "f64")[dtype == torch.float64], TOLERANCE[dtype]
    config = FocusConfig.paper(
        chunk_length=case["config"]["memory_stride"][0],
        local_length=case["config"]["local_window"],
        plain_below=case["threshold"],
    )

    def replay(forced: list[int], given: list[int]) -> Any:
        """Logits and request after prefill and after every forced token."""
        far, local = split(given, config)
        request = start_request(model, encode(model, far, config), local, config)
        yield prefill(model, request, config)[-1], request
        for token in forced:
            yield decode(model, [request], [token], config)[0], request

    for step, (logits, request) in enumerate(replay(case["forced_tokens"], case["input_ids"])):
        result.record(f"logits {bits}", logits, golden[f"{bits}.logits"][step], limit)
        if f"{bits}.cand_k.{step}" in golden:
            keys, values = _before_rotation(model, request.candidates)
            result.record(f"candidate keys {bits}", keys, golden[f"{bits}.cand_k.{step}"], limit)
            result.record(f"candidate values {bits}", values, golden[f"{bits}.cand_v.{step}"], limit)
    greedy: list[int] = []
    far, local = split(case["input_ids"], config)
    request = start_request(model, encode(model, far, config), local, config)
    logits = prefill(model, request, config)[-1]
    while len(greedy) < len(case["generate_greedy_tokens"]):
        greedy.append(int(logits.argmax()))
        logits = decode(model, [request], greedy[-1:], config)[0]
    if greedy != case["generate_greedy_tokens"]:
        result.failures.append(f"greedy tokens {bits} are {greedy} instead of {case['generate_greedy_tokens']}")
    tail = case.get("ppl_tail_ids")
    if tail:
        losses = [
            F.cross_entropy(logits, torch.tensor(token))
            for token, (logits, _) in zip(tail, replay(tail[:-1], case["input_ids"]), strict=True)
        ]
        expected = torch.tensor(case[f"ppl_mean_loss_{bits}"], dtype=torch.float64)
        result.record(f"perplexity loss {bits}", torch.stack(losses).mean(), expected, limit)


def _replay_training(
    case: dict[str, Any], golden: dict[str, Tensor], model: nn.Module, dtype: torch.dtype, result: CaseResult
) -> None:
    """The paper's loss: one label, the token behind the local query (SEMANTICS: training)."""
    bits, limit = ("f32", "f64")[dtype == torch.float64], TOLERANCE[dtype]
    ids, window, train = case["input_ids"], case["config"]["local_window"], case["train"]
    if train["mode"] == "repetition":
        start = train["local_chunk"] * window + train["index_in_chunk"]
        far = ids
    else:
        start = (len(ids) // window - 1) * window + train["index_in_chunk"]
        far = ids[:start]
    query, answer = ids[start : start + train["local_size"]], ids[start + train["local_size"]]
    whole = FocusConfig(chunk_length=train["stride"], chunk_overlap=0)
    chunks = [torch.tensor(far[a:b]) for a, b in cut(len(far), whole)]
    tail = query[-min(512, train["stride"], len(query)) :]
    prompt, local = (x if x[0] == 1 else [1, *x] for x in (tail, query))
    loss, logits = exact_loss(model, chunks, torch.tensor(prompt), torch.tensor(local), torch.tensor(answer))
    loss.backward()  # type: ignore[no-untyped-call]
    result.record(f"logits {bits}", logits.detach(), golden[f"{bits}.logits_last"], limit)
    result.record(f"loss {bits}", loss.detach(), torch.tensor(case[f"loss_{bits}"], dtype=torch.float64), limit)
    if dtype == torch.float64:
        trained = trainable_parameters(model)
        for path in injected(model):
            name = "grad." + path.replace("self_attn.", "self_attn.beacon_") + ".weight"
            parameter = trained.get(f"{path}.weight")
            gradient = torch.zeros_like(golden[name]) if parameter is None else parameter.grad
            if gradient is None:
                result.failures.append(f"{path} has no gradient")
            else:
                result.record("gradients f64", gradient, golden[name], GRADIENT_TOLERANCE)


def _before_rotation(model: nn.Module, candidates: KV | None) -> tuple[Tensor, Tensor]:
    """A candidate set as the golden files have it: keys and values [L, K, R, D], keys before RoPE."""
    assert candidates is not None
    found = layout(model)
    back = -torch.arange(candidates.length)[None]
    turn = rotation(back, found.rotaries[0].inv_freq)
    keys = [move_keys(key, turn)[0] for key in candidates.keys]
    return torch.stack(keys), torch.stack([value[0] for value in candidates.values])
