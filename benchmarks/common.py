"""What the benchmark programs share: the embedded model, the sample text, and where results go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from focusllm.info import machine

RESULTS = Path(__file__).parent / "results"


def sample_text() -> str:
    """The Python language reference, about 110,000 tokens."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def finish(name: str, result: dict[str, Any]) -> None:
    """Keep a result with the command that made it, and print it as the last line."""
    result = {"command": " ".join(["python", *sys.orig_argv[1:]]), "machine": machine(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
