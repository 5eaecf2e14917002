"""What the candidate projections of the embedded model are worth: retrieval and perplexity on held-out text.

    python benchmarks/adapter_quality.py passkey --data DATA --lengths 4096 16384 --cases 20
    python benchmarks/adapter_quality.py perplexity --data DATA --lengths 2048 8192

Tasks (all greedy, nothing of them was trained on; lengths are in tokens of far and local context together):

    passkey      the paper's text: a 5-digit number hidden in repeated sentences; all digits right
    keys         DATA/bench/lost_in_the_middle, 75 pairs of UUIDs in JSON; the value is in the answer
    repetition   64 tokens from anywhere in a book; the next 64 tokens right, decoded freely
    stories      bAbI qa1 and qa2 test facts, hidden in a book; beside it the base model with the facts alone
    perplexity   the last 256 tokens: local context alone, sink + window, full attention (to 8K), FocusLLM

Chunks depend on their own tokens alone, so those that cases share are encoded once.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from common import finish
from focusllm import FocusLLM
from focusllm.chunking import split
from focusllm.cost import total_memory
from focusllm.engine import decode, prefill, start_request
from focusllm.evaluation.chunk_cache import ChunkCache
from focusllm.evaluation.tasks.passkey import GARBAGE, INTRO, LEAD, needle_line
from focusllm.kv import concat
from focusllm.text import encode_text, frame_question, start_tokens
from focusllm.training.dense import Sample, dense_loss
from focusllm.training.tasks import read_stories

BOOKS = (
    "herman_melville__moby_dick",
    "leo_tolstoy__war_and_peace",
    "henry_david_thoreau__walden",
    "jane_austen__pride_and_prejudice",
)
SINKS = 4


class Bench:
    """The model, and the chunks that were encoded so far (`blocks`)."""

    def __init__(self, llm: FocusLLM, arguments: argparse.Namespace):
        self.llm, self.base, self.config, self.arguments = llm, llm.model.base, llm.config, arguments
        self.data = Path(arguments.data)
        self.books: dict[Path, list[int]] = {}
        known_bytes = total_memory(self.base.device) // 4
        self.blocks = ChunkCache(self.base, self.config.chunk_length, known_bytes).blocks

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return encode_text(self.llm.tokenizer, text).token_ids

    def book(self, number: int, length: int) -> list[int]:
        """Token ids of a held-out book of at least `length` tokens."""
        for path in (self.data / "books" / "test" / f"{name}.txt" for name in BOOKS[number % len(BOOKS) :] + BOOKS):
            if path not in self.books:
                self.books[path] = self.encode(path.read_text(encoding="utf-8"))
            if len(self.books[path]) >= length:
                return self.books[path]
        raise SystemExit(f"no book has {length:,} tokens; use a smaller length")

    @torch.no_grad()
    def answer(self, far: Sequence[int], local: Sequence[int], count: int, prompt: int | None = None) -> list[int]:
        """Greedy tokens."""
        request = start_request(self.base, self.blocks(far), local, self.config, prompt)
        made = [int(prefill(self.base, request, self.config)[-1].argmax())]
        while len(made) < count and made[-1] != self.llm.tokenizer.eos_token_id:
            made.append(int(decode(self.base, [request], made[-1:], self.config)[0].argmax()))
        return made

    @torch.no_grad()
    def plain_answer(self, ids: Sequence[int], count: int) -> list[int]:
        """Greedy tokens of the base model with full attention."""
        cache, made, given = DynamicCache(config=self.base.config), [], list(ids)
        while len(made) < count and (not made or made[-1] != self.llm.tokenizer.eos_token_id):
            out = self.base(torch.tensor([given]), past_key_values=cache, logits_to_keep=1)
            made.append(int(out.logits[0, -1].argmax()))
            given = made[-1:]
        return made


def passkey(bench: Bench, length: int, rng: np.random.Generator) -> dict[str, Any]:
    """One number in the paper's text, at a random depth."""
    number = "".join(map(str, rng.integers(0, 10, size=5)))
    intro, garbage, lead = bench.encode(INTRO), bench.encode(GARBAGE), bench.encode(LEAD)
    needle = bench.encode(needle_line(number))
    repeats = (length - len(intro) - len(needle) - len(lead) - 1) // len(garbage)
    before = int(rng.integers(0, repeats + 1))
    ids = [*start_tokens(bench.llm.tokenizer), *intro, *garbage * before, *needle, *garbage * (repeats - before), *lead]
    far, local = split(ids, bench.config)
    answer = bench.llm.tokenizer.decode(bench.answer(far, local, 7)).strip()
    return {"depth": round(before / repeats, 2), "expected": number, "answer": answer, "right": answer[:5] == number}


