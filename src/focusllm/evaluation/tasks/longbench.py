"""LongBench v1 (21 tasks, arXiv 2308.14508) and v2 (multiple choice, arXiv 2412.15204).

Files: `<task>.jsonl` with input, context, answers, all_classes; v2: `data.json` with question, choice_A to choice_D,
answer, context. Few-shot and code tasks go without a chat template; few-shot answers are their first line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from focusllm.evaluation.benchmark import Benchmark, prompts
from focusllm.evaluation.example import Example
from focusllm.training.config import Source


class LongBench(Benchmark):
    """A task of v1. Score: the best over the references."""

    fields = {"input": str, "context": str, "answers": list}  # noqa: RUF012

    def read(self, key: str, row: dict[str, Any]) -> Iterator[Example]:
        """One example a row."""
        classes = tuple(row.get("all_classes") or ())
        if self.metric == "classification" and not classes:
            raise ValueError("it has no all_classes")
        yield self.example(key, row, row["context"], row["answers"], choices=classes)

    def score(self, prediction: str, example: Example) -> float:
        """As the original scores: few-shot answers by their first line."""
        if self.about.get("first_line"):
            prediction = prediction.lstrip("\n").split("\n")[0]
        return super().score(prediction, example)


class LongBenchV2(Benchmark):
    """v2. Score: whether "The correct answer is (X)" names the right X."""

    fields = dict.fromkeys(("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer"), str)

    def read(self, key: str, row: dict[str, Any]) -> Iterator[Example]:
        """One example a row, with its domain, difficulty and class of length."""
        values = {name: row[name].strip() for name in self.fields}
        meta = {name: row[name] for name in ("domain", "difficulty", "length") if name in row}
        yield self.example(key, values, values["context"], [row["answer"]], meta=meta)


TASKS = (
    *(
        LongBench(
            f"longbench-{name}",
            about,
            (f"longbench/{name}.jsonl", f"longbench/data/{name}.jsonl", f"{name}.jsonl"),
            Source(f"hf:zai-org/LongBench/data.zip/data/{name}.jsonl"),
        )
        for name, about in prompts("longbench").items()
    ),
    LongBenchV2(
        "longbench-v2",
        prompts("longbench_v2"),
        ("longbench_v2/data.json", "data.json"),
        Source("hf:zai-org/LongBench-v2"),
    ),
)
