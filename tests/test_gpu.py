"""What runs differently on an NVIDIA GPU, against the same on the CPU. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conftest import SMALL, build, byte_tokenizer, random_ids, with_candidates
from focusllm import AdapterConfig, FocusForCausalLM, FocusLLM, TrainConfig, train
from focusllm.method.adapter import trainable_parameters
from focusllm.method.attention import attend
from focusllm.method.differentiable import bias_of, over_sets
from focusllm.method.focus import encode_chunks
from focusllm.training.dense import Sample, dense_loss
from training import losses, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")

TOLERANCES = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32, which has the precision of half types."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("length", [1, 3, 33, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_segments(dtype: torch.dtype, length: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = (random(5, heads, length, 64) for heads in (6, 2, 2))
    past, other = (random(5, 2, 45, 64), random(5, 2, 45, 64)), (random(5, 2, 19, 64), random(5, 2, 19, 64))
    seen = torch.arange(41) % 3 > 0
    segment_mask = torch.rand(5, length, 19, generator=generator) > 0.3 if masked else None
    own = (torch.rand(length, length, generator=generator) > 0.3) | torch.eye(length, dtype=torch.bool)

    def on(device: str, kind: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        def to(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, kind)

        mask = segment_mask if segment_mask is None else segment_mask.to(device)
        segments = [
            ([(to(past[0]), to(past[1]), 41, seen.to(device))], None),
            ([(to(other[0]), to(other[1]), 19, None)], mask),
        ]
        own_mask = own.to(device) if masked else None
        return attend(to(query), to(key), to(value), segments, own_mask, 0.125, min(length, 2))

    (want, want_paid), (got, paid) = on("cpu", torch.float32), on("cuda", dtype)
    torch.testing.assert_close(got.float().cpu(), want, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    torch.testing.assert_close(paid[0].float().cpu(), want_paid[0], atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_to_sets_with_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 6, 21, 64), (3, 2, 21, 64), (3, 2, 21, 64), (3, 2, 9, 5, 64), (3, 2, 9, 5, 64))
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    mask = torch.ones(21, 21, dtype=torch.bool).tril()
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        inputs = [tensor.to(device, kind).requires_grad_() for tensor in tensors]
        bias = bias_of(mask.to(device), kind)[None, None].expand(3, 1, -1, -1)
        out = over_sets(*inputs, bias, 0.125)
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), inputs)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.float().cpu(), want, atol=5 * TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_dense_supervision_has_the_same_losses_and_gradients() -> None:
    chunks = torch.tensor([random_ids(24, seed) for seed in range(5)])
    samples = [Sample(random_ids(9 + 8 * i, 10 + i), 3 + 2 * i, 6) for i in range(4)]
    found = []
    for device in ("cpu", "cuda"):
        model = with_candidates(build(), AdapterConfig(rank=4)).to(device)
        for parameter in trainable_parameters(model).values():
            parameter.requires_grad_(True)
        loss, _ = dense_loss(model, encode_chunks(model, chunks.to(device)), samples, labels_per_pass=64)
        loss.mean().backward()
        grads = [p.grad.flatten().cpu() for p in trainable_parameters(model).values() if p.grad is not None]
        found.append((loss.detach().cpu(), torch.cat(grads)))
    (want, want_grads), (got, grads) = found
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(grads, want_grads, atol=1e-3 * float(want_grads.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refresh_rows": None},
        {"decoding": "exact"},
        {"kv_dtype": "int8"},
        {"kv_place": "host"},
        {"kv_place": "disk", "kv_dtype": "int8"},
    ],
    ids=str,
)
def test_answers_are_those_of_the_cpu(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path))
    found = []
    for device in ("cpu", "cuda"):
        model = with_candidates(build(max_position_embeddings=512)).to(device)
        config = SMALL.replace(local_length=64, **changes)
        llm = FocusLLM(FocusForCausalLM(model, config), byte_tokenizer(), "tiny")
        document = llm.read_text("".join(f"Line {i} says {i * i % 97}. " for i in range(60)))
        found.append([llm.ask(document, question, max_new_tokens=40).text for question in ("What says 7?", "And 20?")])
    assert found[0] == found[1]


@pytest.mark.parametrize("changes", [{}, {"checkpointed": True}, {"refresh_rows": 1, "distractors": [2]}], ids=str)
def test_training_goes_on_after_a_stop(
    changes: dict[str, object], train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    settings = train_settings(dtype="float32", **changes)

    def stop(entry: dict[str, object]) -> None:
        if entry["step"] == 4 and "loss" in entry:
            raise KeyboardInterrupt

    train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "stopped", report=stop)
    train(settings, tmp_path / "stopped")
    assert [step for step, *_ in losses(tmp_path / "stopped")] == [step for step, *_ in losses(tmp_path / "whole")]
    first, second = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    for name in second:  # sums of a GPU's kernels have no fixed order
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-2)
