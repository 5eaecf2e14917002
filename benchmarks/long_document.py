"""Read a document of 110K tokens, ask it twice: seconds, peak memory, and how much sooner the second answer starts.

python benchmarks/long_document.py [--dtype bfloat16]
"""

from __future__ import annotations

import argparse

from common import finish, sample_text
from focusllm import FocusLLM
from focusllm.cost import estimate, peak_memory

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--new-tokens", type=int, default=32)
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained("smollm2-135m", dtype=arguments.dtype)
document = llm.read(sample_text(), name="Python language reference", progress=True)
answers = [
    llm.ask(document, question, max_new_tokens=arguments.new_tokens, min_new_tokens=arguments.new_tokens)
    for question in ("What does the with statement do?", "How are default values of parameters evaluated?")
]
first = document.read_seconds + answers[0].time_to_first_token
second = answers[1].time_to_first_token
cost = estimate(llm.model.base, llm.config, document.num_tokens, arguments.new_tokens)
result = {
    "dtype": arguments.dtype,
    "config": llm.config.to_dict(),
    "tokens": document.num_tokens,
    "read_seconds": document.read_seconds,
    "first_question_first_token_seconds": first,
    "second_question_first_token_seconds": second,
    "second_starts_sooner_by": first / second,
    "read_and_answered_seconds": document.read_seconds + answers[0].seconds,
    "tokens_per_second": answers[1].tokens_per_second,
    "peak_memory_gib": peak_memory(llm.model.device) / 2**30,
    "estimated_memory_gib": cost.total / 2**30,
}
for name, value in result.items():
    print(f"{name:36} {value:.2f}" if isinstance(value, float) else f"{name:36} {value}")
finish(f"long_document_{arguments.dtype}", result)
