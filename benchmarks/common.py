"""What the benchmark programs share: where results go."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from focusllm.bench.plan import sample_text
from focusllm.files import whole_file
from focusllm.machine import machine

__all__ = ["earlier", "finish", "sample_text"]

RESULTS = Path(__file__).parent / "results"


def finish(name: str, result: dict[str, Any], quiet: bool = False, device: torch.device | None = None) -> None:
    """Keep a result with the command that made it, and print it as the last line (unless quiet).

    Args:
        device: where it was computed; None: on the CPU.
    """
    given = (Path(part).name if Path(part).is_absolute() else part for part in sys.orig_argv[1:])  # whoever's folders
    result = {"command": shlex.join(["python", *given]), "machine": machine(device), **result}
    RESULTS.mkdir(exist_ok=True)
    with whole_file(RESULTS / f"{name}.json") as temporary:  # other programs may read it meanwhile
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    if not quiet:
        print(json.dumps(result))


def earlier(name: str) -> dict[str, Any]:
    """A kept result; empty if there is none."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
