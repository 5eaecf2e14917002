"""What opened chunks cost: a token and a second question beside condensed chunks, and a million tokens on disk.

python benchmarks/opened_speed.py BOOK STORE --output opened_speed

A part of a book is read once, into STORE, and opened from there so many times over as make up the length: each time is
a document of its own, with look-up keys and files of its own, so that time and memory are those of so many tokens;
what the operating system keeps of the files is not (--cold empties that before every question, which takes root).
Ways take turns, so that ratios are of one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from common import earlier, finish
from focusllm import Document, FocusLLM
from focusllm.documents.text import encode_ids
from focusllm.machine import forget_peak_resident, peak_resident
from focusllm.memory.cost import estimate

QUESTIONS = (
    "What is the name of the ship?",
    "Who is the captain?",
    "Where does the story begin?",
    "Who tells the story?",
)

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("book", type=Path)
parser.add_argument("store", type=Path, help="a folder for what was read")
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--tokens", type=int, default=32_768, help="that are read")
parser.add_argument("--times", type=int, nargs="*", default=[4, 32], help="how often they are opened")
parser.add_argument("--condensed-to", type=int, default=4, help="most times at which condensed chunks are asked too")
parser.add_argument("--new-tokens", type=int, default=24)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--dtype", default="auto")
parser.add_argument("--weights", default="auto")
parser.add_argument("--cold", action="store_true")
parser.add_argument("--output", default="opened_speed")
arguments = parser.parse_args()

WAYS = {"opened": {"far_context": "opened"}, "four opened": {"far_context": "opened", "open_tokens": 4096}}
WAYS |= {"condensed": {"far_context": "condensed"}}


def documents(llm: FocusLLM, ids: list[int], times: int) -> list[Document]:
    """The same text so many times over, from its files."""
    return [llm.read(ids, name=f"part {n}", store=arguments.store) for n in range(times)]


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def turn(llm: FocusLLM, read: list[Document], question: str) -> dict[str, float]:
    """A question, and what it took."""
    gc.collect()
    if arguments.cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    before = bytes_read()
    answer = llm.ask(read, question, max_new_tokens=arguments.new_tokens, min_new_tokens=arguments.new_tokens)
    return {
        "first_token_seconds": answer.time_to_first_token,
        "seconds_per_token": 1 / answer.tokens_per_second,
        "bytes_read": bytes_read() - before,
    }


def spread(turns: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most."""
    found = {name: [one[name] for one in turns] for name in turns[0]}
    return {name: {"median": median(all_), "min": min(all_), "max": max(all_)} for name, all_ in found.items()}


def loaded(way: str) -> FocusLLM:
    """The model with these settings."""
    return FocusLLM.from_pretrained(arguments.model, dtype=arguments.dtype, weights=arguments.weights, **WAYS[way])


def in_turns(models: dict[str, FocusLLM], ids: list[int], times: int) -> dict[str, object]:
    """All ways at one length."""
    read = {}
    for way, llm in models.items():
        if times <= arguments.condensed_to or llm.model.settings.is_opened:
            began = time.perf_counter()
            read[way] = documents(llm, ids, times)
            print(f"{way}, {times} times: opened in {time.perf_counter() - began:.1f} s", flush=True)
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in read}
    for number in range(arguments.rounds + 1):
        for way, kept in read.items():
            forget_peak_resident()
            one = turn(models[way], kept, QUESTIONS[number % len(QUESTIONS)]) | {"peak_bytes": peak_resident()}
            print(times, way, json.dumps(one), flush=True)
            if number:  # the first question warms up, and is not counted
                turns[way].append(one)
    return {way: spread(of_way) for way, of_way in turns.items()}


def main() -> None:
    """Measure, and keep what was measured."""
    first = loaded("opened")
    ids = encode_ids(first.tokenizer, arguments.book.read_text(encoding="utf-8"))[: arguments.tokens]
    done: dict[str, object] = earlier(arguments.output).get("lengths", {})
    models: dict[str, FocusLLM] = {"opened": first}
    for times in arguments.times:
        name = str(times * len(ids))
        if name in done:
            continue
        wanted = [way for way in WAYS if times <= arguments.condensed_to or way == "opened"]
        make: Callable[[str], FocusLLM] = loaded
        models = {way: models.get(way) or make(way) for way in wanted}
        found = in_turns(models, ids, times)
        config = first.model.settings.replace(kv_place="disk")
        heads = first.model.lookup_heads
        cost = estimate(first.model.base, config, times * len(ids), arguments.new_tokens, "disk", heads=heads)
        done[name] = {**found, "estimated_bytes_without_libraries": cost.total}
        size = sum(path.stat().st_size for path in arguments.store.iterdir()) * times
        finish(arguments.output, {"dtype": str(first.model.dtype), "lengths": done, "store_bytes": size}, quiet=True)
    print(json.dumps(done, indent=2))


if __name__ == "__main__":
    main()
