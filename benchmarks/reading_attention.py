"""Reading chunks by blocks of queries against the flash kernel, in turns on one model: seconds a batch.

python benchmarks/reading_attention.py --chunks 8 --chunk-length 1024
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from common import finish, sample_text
from focusllm import FocusLLM, attention
from focusllm.focus import encode_chunks
from focusllm.text import encode_text

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--chunks", type=int, default=8)
parser.add_argument("--chunk-length", type=int, default=1024)
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained("smollm2-135m", dtype="bfloat16", packed=False)
base, count = llm.model.base, arguments.chunks * arguments.chunk_length
ids = torch.tensor(encode_text(llm.tokenizer, sample_text()).token_ids[:count]).view(arguments.chunks, -1)
block, rounds = attention.QUERY_BLOCK, []
for number in range(arguments.rounds + 1):
    taken = {}
    for name, size in (("blocks", block), ("kernel", count)):  # no chunk is longer than a block of `count`
        attention.QUERY_BLOCK = size
        start = time.perf_counter()
        encode_chunks(base, ids)
        taken[name] = time.perf_counter() - start
    print(f"round {number}: blocks {taken['blocks']:.2f} s, kernel {taken['kernel']:.2f} s", flush=True)
    rounds.append(taken)
rounds = rounds[1:]  # the first warms up
result = {
    "tokens": count,
    "chunk_length": arguments.chunk_length,
    "blocks_seconds": statistics.median(taken["blocks"] for taken in rounds),
    "kernel_seconds": statistics.median(taken["kernel"] for taken in rounds),
    "blocks_take": statistics.median(taken["blocks"] / taken["kernel"] for taken in rounds),
    "ratios": [taken["blocks"] / taken["kernel"] for taken in rounds],
}
finish(f"reading_attention_{arguments.chunk_length}", result)
