"""What the candidate projections of the embedded model are worth: retrieval and perplexity on held-out text.

    python benchmarks/adapter_quality.py passkey --data DATA --lengths 4096 16384 --cases 20
    python benchmarks/adapter_quality.py perplexity --data DATA --lengths 2048 8192

Tasks (all greedy, nothing of them was trained on; lengths are in tokens of far and local context together):

    passkey      the paper's text: a 5-digit number hidden in repeated sentences; all digits right
    keys         DATA/bench/lost_in_the_middle, 75 pairs of UUIDs in JSON; the value is in the answer
    repetition   64 tokens from anywhere in a book; the next 64 tokens right, decoded freely; beside it the base model
                 with full attention over the 1024 tokens around the passage
    stories      bAbI qa1 and qa2 test facts, hidden in a book; beside it the base model with the facts alone
    perplexity   the last 256 tokens: local context alone, sink + window, full attention (to 8K), FocusLLM, of whose
                 chunks those are condensed anew for each token that the text before the first of them pays most to;
                 the first three are measured once for all adapters (results/adapter_perplexity_others.json)

Chunks depend on their own tokens alone, so those that cases share are encoded once. Results are kept as they come: the
same command goes on after a stop, with the same cases, and `--cases` may grow. Another adapter begins anew.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from common import earlier, finish
from focusllm import FocusLLM
from focusllm.config import FocusConfig
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.decoding.refresh import RefreshPolicy
from focusllm.documents.text import encode_text, frame_question, start_tokens
from focusllm.evaluation.tasks.passkey import GARBAGE, INTRO, LEAD, needle_line
from focusllm.memory.chunk_cache import ChunkCache
from focusllm.memory.chunking import split
from focusllm.memory.chunks import ChunkBlock
from focusllm.memory.cost import total_memory
from focusllm.method.adapter import sink_token, trainable_parameters
from focusllm.method.base import run_plain
from focusllm.training.dense import Sample, memory_logits
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
        bench_data = self.data / "bench"
        path = bench_data / "lost_in_the_middle" / "kv-retrieval-75_keys.jsonl"
        self.key_rows = [json.loads(line) for line in path.read_text().splitlines()]
        names = {"qa1": "qa1_single-supporting-fact", "qa2": "qa2_two-supporting-facts"}
        self.questions = {
            short: read_stories([bench_data / "babi_en" / f"{name}_test.txt"]) for short, name in names.items()
        }
        self.cache = ChunkCache(self.base, known_bytes)
        self.others = Others(arguments, self.base.device)

    def blocks(self, token_ids: Sequence[int]) -> list[ChunkBlock]:
        """A text's chunks, encoded."""
        return self.cache.blocks(token_ids, self.config)

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
            logits = run_plain(self.base, torch.tensor([given], device=self.base.device), cache, 1)
            made.append(int(logits[0, -1].argmax()))
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
    passage, expected = far[start : start + 64], far[start + 64 : start + 128]
    around = far[max(0, min(start - 448, len(far) - 1024)) :][:1024]

    def share(answer: list[int]) -> float:
        return sum(a == b for a, b in zip(answer, expected, strict=False)) / 64

    right = share(bench.answer(far, passage, 64))
    base_right = share(bench.plain_answer([*around, *passage], 64))
    return {"start": start, "tokens_right": right, "right": right == 1, "base_tokens_right": base_right}


