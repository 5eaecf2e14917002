"""`cached` against `exact` decoding on the same text in one run: speed, agreement of greedy tokens, perplexity.

    python benchmarks/decoding_modes.py --tokens 16384 --chunk-length 2048 --local-length 2048 [--dtype float32]

The two modes take turns (one round each, several times); the quoted ratio is the median of the rounds' ratios.
Agreement: greedy tokens after the same forced text. Perplexity: the same tokens, teacher-forced, in both modes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch

from common import finish, sample_text
from focusllm import FocusLLM
from focusllm.decoding.engine import Request, decode, prefill, start_request
from focusllm.documents.text import encode_text
from focusllm.memory.chunking import split
from focusllm.memory.chunks import encode

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--tokens", type=int, default=16384)
parser.add_argument("--chunk-length", type=int, default=2048)
parser.add_argument("--local-length", type=int, default=2048)
parser.add_argument("--prompt-length", type=int, default=64)
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--scored", type=int, default=64, help="tokens for agreement and perplexity")
parser.add_argument("--text", type=Path, help="a text file instead of the sample")
parser.add_argument("--adapter", help="candidate projections")
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained(
    "smollm2-135m",
    adapter=arguments.adapter,
    dtype=arguments.dtype,
    chunk_length=arguments.chunk_length,
    local_length=arguments.local_length,
    prompt_length=arguments.prompt_length,
)
text = arguments.text.read_text() if arguments.text else sample_text()
ids = encode_text(llm.tokenizer, text).token_ids[: arguments.tokens + arguments.scored]
given, scored = ids[: arguments.tokens], ids[arguments.tokens :]
far, local = split(given, llm.config)
base = llm.model.base
blocks = encode(base, far, llm.config)
configs = {mode: llm.config.replace(decoding=mode) for mode in ("cached", "exact")}


def begin(mode: str) -> tuple[Request, torch.Tensor]:
    """A request that has read everything, and its next-token logits."""
    request = start_request(base, blocks, local, configs[mode])
    return request, prefill(base, request, configs[mode])[-1]


def seconds_a_token(mode: str, request: Request, count: int) -> float:
    """Forced tokens, so that both modes do the same work."""
    forced = scored[:count]
    start = time.perf_counter()
    for token in forced:
        decode(base, [request], [token], configs[mode])
    return (time.perf_counter() - start) / len(forced)


rounds = []
for number in range(arguments.rounds + 1):
    both = {mode: seconds_a_token(mode, begin(mode)[0], 16 if mode == "cached" else 3) for mode in configs}
    if number:  # the first round warms up
        rounds.append(both)
        print(
            f"round {number}: cached {both['cached'] * 1e3:.0f} ms, exact {both['exact'] * 1e3:.0f} ms a token",
            flush=True,
        )

losses = dict.fromkeys(configs, 0.0)
agreed = 0
requests = {mode: begin(mode) for mode in configs}
for token in scored:
    picks = set()
    for mode, (request, logits) in requests.items():
        losses[mode] -= logits.float().log_softmax(-1)[token].item()
        picks.add(int(logits.argmax()))
        requests[mode] = request, decode(base, [request], [token], configs[mode])[0]
    agreed += len(picks) == 1

result = {
    "dtype": arguments.dtype,
    "tokens": len(given),
    "chunks": sum(block.num_chunks for block in blocks),
    "config": llm.config.to_dict(),
    "adapter": arguments.adapter or "the one in the package",
    "cached_seconds_a_token": statistics.median(r["cached"] for r in rounds),
    "exact_seconds_a_token": statistics.median(r["exact"] for r in rounds),
    "cached_is_faster_by": statistics.median(r["exact"] / r["cached"] for r in rounds),
    "ratios": [r["exact"] / r["cached"] for r in rounds],
    "scored_tokens": len(scored),
    "greedy_agreement": agreed / len(scored),
    "perplexity_cached": math.exp(losses["cached"] / len(scored)),
    "perplexity_exact": math.exp(losses["exact"] / len(scored)),
}
for name, value in result.items():
    print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
finish(f"decoding_modes_{arguments.tokens}_{arguments.dtype}", result)
