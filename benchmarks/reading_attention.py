"""Reading in 2-byte types on a CPU: attention by plain products against the flash kernel, in turns on one model.

python benchmarks/reading_attention.py --chunks 8 --chunk-length 1024               # chunks, by blocks of queries
python benchmarks/reading_attention.py --chunks 8 --chunk-length 1024 --prompt 64   # a prompt behind the chunks
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch

from common import finish, sample_text
from focusllm import FocusLLM
from focusllm.documents.text import encode_text
from focusllm.method import attention
from focusllm.method.focus import encode_chunks, read_prompt

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--chunks", type=int, default=8)
parser.add_argument("--chunk-length", type=int, default=1024)
parser.add_argument("--prompt", type=int, help="read a prompt of so many tokens behind the chunks, not the chunks")
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained("smollm2-135m", dtype="bfloat16", weights="plain")
base, count = llm.model.base, arguments.chunks * arguments.chunk_length
ids = torch.tensor(encode_text(llm.tokenizer, sample_text()).token_ids[: count + (arguments.prompt or 0)])
chunks, prompt = ids[:count].view(arguments.chunks, -1), ids[count:]
read: partial[Any]
if arguments.prompt:
    read = partial(read_prompt, base, encode_chunks(base, chunks), prompt)
    setting, ways = "FEW_QUERIES_2_BYTES", {"products": attention.FEW_QUERIES_2_BYTES, "kernel": 0}
else:
    read = partial(encode_chunks, base, chunks)
    setting, ways = "QUERY_BLOCK", {"products": attention.QUERY_BLOCK, "kernel": count}
rounds = []
for number in range(arguments.rounds + 1):
    taken = {}
    for name, value in ways.items():
        setattr(attention, setting, value)
        start = time.perf_counter()
        with torch.no_grad():
            read()
        taken[name] = time.perf_counter() - start
    print(f"round {number}: products {taken['products']:.2f} s, kernel {taken['kernel']:.2f} s", flush=True)
    rounds.append(taken)
rounds = rounds[1:]  # the first warms up
result = {
    "tokens": arguments.chunks * arguments.prompt if arguments.prompt else count,
    "chunk_length": arguments.chunk_length,
    "prompt": arguments.prompt,
    "products_seconds": statistics.median(taken["products"] for taken in rounds),
    "kernel_seconds": statistics.median(taken["kernel"] for taken in rounds),
    "products_take": statistics.median(taken["products"] / taken["kernel"] for taken in rounds),
    "ratios": [taken["products"] / taken["kernel"] for taken in rounds],
}
name = f"prompt_{arguments.prompt}" if arguments.prompt else f"attention_{arguments.chunk_length}"
finish(f"reading_{name}", result)