def keys_text(pairs: Sequence[tuple[str, str]], key: str) -> str:
    """The Lost-in-the-Middle prompt: pairs in JSON, and one of their keys."""
    data = "{" + ",\n ".join(f'"{k}": "{v}"' for k, v in pairs) + "}"
    return f'Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{data}\n\nKey: "{key}"\nCorresponding value:'  # noqa: E501


def keys(bench: Bench, row: dict[str, Any], index: int, full: bool) -> dict[str, Any]:
    """One pair of the Lost-in-the-Middle file."""
    pairs = row["ordered_kv_records"]
    key, value = pairs[index]
    text = keys_text(pairs, key)
    ids = bench.encode(text)
    far, local = split(ids, bench.config)
    decoded = bench.llm.tokenizer.decode
    answer = decoded(bench.answer(far, local, 44))
    result = {"key": index, "answer": answer.strip(), "right": value in answer}
    if full:
        result["full_attention_right"] = value in decoded(bench.plain_answer(ids, 44))
    return result


def repetition(bench: Bench, book: list[int], far: list[int], rng: np.random.Generator) -> dict[str, Any]:
    """64 tokens of the memory, and how many of the next 64 come out."""
    start = int(rng.integers(0, len(far) - 128))
    answer = bench.answer(far, far[start : start + 64], 64)
    right = sum(a == b for a, b in zip(answer, far[start + 64 : start + 128], strict=False))
    return {"start": start, "tokens_right": right / 64, "right": right == 64}


