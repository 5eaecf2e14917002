"""What the tests of training share: a tiny training's settings, and what a finished one has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TEXT = "".join(f"{i}. Call me Ishmael number {i * i}. Some years ago I went to sea.\n" for i in range(400))


def tiny(base: Path) -> dict[str, Any]:
    return {
        "sources": [str(base / "text.txt")],
        "model": str(base / "model"),
        "rank": 4,
        "chunk_lengths": [32, 64],
        "memory_lengths": [128],
        "local_lengths": [16],
        "prompt_lengths": [8],
        "answer_length": 8,
        "samples_per_memory": 3,
        "memories_per_step": 4,
        "steps": 6,
        "warmup_steps": 2,
        "evaluate_every": 3,
        "evaluation_memories": 3,
        "save_every": 2,
        "objectives": {"repetition": 0.5, "continuation": 0.2, "facts": 0.3},
    }


def losses(output: Path) -> list[tuple[Any, ...]]:
    """What the log says, without times."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(line["step"], *sorted((k, str(v)) for k, v in line.items() if k != "seconds")) for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")
