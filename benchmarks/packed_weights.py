"""Decoding with packed weights against the general kernels, in turns on one model: time a token, and memory.

python benchmarks/packed_weights.py --tokens 16384 --dtype bfloat16

One request with the default settings; the same forced tokens in every turn; a turn's median counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from common import finish, sample_text
from focusllm import FocusLLM
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.documents.text import encode_text
from focusllm.memory.chunking import split
from focusllm.memory.chunks import encode
from focusllm.method.packed import pack, unpack

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--tokens", type=int, default=16384)
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--new-tokens", type=int, default=24, help="forced tokens of a turn")
parser.add_argument("--rounds", type=int, default=4)
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained("smollm2-135m", dtype=arguments.dtype, weights="plain")
base, config = llm.model.base, llm.config
ids = encode_text(llm.tokenizer, sample_text()).token_ids
far, local = split(ids[: arguments.tokens], config)
blocks = encode(base, far, config)
forced = ids[arguments.tokens : arguments.tokens + arguments.new_tokens]


@torch.no_grad()
def seconds_a_token() -> float:
    """Median over forced tokens of a new request."""
    request = start_request(base, blocks, local, config)
    prefill(base, request, config)
    times = []
    for token in forced:
        start = time.perf_counter()
        decode(base, [request], [token], config)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


rounds, copies = [], 0
for number in range(arguments.rounds + 1):
    copies = pack(base)
    packed = seconds_a_token()
    unpack(base)
    rounds.append({"packed": packed, "general": seconds_a_token()})
    print(f"round {number}: packed {packed * 1e3:.0f} ms, general {rounds[-1]['general'] * 1e3:.0f} ms", flush=True)
rounds = rounds[1:]  # the first warms up

result = {
    "dtype": arguments.dtype,
    "tokens": len(far) + len(local),
    "config": config.to_dict(),
    "packed_seconds_a_token": statistics.median(r["packed"] for r in rounds),
    "general_seconds_a_token": statistics.median(r["general"] for r in rounds),
    "packed_takes": statistics.median(r["packed"] / r["general"] for r in rounds),
    "ratios": [r["packed"] / r["general"] for r in rounds],
    "bytes_of_copies": copies,
}
finish(f"packed_weights_{arguments.tokens}_{arguments.dtype}", result)
