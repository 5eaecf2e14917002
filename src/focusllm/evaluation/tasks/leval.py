"""L-Eval's tasks with exact answers (arXiv 2307.11088): lectures, stories and listening tests with options, and topics.

Files: `<task>.jsonl`, a document (input) a row with its questions (instructions) and answers (outputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from focusllm.evaluation.benchmark import Benchmark, prompts
from focusllm.evaluation.example import Example
from focusllm.training.config import Source


class LEval(Benchmark):
    """A task of L-Eval."""

    fields = {"input": str, "instructions": list, "outputs": list}  # noqa: RUF012

    def read(self, key: str, row: dict[str, Any]) -> Iterator[Example]:
        """One example a question."""
        for number, (asked, answer) in enumerate(zip(row["instructions"], row["outputs"], strict=True), 1):
            yield self.example(f"{key}.{number}", {"input": asked}, row["input"], [answer])


TASKS = tuple(
    LEval(
        f"leval-{name}",
        about,
        (f"leval/{name}.jsonl", f"LEval/Exam/{name}.jsonl", f"Closed-ended-tasks/{name}.jsonl", f"{name}.jsonl"),
        Source("hf:L4NLP/LEval", subset=name, split="test"),
    )
    for name, about in prompts("leval").items()
)
