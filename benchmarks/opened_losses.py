"""What opening more chunks costs, and what repairs that are published give: nats of the right answer.

HF_HUB_OFFLINE=1 python benchmarks/opened_losses.py opened_moby_dick_128 BOOK --output opened_losses

Takes a result of opened_chunks.py: its questions "in the fact's own words" whose answer, with the fact's chunk alone
open, was right. That answer is scored again (nats a token, the fact's chunk among so many others of the book, in the
order of the text), each way on the same questions:

    start            chunks read and seen behind the shared start: our way
    no start         read alone, seen one behind another (what stands before the first chunk is missing)
    firsts dropped   the same without the first four tokens of every chunk but the first
    same positions   all chunks at the positions at which they were read (APE, arXiv 2502.05431)
    temperature 0.8  that, with attention to what is open sharper (APE's T)
    again 2, 16      so many first tokens of every chunk but the first read again behind those before (EPIC, 2410.15332)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import earlier, finish
from focusllm import FocusLLM
from focusllm.documents.text import encode_ids, frame_ids, frame_question
from focusllm.method.focus import local_pass, mover
from focusllm.method.kv import KV, Segment, concat
from focusllm.method.opened import Start, lay_out, read_behind, read_start

FIRSTS = 4
WAYS = ("start", "no start", "firsts dropped", "same positions", "temperature 0.8", "again 2", "again 16")

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("questions", help="name of the result")
parser.add_argument("book", type=Path, help="what else is opened")
parser.add_argument("--model", default="qwen2.5-coder-0.5b")
parser.add_argument("--open", type=int, nargs="*", default=[1, 2, 4, 8, 16])
parser.add_argument("--cases", type=int, default=16)
parser.add_argument("--output", default="opened_losses")

Piece = tuple[KV, Tensor]
"""A chunk's keys and values [1, K, C, D] a layer, read from position S on, and its tokens [C]."""


def laid_out(model: Any, way: str, start: Start, behind: list[Piece], alone: list[Piece]) -> KV:
    """What the question sees of chunks that were read behind the start, or alone."""
    if way in ("no start", "firsts dropped"):
        cut = FIRSTS if way == "firsts dropped" else 0
        return lay_out(model, None, [(kv.tokens(cut if i else 0), cut if i else 0) for i, (kv, _) in enumerate(alone)])
    first = start.length
    if way in ("same positions", "temperature 0.8"):
        sharper = 1.0 if way == "same positions" else 0.8
        chunks = concat([kv for kv, _ in behind], 2)
        return concat([start.kv, KV([key / sharper for key in chunks.keys], chunks.values)], 2)
    again = int(way.removeprefix("again ")) if way.startswith("again") else 0
    far = lay_out(model, start, [(behind[0][0], first)])
    for kv, tokens in behind[1:]:
        place = torch.tensor([far.length])
        parts = [far]
        if again:
            parts.append(local_pass(model, tokens[None, :again], place, [Segment([far])], 0, watch=0)[1])
        move = mover(model, torch.tensor([[far.length - first]]))
        rest = kv.tokens(again)
        parts.append(KV([move(i, key) for i, key in enumerate(rest.keys)], rest.values))
        far = concat(parts, 2)
    return far


def nats(model: Any, far: KV, place: int, question: list[int], answer: list[int]) -> float:
    """Of a token of the answer, mean."""
    ids = torch.tensor([[*question, *answer]])
    logits, _, _ = local_pass(model, ids, torch.tensor([place]), [Segment([far])], len(answer) + 1, watch=0)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, -len(answer) :])
    return float(loss)


@torch.no_grad()
def main() -> None:
    """Measure, and keep what was measured."""
    arguments = parser.parse_args()
    llm = FocusLLM.from_pretrained(arguments.model, far_context="opened")
    base, tokenizer, length = llm.model.base, llm.tokenizer, llm.config.chunk_length
    facts = [json.loads(line) for line in (Path(__file__).parent / "facts.jsonl").read_text().splitlines()]
    known = [
        row for row in earlier(arguments.questions)["rows"] if row["words"] == "same" and row["right with the passage"]
    ]
    start_ids = frame_ids(tokenizer)[0]
    start = read_start(base, start_ids)
    assert start is not None
    rng, ids = np.random.default_rng(11), encode_ids(tokenizer, arguments.book.read_text(encoding="utf-8"))
    others = [ids[n * length : (n + 1) * length] for n in range(20, 20 + max(arguments.open) - 1)]

    def read(chunk_ids: list[int]) -> tuple[Piece, Piece]:
        tokens = torch.tensor(chunk_ids)
        return (read_behind(base, start_ids, tokens[None]), tokens), (read_behind(base, [], tokens[None]), tokens)

    read_others = []
    for number, other in enumerate(others):
        read_others.append(read(other))
        print(f"chunk {number + 1} of {len(others)} is read", flush=True)
    rows = []
    for row in known[: arguments.cases]:
        told = encode_ids(tokenizer, f" {facts[row['number']]['statement']}")
        own = ids[40 * length : 41 * length - len(told)]
        cut = int(rng.integers(64, len(own) - 64))
        right = read([*own[:cut], *told, *own[cut:]])
        question = frame_question(tokenizer, facts[row["number"]]["questions"]["same"])[1]
        answer, found = encode_ids(tokenizer, row["passage"]), dict[str, dict[str, float]]()
        places = rng.random()
        for count in arguments.open:
            pieces = [*read_others[: count - 1]]
            pieces.insert(int(places * count), right)
            behind, alone = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
            found[str(count)] = {}
            for way in WAYS:
                if count == 1 and way not in ("start", "no start"):
                    continue  # nothing to repair
                far = laid_out(base, way, start, behind, alone)
                same = way in ("same positions", "temperature 0.8")
                place = start.length + length if same else far.length
                found[str(count)][way] = nats(base, far, place, question, answer)
        rows.append({"number": row["number"], "nats": found})
        print(rows[-1], flush=True)
        means = {
            count: {way: float(np.mean([one["nats"][count][way] for one in rows])) for way in of_count}
            for count, of_count in found.items()
        }
        finish(
            arguments.output, {"model": arguments.model, "cases": len(rows), "nats": means, "rows": rows}, quiet=True
        )
    print(json.dumps(means, indent=2))


if __name__ == "__main__":
    main()
