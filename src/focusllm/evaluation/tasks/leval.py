"""L-Eval's multiple-choice tasks (arXiv 2307.11088: lectures, stories, listening tests) and its topics.

Files: `<task>.jsonl`, a document (input) a row with its questions (instructions) and answers (outputs).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from focusllm.evaluation.benchmark import Benchmark, Warn, prompts
from focusllm.evaluation.example import Example, Setting
from focusllm.training.config import Source


class LEval(Benchmark):
    """A task of L-Eval. Few examples are of many documents: the first question of each, then the second."""

    version = 2
    fields = {"input": str, "instructions": list, "outputs": list}  # noqa: RUF012

    def examples(self, length: int | None, limit: int, setting: Setting, warn: Warn | None = None) -> Iterator[Example]:
        """Chosen question by question; given document by document, so that each is read once."""
        every = list(super().examples(length, sys.maxsize, setting, warn))
        by_question = sorted(every, key=lambda example: int(example.id.split(".")[1]))
        chosen = {example.id for example in by_question[:limit]}
        yield from (example for example in every if example.id in chosen)

    def read(self, key: str, row: dict[str, Any]) -> Iterator[Example]:
        """One example a question."""
        for number, (asked, answer) in enumerate(zip(row["instructions"], row["outputs"], strict=True), 1):
            yield self.example(f"{key}.{number}", {"input": asked}, row["input"], [answer], meta={"document": key})


TASKS = tuple(
    LEval(
        f"leval-{name}",
        about,
        (f"leval/{name}.jsonl", f"LEval/Exam/{name}.jsonl", f"Closed-ended-tasks/{name}.jsonl", f"{name}.jsonl"),
        Source(f"hf:L4NLP/LEval/LEval/Exam/{name}.jsonl"),
    )
    for name, about in prompts("leval").items()
)