def stories(bench: Bench, task: Any, book: list[int], length: int, rng: np.random.Generator) -> dict[str, Any]:
    """A bAbI question; each fact takes the place of a few tokens of the book."""
    before, after = frame_question(bench.llm.tokenizer, task.question)
    room = length - len(before) - len(after)
    far = book[: room // bench.config.chunk_length * bench.config.chunk_length]
    places = np.sort(rng.choice(len(far) // 64, size=len(task.inserts), replace=False)) * 64
    for place, sentence in zip(places, task.inserts, strict=True):
        piece = bench.encode(f"\n{sentence}\n")
        far[place : place + len(piece)] = piece
    found = {}
    local = [*before, *book[len(far) : len(far) + bench.config.local_length - len(before) - len(after)], *after]
    facts = [*before, *bench.encode("\n".join(task.inserts)), *after]
    answers = {"answer": bench.answer(far, local, 12, len(after)), "facts_alone": bench.plain_answer(facts, 12)}
    for name, ids in answers.items():
        text = bench.llm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        found |= {name: text, f"{name}_right": re.search(rf"\b{re.escape(task.answer)}\b", text.lower()) is not None}
    return {"expected": task.answer, **found, "right": found.pop("answer_right")}


@torch.no_grad()
def perplexity(bench: Bench, text: list[int], length: int, full: bool) -> dict[str, Any]:
    """Mean loss of the last 256 of `length` tokens, by what they are decoded from."""
    config, base, count = bench.config, bench.base, 256
    window = text[:length]
    local = window[-config.local_length :]  # the last 256 are labels, what stands before them is given
    far = window[: -config.local_length]
    cut = len(far) % config.chunk_length  # whole chunks: the dense pass takes rows of one length
    kv = concat([block.kv for block in bench.blocks(far[cut:])], 0)
    losses, _ = dense_loss(base, kv, [Sample(local, count, config.prompt_length)])
    result = {"focus": float(losses.mean()), "local": _plain_loss(base, local, count)}
    result["sink"] = _plain_loss(base, [*window[:SINKS], *local[SINKS:]], count)  # positions as the cache has them
    if full:
        result["full"] = _plain_loss(base, window, count)
    return result


def _plain_loss(base: torch.nn.Module, ids: Sequence[int], count: int) -> float:
    tensor = torch.tensor([list(ids)])
    logits = base(tensor[:, :-1], logits_to_keep=count).logits[0].float()
    return float(F.cross_entropy(logits, tensor[0, -count:]))


def cases_of(bench: Bench, task: str, length: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """The cases of a task at a length, each to be called."""
    arguments, rng = bench.arguments, np.random.default_rng(length)
    if task == "passkey":
        for _ in range(arguments.cases):
            yield lambda: passkey(bench, length, rng)
    elif task == "keys":
        path = bench.data / "bench" / "lost_in_the_middle" / "kv-retrieval-75_keys.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()[: arguments.cases]]
        for i, row in enumerate(rows):
            yield lambda row=row, i=i: keys(bench, row, i * 37 % 75, arguments.full)
    elif task == "repetition":
        for i in range(arguments.cases):
            book = bench.book(i // 10, length)
            yield lambda book=book: repetition(bench, book, book[: length - 512], rng)
    elif task == "stories":
        for name in ("qa1_single-supporting-fact", "qa2_two-supporting-facts"):
            questions = read_stories([bench.data / "bench" / "babi_en" / f"{name}_test.txt"])
            questions = [task for task in questions if len(task.inserts) <= length // 128]  # all facts find a place
            for i in range(arguments.cases):
                question = questions[int(rng.integers(len(questions)))]
                book = bench.book(i // 10, length + 512)
                yield lambda q=question, b=book, n=name: {"task": n[:3], **stories(bench, q, b, length, rng)}
    else:
        chunk = bench.config.chunk_length
        for i in range(arguments.cases):  # ends a few chunks apart, so that windows share chunks
            end = max(arguments.lengths) + (i % 10) * 3 * chunk
            book = bench.book(i // 10, end)
            yield lambda text=book[end - length : end]: perplexity(bench, text, length, length <= arguments.full_to)


def main() -> None:
    """Measure one task at some lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["passkey", "keys", "repetition", "stories", "perplexity"])
    parser.add_argument("--data", required=True, help="the folder with books/ and bench/")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk-length", type=int, default=1024)
    parser.add_argument("--local-length", type=int, default=512)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="keys: full attention beside it")
    parser.add_argument("--full-to", type=int, default=8192, help="perplexity: full attention up to this length")
    parser.add_argument("--name", help="of the result file; default: adapter_TASK")
    arguments = parser.parse_args()
    lengths = {name: getattr(arguments, name) for name in ("chunk_length", "local_length", "prompt_length")}
    llm = FocusLLM.from_pretrained(arguments.model, adapter=arguments.adapter, dtype=arguments.dtype, **lengths)
    bench = Bench(llm, arguments)
    results = {}
    for length in arguments.lengths:
        start, rows = time.perf_counter(), []
        for case in cases_of(bench, arguments.task, length):
            rows.append(case())
            summary = summarise(arguments.task, rows)
            print(f"\r{arguments.task} at {length:,}: {len(rows)} cases, {summary}", end="", flush=True)
        print()
        results[length] = {**summary, "cases": len(rows), "seconds": time.perf_counter() - start, "rows": rows}
    trained = llm.model.adapter_config.trained if llm.model.adapter_config else "untrained"
    finish(arguments.name or f"adapter_{arguments.task}", {**lengths, "adapter": trained, "lengths": results})


def summarise(task: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over cases."""
    if task != "perplexity":
        names = [name for name in rows[0] if name.endswith("right")]
        found = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}
        if task == "stories":
            for part in ("qa1", "qa2"):
                some = [row for row in rows if row["task"] == part]
                if some:
                    found |= {f"{part}_{name}": float(np.mean([row[name] for row in some])) for name in names}
        return found
    found = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
    found["focus_perplexity"] = round(math.exp(found["focus"]), 3)
    if "full" in found:
        found["share_of_gain"] = round((found["local"] - found["focus"]) / (found["local"] - found["full"]), 3)
    return found


if __name__ == "__main__":
    main()
