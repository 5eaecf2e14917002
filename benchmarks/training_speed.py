"""Dense supervision against the paper's training step, in turns in one run: supervised tokens a second, and memory.

    python benchmarks/training_speed.py --tokens 4096

The paper's step supervises one token of a sequence, and its gradient goes through the whole row [chunk | prompt |
candidate], of which only the last token needs it. Ours encodes the memory once without a graph and supervises all
answer tokens of several samples. Same model, sequence length, type, threads. Each side's peak memory is measured in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import finish, sample_text
from focusllm import AdapterConfig, inject
from focusllm.documents.text import encode_text
from focusllm.huggingface.embedded import resolve_model
from focusllm.memory.cost import peak_memory
from focusllm.method.adapter import trainable_parameters
from focusllm.method.base import run
from focusllm.method.focus import Over, encode_chunks, local_pass, to_slots
from focusllm.method.kv import Segment
from focusllm.training.dense import Sample, dense_loss


def paper_step(model: nn.Module, chunks: Tensor, prompt: Tensor, local: Tensor) -> int:
    """One label: the token behind the local context. Rows are read as a whole, with a graph."""
    rows, length = chunks.shape[0], chunks.shape[1] + len(prompt)
    row = torch.cat([chunks, prompt.expand(rows, -1)], 1)
    attention = Over()
    run(model, row, torch.arange(length)[None], attention, candidates=slice(length - 1, length))
    candidates = to_slots(model, attention.kv.tokens(-1), torch.full((rows,), length - 1))
    logits = local_pass(model, local[None, :-1], torch.tensor([rows]), [Segment([candidates])])[0]
    F.cross_entropy(logits[0, -1].float(), local[-1]).backward()  # type: ignore[no-untyped-call]
    return 1


def dense_step(model: nn.Module, chunks: Tensor, samples: list[Sample], checkpointed: bool) -> int:
    """All labels of some samples over the same chunks."""
    losses, _ = dense_loss(model, encode_chunks(model, chunks), samples, checkpointed)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    return len(losses)


def main() -> None:
    """Take turns, then measure memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of memory and local context together")
    parser.add_argument("--chunk-length", type=int, default=512)
    parser.add_argument("--local-length", type=int, default=512)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="of the dense step")
    parser.add_argument("--answer-length", type=int, default=64)
    parser.add_argument("--sample-context", type=int, default=64, help="local tokens before a sample's answer")
    parser.add_argument("--checkpointed", action="store_true", help="the dense step recomputes its passes")
    parser.add_argument("--name", help="of the result file; default: training_speed_DTYPE")
    parser.add_argument("--rank", type=int, default=64, help="0: full copies, as in the paper")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["paper", "dense"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    path = resolve_model("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, arguments.dtype)).eval()
    model.requires_grad_(False)
    inject(model, AdapterConfig(rank=arguments.rank or None), torch.float32)
    model.requires_grad_(False)
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(True)
    ids = encode_text(AutoTokenizer.from_pretrained(path), sample_text()).token_ids[: arguments.tokens + 1]
    count = (arguments.tokens - arguments.local_length) // arguments.chunk_length * arguments.chunk_length
    far, local = torch.tensor(ids[:count]), torch.tensor(ids[count:])
    chunks = far.view(-1, arguments.chunk_length)
    size = arguments.sample_context + arguments.answer_length
    samples = [
        Sample(ids[start : start + size], arguments.answer_length, arguments.prompt_length)
        for start in range(0, arguments.samples * size, size)
    ]
    steps = {
        "paper": lambda: paper_step(model, chunks, local[-arguments.prompt_length - 1 : -1], local),
        "dense": lambda: dense_step(model, chunks, samples, arguments.checkpointed),
    }
    if arguments.only:
        before = peak_memory(model.device)
        steps[arguments.only]()
        print(json.dumps({"before": before, "peak": peak_memory(model.device)}))
        return
    rates: dict[str, list[float]] = {"paper": [], "dense": []}
    for turn in range(arguments.rounds + 1):  # the first one warms up
        for name, step in steps.items():
            start = time.perf_counter()
            labels = step()
            seconds = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
            print(f"{name}: {labels} labels in {seconds:.2f} s")
            if turn:
                rates[name].append(labels / seconds)
    peaks = {name: measured_alone(name) for name in steps}
    ratios = [dense / paper for dense, paper in zip(rates["dense"], rates["paper"], strict=True)]
    extra = {name: found["peak"] - found["before"] for name, found in peaks.items()}
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(arguments).items() if name != "only"},
        "labels_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_bytes": {name: found["peak"] for name, found in peaks.items()},
        "bytes_above_the_loaded_model": extra,
        "memory_ratio": peaks["dense"]["peak"] / peaks["paper"]["peak"],
    }
    print(f"{result['ratio']:.0f} times the labels a second, {result['memory_ratio']:.2f} times the peak memory")
    finish(arguments.name or f"training_speed_{arguments.dtype}", result)


def measured_alone(name: str) -> dict[str, int]:
    """Peak memory of one step in a fresh process."""
    out = subprocess.run([sys.executable, *sys.argv, "--only", name], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(out.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
