"""Reading the same chunks, so many at once, in turns on one model: seconds for all of them.

    python benchmarks/reading_batches.py --chunks 8 --at-once 1 2 4 8

More at once means fewer, larger matrix products; fewer at once means that what is between them stays in the caches.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from common import finish, sample_text
from focusllm import FocusLLM
from focusllm.documents.text import encode_text
from focusllm.method.focus import encode_chunks

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--chunks", type=int, default=8)
parser.add_argument("--chunk-length", type=int, default=1024)
parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8])
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained("smollm2-135m", dtype=arguments.dtype, weights="plain")
base, count = llm.model.base, arguments.chunks * arguments.chunk_length
ids = torch.tensor(encode_text(llm.tokenizer, sample_text()).token_ids[:count]).view(arguments.chunks, -1)
rounds = []
for number in range(arguments.rounds + 1):
    taken = {}
    for at_once in arguments.at_once:
        start = time.perf_counter()
        for batch in ids.split(at_once):
            encode_chunks(base, batch)
        taken[at_once] = time.perf_counter() - start
    print(f"round {number}: " + ", ".join(f"{k} at once {v:.2f} s" for k, v in taken.items()), flush=True)
    rounds.append(taken)
rounds = rounds[1:]  # the first warms up
most = max(arguments.at_once)
result = {
    "tokens": count,
    "chunk_length": arguments.chunk_length,
    "dtype": arguments.dtype,
    "seconds": {n: statistics.median(taken[n] for taken in rounds) for n in arguments.at_once},
    f"of_the_time_of_{most}": {n: statistics.median(t[n] / t[most] for t in rounds) for n in arguments.at_once},
    "rounds": rounds,
}
finish(f"reading_batches_{arguments.chunk_length}_{arguments.dtype}", result)
