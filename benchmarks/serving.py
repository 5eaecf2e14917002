"""Requests together and one after another, and what a long read costs those who decode; one model, no HTTP.

    python benchmarks/serving.py --together 8 --context 4000 --tokens 32 --long 20000

Every request has a text of its own; times of decoding begin when all are read. In turns, a round behind another.
"""

from __future__ import annotations

import argparse
import statistics
import time

from common import finish, sample_text
from focusllm import FocusLLM
from focusllm.documents.text import encode_text
from focusllm.serving.job import Event, Job, Prompt
from focusllm.serving.sampling import Sampling
from focusllm.serving.worker import Worker

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--far-context", default="opened")
parser.add_argument("--together", type=int, default=8)
parser.add_argument("--context", type=int, default=4000, help="tokens of each request's text")
parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
parser.add_argument("--long", type=int, default=20_000, help="tokens of the text that is read beside an answer")
parser.add_argument("--rounds", type=int, default=3)
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained(arguments.model, far_context=arguments.far_context)
text = encode_text(llm.tokenizer, sample_text()).token_ids
worker = Worker(llm.model, llm.tokenizer)


def job(first: int, length: int, num_tokens: int) -> Job:
    """A request about a part of the text."""
    told: list[Event] = []
    prompt = Prompt.of(text[first : first + length], worker.config)
    return Job(prompt, Sampling(max_tokens=num_tokens, ignore_eos=True), told.append)


def decode(jobs: list[Job]) -> float:
    """Seconds until all are answered, from when all are read."""
    for one in jobs:
        worker.submit(one)
    while worker.scheduler.waiting or worker.scheduler.reading:
        worker.step()
    made, start = sum(one.num_generated for one in jobs), time.perf_counter()
    while worker.step():
        pass
    seconds, count = time.perf_counter() - start, sum(one.num_generated for one in jobs) - made
    return seconds / count


def begun(num_tokens: int) -> Job:
    """A request that is being answered."""
    found = job(0, arguments.context, num_tokens)
    worker.submit(found)
    while not found.num_generated:
        worker.step()
    return found


def gaps(answered: Job, reads: Job | None) -> list[float]:
    """Seconds between the tokens of an answer, until it is complete or another one is read."""
    found, before, count = [], time.perf_counter(), answered.num_generated
    while worker.step() and (reads is None or reads in worker.scheduler.reading):
        if answered.num_generated > count:
            now, count = time.perf_counter(), answered.num_generated
            found.append(now - before)
            before = now
    return found


rounds = []
for number in range(arguments.rounds + 1):
    parts = [(number + i) * arguments.context for i in range(arguments.together)]
    jobs = [[job(first, arguments.context, arguments.tokens) for first in parts] for _ in range(2)]
    one_by_one = statistics.mean(decode([one]) for one in jobs[0])
    together = decode(jobs[1])
    alone = gaps(begun(2 * arguments.tokens), None)
    answered = begun(100_000)
    worker.chunks.make_room(0)  # so that the long text is read, whatever was before
    long_one = job(0, arguments.long, 1)
    worker.submit(long_one)
    worker.step()
    beside = gaps(answered, long_one)
    for one in (answered, long_one):
        one.cancel()
    worker.step()
    taken = {
        "one_by_one": one_by_one,
        "together": together,
        "gap_alone": statistics.mean(alone),
        "gap_beside_a_read": statistics.mean(beside),
        "longest_gap_beside_a_read": max(beside),
    }
    print(f"round {number}: " + ", ".join(f"{name} {value:.3f} s" for name, value in taken.items()), flush=True)
    rounds.append(taken)
rounds = rounds[1:]  # the first warms up
result = {
    "model": arguments.model,
    "far_context": arguments.far_context,
    "together": arguments.together,
    "context": arguments.context,
    "tokens": arguments.tokens,
    "long": arguments.long,
    "chunk_length": worker.config.chunk_length,
    "seconds_a_token": {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]},
    "times_the_tokens_a_second": statistics.median(taken["one_by_one"] / taken["together"] for taken in rounds),
    "times_the_gap_beside_a_read": statistics.median(t["gap_beside_a_read"] / t["gap_alone"] for t in rounds),
    "rounds": rounds,
}
finish(f"serving_{arguments.model}_{arguments.far_context}", result)
