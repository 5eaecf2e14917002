"""Weights in 8 bits against the model's own, in turns on one model: speed, perplexity, answers.

python benchmarks/int8_weights.py BOOK ... --model qwen2.5-coder-0.5b

Speed: a chunk read, a token of one request, a token of eight requests at once; the best of all turns counts.
Perplexity: of each book some tokens are read as a chunk, and those behind it scored as decoding computes them, a few at
a time. Answers: made-up facts, each asked for with its own sentence in front of the question.
With --threads 1, seconds are those of the processor, so that other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import finish
from focusllm import FocusLLM
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.documents.text import encode_ids, frame_question
from focusllm.memory.chunks import encode
from focusllm.method.focus import encode_chunks, local_pass
from focusllm.method.int8 import FEW_TOKENS, has_dot_products
from focusllm.method.kv import Segment, concat
from focusllm.method.packed import pack

PEOPLE = ("Tobias Marrow", "Ottilie Vance", "Silas Quill", "Rosalind Crane", "Barnaby Yarrow", "Philippa Zeller")
THINGS = ("spyglass", "sabre", "cello", "brooch", "diary", "pistol", "chalice", "sextant")
PLACES = ("windmill", "altar", "barrel", "hutch", "portrait", "saddlebag", "washroom", "shed", "drawer", "bridge")

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("books", type=Path, nargs="+", help="texts that nothing was trained on")
parser.add_argument("--model", default="qwen2.5-coder-0.5b")
parser.add_argument("--dtype", default="auto")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=4, help="of the speed; 0: not measured")
parser.add_argument("--chunk", type=int, default=1024, help="tokens that are read at once")
parser.add_argument("--context", type=int, default=256, help="of perplexity: tokens in front of the scored ones")
parser.add_argument("--scored", type=int, default=256, help="of perplexity: tokens of each book; 0: not measured")
parser.add_argument("--cases", type=int, default=40, help="of answers")
parser.add_argument("--output", default="int8_weights")
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
torch.set_grad_enabled(False)

llm = FocusLLM.from_pretrained(
    arguments.model, dtype=arguments.dtype, weights="plain", adapter="none", far_context="opened"
)
base, config = llm.model.base, llm.model.settings
tokens_of = [encode_ids(llm.tokenizer, book.read_text(errors="ignore")[20000:60000]) for book in arguments.books]
clock = time.process_time if arguments.threads == 1 else time.perf_counter
KINDS = ("plain", "packed", "int8")


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    start = clock()
    function()
    return clock() - start


def speed() -> dict[str, dict[str, float]]:
    """Best seconds of a chunk, a token, and eight tokens at once, with each kind of weights."""
    chunk = torch.tensor([tokens_of[0][: arguments.chunk]])
    blocks = encode(base, tokens_of[0][:64], config, heads=llm.model.lookup_heads)
    requests = [start_request(base, blocks, tokens_of[0][:64], config, 64) for _ in range(8)]
    for request in requests:
        prefill(base, request, config)
    what = {
        "read": (1, lambda: encode_chunks(base, chunk)),
        "token": (4, lambda: decode(base, requests[:1], [100], config)),
        "eight": (3, lambda: decode(base, requests, [100] * 8, config)),
    }
    best = {kind: dict.fromkeys(what, math.inf) for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            pack(base, kind)
            for name, (times, function) in what.items():
                best[kind][name] = min([best[kind][name], *(seconds(function) for _ in range(times))])
            print(kind, {name: f"{value:.3f}" for name, value in best[kind].items()}, flush=True)
    return best


def losses() -> torch.Tensor:
    """In nats, of every scored token."""
    found = []
    for ids in tokens_of:
        kv, stop = encode_chunks(base, torch.tensor([ids[: arguments.context]])), arguments.context + arguments.scored
        for first in range(arguments.context, stop, FEW_TOKENS):
            few = torch.tensor([ids[first : first + FEW_TOKENS]])
            logits, new, _ = local_pass(base, few, torch.tensor([first]), [Segment([kv])], 0)
            wanted = torch.tensor(ids[first + 1 : first + 1 + FEW_TOKENS])
            found.append(torch.nn.functional.cross_entropy(logits[0].float(), wanted, reduction="none"))
            kv = concat([kv, new], 2)
    return torch.cat(found)


def right() -> list[bool]:
    """Whether the place is in the answer, for every made-up fact."""
    rng, found = np.random.default_rng(0), []
    for _ in range(arguments.cases):
        who, thing, place, other = (str(rng.choice(names)) for names in (PEOPLE, THINGS, PLACES, PEOPLE))
        head, local = frame_question(llm.tokenizer, f"Where is the {thing} of {who}?")
        passage = encode_ids(llm.tokenizer, f"{who} put the {thing} behind the {place}. {other} saw nothing.\n\n")
        kv, made = encode_chunks(base, torch.tensor([[*head, *passage]])), list[int]()
        for _ in range(12):
            logits, new, _ = local_pass(base, torch.tensor([local]), torch.tensor([kv.length]), [Segment([kv])])
            local = [int(logits[0, -1].argmax())]
            made, kv = [*made, *local], concat([kv, new], 2)
        found.append(place in llm.tokenizer.decode(made).lower())
    return found


result: dict[str, object] = {
    "model": arguments.model,
    "dtype": str(base.dtype).removeprefix("torch."),
    "dot_products": has_dot_products(),
    "load_before": os.getloadavg(),
    "clock": clock.__name__,
}
if arguments.rounds:
    best = speed()
    ratios = {name: min(best["plain"][name], best["packed"][name]) / best["int8"][name] for name in best["plain"]}
    eight = {kind: 8 * best[kind]["token"] / best[kind]["eight"] for kind in KINDS}
    result |= {"seconds": best, "best_float_over_int8": ratios, "tokens_of_eight_over_one": eight}
if arguments.scored:
    by_kind = {}
    for kind in ("plain", "int8"):
        pack(base, kind)
        by_kind[kind] = losses()
        print(kind, f"{by_kind[kind].mean().item():.4f} nats", flush=True)
    more = by_kind["int8"] - by_kind["plain"]
    result |= {"scored": len(more), "nats": {kind: found.mean().item() for kind, found in by_kind.items()}}
    result |= {"nats_more": more.mean().item(), "standard_error": (more.std() / len(more) ** 0.5).item()}
    result["perplexity_over_plain"] = math.exp(more.mean().item())
if arguments.cases:
    answers = {}
    for kind in ("plain", "int8"):
        pack(base, kind)
        answers[kind] = right()
        print(kind, sum(answers[kind]), "right", flush=True)
    result |= {"cases": arguments.cases, "right": {kind: sum(found) for kind, found in answers.items()}}
    result["same"] = sum(a == b for a, b in zip(*answers.values(), strict=True))
finish(arguments.output, {**result, "load_after": os.getloadavg()})