def stories(bench: Bench, task: Any, book: list[int], length: int, rng: np.random.Generator) -> dict[str, Any]:
    """A bAbI question; each fact takes the place of a few tokens of the book."""
    before, after = frame_question(bench.llm.tokenizer, task.question)
    room = length - len(before) - len(after)
    far = book[: room // bench.config.chunk_length * bench.config.chunk_length]
    places = np.sort(rng.choice(len(far) // 64, size=len(task.inserts), replace=False)) * 64
    for place, sentence in zip(places, task.inserts, strict=True):
        piece = bench.encode(f"\n{sentence}\n")
        far[place : place + len(piece)] = piece
    local = [*before, *book[len(far) : len(far) + bench.config.local_length - len(before) - len(after)], *after]
    facts = [*before, *bench.encode("\n".join(task.inserts)), *after]
    answers = {"answer": bench.answer(far, local, 12, len(after)), "facts_alone": bench.plain_answer(facts, 12)}
    found: dict[str, Any] = {"expected": task.answer}
    for name, ids in answers.items():
        text = bench.llm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        found |= {name: text, f"{name}_right": re.search(rf"\b{re.escape(task.answer)}\b", text.lower()) is not None}
    found["right"] = found.pop("answer_right")
    return found


@torch.no_grad()
def perplexity(bench: Bench, far: list[int], local: list[int]) -> dict[str, Any]:
    """Mean loss of the last 256 tokens of a local context; what stands before them is given."""
    config, base, count = bench.config, bench.base, 256
    cut = (len(far) - config.chunk_length) % config.stride  # whole chunks, the same in all windows
    blocks = bench.blocks(far[cut:])
    request = start_request(base, blocks, local[:-count], config)
    prefill(base, request, config)
    sample = Sample(local, count, config.prompt_length, refreshed=tuple(request.refreshed_slots))
    groups = (kv for block in blocks for _, kv in block.batches(base, config.chunks_per_batch))
    loss = F.cross_entropy(memory_logits(base, groups, sample).float().cpu(), torch.tensor(local[-count:]))
    return {"focus": float(loss)}


@torch.no_grad()
def other_losses(base: torch.nn.Module, window: list[int], local_length: int, full: bool) -> dict[str, float]:
    """The same by what no adapter has a part in."""
    local, count = window[-local_length:], 256
    result = {"local": _plain_loss(base, local, count)}
    result["sink"] = _plain_loss(base, [*window[:SINKS], *local[SINKS:]], count)  # positions as the cache has them
    if full:
        result["full"] = _plain_loss(base, window, count)
    return result


def _plain_loss(base: torch.nn.Module, ids: Sequence[int], count: int) -> float:
    tensor = torch.tensor([list(ids)], device=base.device)
    logits = base(tensor[:, :-1], logits_to_keep=count).logits[0].float()
    return float(F.cross_entropy(logits, tensor[0, -count:]))


def case_of(bench: Bench, task: str, length: int, number: int) -> dict[str, Any]:
    """The result of one case; the same case for the same numbers."""
    rng = np.random.default_rng([length, number])
    if task == "passkey":
        return passkey(bench, length, rng)
    if task == "keys":
        return keys(bench, bench.key_rows[number], number * 37 % 75, bench.arguments.full)
    if task == "repetition":
        book = bench.book(number // 10, length)
        return repetition(bench, book, book[: length - bench.config.local_length], rng)
    if task == "stories":
        name = ("qa1", "qa2")[number % 2]
        questions = [one for one in bench.questions[name] if len(one.inserts) <= length // 128]  # all find a place
        question = questions[int(rng.integers(len(questions)))]
        book = bench.book(number // 20, length + bench.config.local_length)
        return {"task": name, **stories(bench, question, book, length, rng)}
    end = bench.arguments.longest + (number % 10) * 3 * bench.config.stride  # windows share chunks
    book = bench.book(number // 10, end)
    window, full = book[end - length : end], length <= bench.arguments.full_to
    far = window[: -bench.config.local_length]
    if bench.arguments.other_book:
        other = bench.book((number // 10 + 1) % len(BOOKS), end)
        if other is book:
            raise SystemExit(f"there is no other book of {end:,} tokens; use a smaller --longest")
        far = other[end - length :][: len(far)]
    others = bench.others.of(
        f"{length} {number}", full, lambda: other_losses(bench.base, window, bench.config.local_length, full)
    )
    return {**perplexity(bench, far, window[len(far) :]), **others}


def measured(bench: Bench, task: str, kept: Kept) -> None:
    """All cases at all lengths that have no result yet."""
    for length in bench.arguments.lengths:
        found = kept.lengths.setdefault(str(length), {"rows": [], "seconds": 0.0})
        rows = found["rows"]
        while len(rows) < bench.arguments.cases:
            start = time.perf_counter()
            rows.append(case_of(bench, task, length, len(rows)))
            found["seconds"] += time.perf_counter() - start
            summary = summarise(task, rows)
            found |= {**summary, "cases": len(rows)}
            if len(rows) % 5 == 0 or len(rows) == bench.arguments.cases:
                kept.write()
            print(f"\r{task} at {length:,}: {len(rows)} cases, {summary}", end="", flush=True)
        print()


class Others:
    """Losses that do not depend on the adapter, by settings and window: kept in a file of their own."""

    name = "adapter_perplexity_others"

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        names = ("model", "dtype", "local_length", "longest")
        self.settings, self.device = " ".join(f"{name}={getattr(arguments, name)}" for name in names), device

    def of(self, window: str, full: bool, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is kept of a window, or measured now."""
        row = earlier(self.name).get("windows", {}).get(self.settings, {}).get(window)
        if row is None or (full and "full" not in row):
            row, every = measure(), earlier(self.name).get("windows", {})  # another program may have added some
            every.setdefault(self.settings, {})[window] = row
            finish(self.name, {"windows": every}, quiet=True, device=self.device)
        return row if full else {name: loss for name, loss in row.items() if name != "full"}


class Kept:
    """The result file, if it is of the same measurement."""

    def __init__(self, name: str, settings: dict[str, Any], device: torch.device):
        self.name, self.settings, self.device = name, settings, device
        older = {"kv_dtype": "same", "chunk_overlap": 0, "refresh_rows": None, "other_book": False}  # not said before
        before = {**older, **earlier(name)}
        other = [key for key, value in json.loads(json.dumps(settings)).items() if before.get(key) != value]
        if other and "lengths" in before:
            raise SystemExit(f"{name}.json has another {', '.join(other)}; choose another --name, or move it away.")
        self.lengths: dict[str, dict[str, Any]] = before.get("lengths", {})

    def write(self, quiet: bool = True) -> None:
        """Keep what there is."""
        finish(self.name, {**self.settings, "lengths": self.lengths}, quiet, self.device)


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
    parser.add_argument("--chunk-overlap", type=int, help="default: 64, or a quarter of a shorter chunk")
    parser.add_argument("--local-length", type=int, default=512)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument(
        "--refresh-rows", type=int, default=FocusConfig.refresh_rows, help="how many chunks the local context sees"
    )
    parser.add_argument("--kv-dtype", default="same", help="in how many bits chunks are kept: same, int8 or int4")
    parser.add_argument("--full", action="store_true", help="keys: full attention beside it")
    parser.add_argument("--full-to", type=int, default=8192, help="perplexity: full attention up to this length")
    parser.add_argument(
        "--other-book", action="store_true", help="perplexity: the memory is from another book than the local context"
    )
    parser.add_argument("--longest", type=int, help="perplexity: windows end where those of this length would")
    parser.add_argument("--name", help="of the result file; default: adapter_TASK")
    arguments = parser.parse_args()
    arguments.longest = arguments.longest or max(arguments.lengths)
    own = {
        name: getattr(arguments, name)
        for name in ("chunk_length", "chunk_overlap", "local_length", "prompt_length", "refresh_rows", "kv_dtype")
    }
    llm = FocusLLM.from_pretrained(arguments.model, adapter=arguments.adapter, dtype=arguments.dtype, **own)
    own["chunk_overlap"] = llm.config.overlap
    bench = Bench(llm, arguments)
    trained = llm.model.adapter_config.trained if llm.model.adapter_config else "untrained"
    weights = zlib.crc32(
        b"".join(x.detach().float().cpu().numpy().tobytes() for x in trainable_parameters(llm.model.base).values())
    )
    settings = {**own, "model": arguments.model, "dtype": arguments.dtype, "adapter": trained, "weights": weights}
    settings |= {"always_seen": RefreshPolicy(arguments.refresh_rows).recent, "sink_token": sink_token(llm.model.base)}
    settings |= {"task": arguments.task, "full": arguments.full}
    if arguments.task == "perplexity":  # the longest says where the windows are
        settings |= {"full_to": arguments.full_to, "longest": arguments.longest, "other_book": arguments.other_book}
    name = f"adapter_{arguments.task}{'_other_book' if arguments.other_book else ''}"
    kept = Kept(arguments.name or name, settings, bench.base.device)
    measured(bench, arguments.task, kept)
    kept.write(quiet=False)


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
