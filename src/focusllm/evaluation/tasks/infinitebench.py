"""InfiniteBench (12 tasks beyond 100K tokens, arXiv 2402.13718), in its prompts for models with open weights.

Files: `<task>.jsonl` with context, input, answer and, in two tasks, options. The answer is one value or a list, which
in some copies of math_calc is inside another one. Prompts go without a chat template, and most end with the answer's
beginning, as the answer lengths want it (6 tokens for a passkey).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from focusllm.evaluation.benchmark import Benchmark, prompts
from focusllm.evaluation.example import Example
from focusllm.evaluation.metrics import LETTERS
from focusllm.training.config import Source


class InfiniteBench(Benchmark):
    """A task of InfiniteBench."""

    version = 3
    fields = {"context": str, "input": str, "answer": (str, int, float, list)}  # noqa: RUF012

    def read(self, key: str, row: dict[str, Any]) -> Iterator[Example]:
        """One example a row; what some prompts name besides the input is taken from it."""
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if answers and isinstance(answers[0], list):
            answers = answers[0]
        values, options = {"input": row["input"]}, row.get("options") or []
        if "{option_A}" in self.about["prompt"]:
            values |= {f"option_{letter}": options[i] for i, letter in enumerate(LETTERS)}
            answers = [answers[0], LETTERS[options.index(answers[0])]]
        if "{func_call}" in self.about["prompt"]:
            values["func_call"] = re.findall(r"func_[0-9]+\(-?[0-9]+\)", row["input"])[0]
            values["func"] = values["func_call"].split("(")[0]
        if "{prefix}" in self.about["prompt"]:
            target = re.findall(r"The .+ of", row["input"])[0].lower()[:-3]
            values["prefix"] = f"What is {target} in the following list?"
        yield self.example(key, values, row["context"], answers)


TASKS = tuple(
    InfiniteBench(
        f"infinitebench-{name}",
        about,
        (f"infinitebench/{name}.jsonl", f"InfiniteBench/{name}.jsonl", f"{name}.jsonl"),
        Source(f"hf:xinrongzhang2022/InfiniteBench/{name}.jsonl"),
    )
    for name, about in prompts("infinitebench").items()
)
