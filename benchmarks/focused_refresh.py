"""What decoding loses when only the rows that get attention are refreshed, against refreshing all of them.

Every case is decoded greedily with all rows refreshed; each policy is then forced along the same tokens, and its own
choice is compared at every one of them. On books the tokens are the book's, and their loss is compared.

    python benchmarks/focused_refresh.py --data DATA --lengths 4096 32768 --rows 4 8 16
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from adapter_quality import GARBAGE, INTRO, LEAD, Bench, keys_text
from common import finish
from focusllm import FocusConfig, FocusLLM
from focusllm.chunking import split
from focusllm.engine import Request, decode, prefill, start_request
from focusllm.evaluation.tasks.passkey import needle_line
from focusllm.text import start_tokens


@torch.no_grad()
def follow(
    bench: Bench, start: Request, first: torch.Tensor, config: FocusConfig, given: Sequence[int] | int
) -> dict[str, Any]:
    """Decode along given tokens, or greedily so many: choices, losses of what was followed, seconds."""
    request, logits = start, first
    count = given if isinstance(given, int) else len(given)
    choices, losses, followed = [], [], []
    began = time.perf_counter()
    for i in range(count):
        choices.append(int(logits.argmax()))
        followed.append(choices[-1] if isinstance(given, int) else given[i])
        losses.append(float(F.cross_entropy(logits.float(), torch.tensor(followed[-1]))))
        if i + 1 < count:
            logits = decode(bench.base, [request], followed[-1:], config)[0]
    return {"choices": choices, "followed": followed, "losses": losses, "seconds": time.perf_counter() - began}


def cases(bench: Bench, length: int, count: int) -> list[tuple[str, list[int], list[int], Sequence[int] | int]]:
    """(task, far context, local context, tokens to follow or how many to decode)."""
    rng = np.random.default_rng(length)
    made: list[tuple[str, list[int], list[int], Sequence[int] | int]] = []
    book = bench.book(0, length + 512)
    far = book[:length]
    for _ in range(count):
        number = "".join(map(str, rng.integers(0, 10, size=5)))
        intro, garbage, lead = bench.encode(INTRO), bench.encode(GARBAGE), bench.encode(LEAD)
        needle = bench.encode(needle_line(number))
        repeats = (length - len(intro) - len(needle) - len(lead) - 1) // len(garbage)
        before = int(rng.integers(0, repeats + 1))
        start = start_tokens(bench.llm.tokenizer)
        ids = [*start, *intro, *garbage * before, *needle, *garbage * (repeats - before), *lead]
        made.append(("passkey", *split(ids, bench.config), 16))
        at = int(rng.integers(0, length - 128))
        made.append(("repetition", far, far[at : at + 64], 64))
        made.append(
            (
                "books",
                far,
                book[length : length + bench.config.local_length],
                book[length + bench.config.local_length :][:128],
            )
        )
    path = bench.data / "bench" / "lost_in_the_middle" / "kv-retrieval-75_keys.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in range(count):  # as many pairs as there is room for, from several rows of the file
        pairs, found = [], 0
        for row in rows[number:] + rows[:number]:
            pairs += row["ordered_kv_records"]
            found += 75
            if found * 90 > length:
                break
        pairs = pairs[: length // 90]
        key = pairs[int(rng.integers(len(pairs)))][0]
        made.append(("keys", *split(bench.encode(keys_text(pairs, key)), bench.config), 40))
    return made


def main() -> None:
    """Compare some policies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder with books/ and bench/")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--adapter")
    parser.add_argument("--tasks", nargs="+", default=["passkey", "keys", "repetition", "books"])
    parser.add_argument("--name", default="focused_refresh")
    arguments = parser.parse_args()
    llm = FocusLLM.from_pretrained("smollm2-135m", dtype=arguments.dtype, adapter=arguments.adapter)
    bench = Bench(llm, arguments)
    results = {}
    for length in arguments.lengths:
        table: dict[str, dict[str, list[Any]]] = {}
        for task, far, local, given in cases(bench, length, arguments.cases):
            if task not in arguments.tasks:
                continue
            every = llm.config.replace(refresh_rows=None)
            blocks = bench.blocks(far)
            request = start_request(bench.base, blocks, local, every)
            first = prefill(bench.base, request, every)[-1]
            truth = follow(bench, request, first, every, given)
            for rows in arguments.rows:
                config = llm.config.replace(refresh_rows=rows)
                request = start_request(bench.base, blocks, local, config)
                found = follow(bench, request, prefill(bench.base, request, config)[-1], config, truth["followed"])
                entry = table.setdefault(
                    f"{task}, {rows} rows",
                    {"same": [], "loss": [], "loss_every": [], "seconds": [], "seconds_every": []},
                )
                entry["same"] += [a == b for a, b in zip(found["choices"], truth["choices"], strict=True)]
                entry["loss"] += found["losses"]
                entry["loss_every"] += truth["losses"]
                entry["seconds"].append(found["seconds"] / len(found["choices"]))
                entry["seconds_every"].append(truth["seconds"] / len(found["choices"]))
        results[length] = {
            name: {"tokens": len(entry["same"]), **{key: float(np.mean(values)) for key, values in entry.items()}}
            for name, entry in sorted(table.items())
        }
        for name, entry in results[length].items():
            print(
                f"{length:>7,} {name:<22}" + "  ".join(f"{key} {value:.4f}" for key, value in entry.items()), flush=True
            )
    finish(arguments.name, {"lengths": results})


if __name__ == "__main__":
    main()
