"""Training in several processes, with copies of the model or one among them: the same as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import build, random_ids, with_candidates
from focusllm import AdapterConfig, TrainConfig, TrainingError, inject, train
from focusllm.method.adapter import trainable_parameters
from focusllm.training.dense import Sample
from focusllm.training.loss import MemoryLoss
from focusllm.training.sampling import Memory
from training import tiny, weights

PROCESS = """
import json, signal, sys
from contextlib import suppress
from pathlib import Path
from torch.distributed.tensor import DTensor
from focusllm import TrainConfig, train
from focusllm.training.loop import Training

def run(self, report, original=Training.run):
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in self.module.parameters())
    share = held / sum(p.numel() for p in self.module.parameters())
    print(f"{type(self.module).__name__} holds {share:.0%} from step {self.step}")
    return original(self, report)

def interrupt(entry):
    if "loss" in entry and entry["step"] == 3:
        signal.raise_signal(signal.SIGINT)

Training.run = run
config = TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
with suppress(KeyboardInterrupt):
    train(config, sys.argv[2], report=interrupt)
train(config, sys.argv[2])
"""
FEW_LABELS = 8  # in a pack, and rows with one answer only: processes need unequal numbers of passes


def unequal(base: Path) -> dict[str, Any]:
    # In float32: what the order of a sum changes in the last digit of a weight, bfloat16 rounds to a thousandth.
    sources = [str(base / "text.txt"), str(base / "rows.jsonl")]
    return {**tiny(base), "dtype": "float32", "sources": sources, "labels_per_pass": FEW_LABELS}


WAYS = {
    "copies": ({}, "false", "DistributedDataParallel holds 100%"),
    "sharded by the settings": ({"sharded": True}, "false", "FSDPMemoryLoss holds 50%"),
    "sharded by the launch": ({"checkpointed": True}, "true", "FSDPMemoryLoss holds 50%"),
}


@pytest.fixture(scope="module")
def in_one_process(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FOCUSLLM_CACHE", str(output.parent / "cache"))
        train(TrainConfig.from_dict(unequal(base)), output)
    return output


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] if "settings" in way else []) for way in WAYS]
)
def test_two_processes_train_as_one(way: str, base: Path, in_one_process: Path, tmp_path: Path) -> None:
    """The same global batch shared out between two gloo processes, interrupted: the same losses, the same weights."""
    changes, launched_sharded, wrapped = WAYS[way]
    (tmp_path / "config.json").write_text(json.dumps({**unequal(base), **changes}))
    (tmp_path / "program.py").write_text(PROCESS)
    environment = {**os.environ, "FOCUSLLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_FSDP": launched_sharded, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "program.py"), str(tmp_path / "config.json"), str(tmp_path / "out")]
    # Processes that do not run the same passes wait for each other for ever.
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for step in (0, 3):
        assert result.stdout.count(f"{wrapped} from step {step}") == 2
    ours, expected = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "out", in_one_process)
    )
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in expected]
    for one, other in zip(ours, expected, strict=True):
        for name in {"evaluation", "without_memory"} & other.keys() or {"loss"}:
            found, wanted = (one[name], other[name]) if name != "loss" else (one, other)
            assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-5)
            assert found["labels"] == wanted["labels"]
        if "gradient_norm" in other:
            assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    first, second = weights(tmp_path / "out"), weights(in_one_process)
    assert {name: tensor.shape for name, tensor in first.items()} == {name: t.shape for name, t in second.items()}
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("way", ["dense", "checkpointed", "exact", "without memory"])
def test_agreed_passes_count_for_nothing_but_are_run(way: str, train_settings: Callable[..., TrainConfig]) -> None:
    """Whatever its samples are, a process that shares a model goes through it as often as is agreed."""
    supervision = "exact" if way == "exact" else "dense"
    model = with_candidates(build())
    module = MemoryLoss(
        model, train_settings(supervision=supervision, checkpointed=way == "checkpointed", labels_per_pass=4)
    )
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(way != "without memory")
    calls = {"forward": 0, "backward": 0}

    def count(what: str) -> None:
        calls[what] += 1

    model.model.layers[1].register_forward_hook(lambda *_: count("forward"))
    model.model.layers[1].register_full_backward_pre_hook(lambda *_: count("backward"))
    samples = [Sample(random_ids(20, 1), 5, 6), Sample(random_ids(2, 2), 1, 1), Sample(random_ids(30, 3), 1, 9)]
    found: dict[int, tuple[int, ...]] = {}
    for num_samples in (1, 2, 3):
        memory = Memory(np.array(random_ids(48)).reshape(3, 16), samples[-num_samples:], "here", slice(0, 3))
        natural = module.num_passes(memory.samples, way == "without memory")
        assert natural <= 3
        results = []
        for passes in (0, 3, 5):
            calls |= {"forward": 0, "backward": 0}
            losses, hits = module(memory, passes, way == "without memory")
            assert len(losses) == len(hits) == sum(module.sizes(memory.samples))
            if losses.requires_grad:
                losses.sum().backward()
                parts = [parameter.grad.flatten() for parameter in trainable_parameters(model).values()]
                model.zero_grad()
                results.append(torch.cat([losses.detach(), *parts]))
            else:
                results.append(losses)
            wanted = found.setdefault(max(passes, natural), tuple(calls.values()))
            assert tuple(calls.values()) == wanted
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-4)
    assert len(set(found.values())) == len(found) > 1


def test_a_batch_that_cannot_be_shared_out(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    from focusllm.training.loop import Training

    class Three:
        num_processes = 3

    model = build(max_position_embeddings=512)
    inject(model, AdapterConfig(rank=2))
    with pytest.raises(TrainingError, match="memories_per_step is 4, which cannot be shared out evenly among 3"):
        Training(train_settings(), model, None, None, tmp_path, accelerator=Three())
