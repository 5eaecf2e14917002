"""Chunks opened instead of condensed: is the right one chosen, and is the question answered?

HF_HUB_OFFLINE=1 python benchmarks/opened_chunks.py BOOK STORE --output opened_moby_dick

Made-up facts (facts.jsonl), one in each chunk of a held-out book; in few chunks the first ones. Of 50 facts two things
are asked: a question in the fact's own words ("same"), and one that shares no rare word with it ("other"); of 50 more
the first; and of 24 of which seven others differ in a name only ("like"), one. A chunk
depends on its own tokens only: the book is read once (STORE keeps it), and asked at several lengths, each question in
the part of the book that its fact is in. What is measured of each question is kept as it comes, so a run goes on where
it was broken off. "passage" is the right chunk opened, and nothing chosen: what choosing can reach at most.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from common import earlier, finish
from focusllm import FocusLLM
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.decoding.opened import fused, looked
from focusllm.decoding.request import Request
from focusllm.documents.answer import Citation
from focusllm.documents.citing import cite_sentences
from focusllm.documents.document import Context
from focusllm.documents.text import encode_ids, frame_question
from focusllm.documents.words import WordIndex
from focusllm.memory.chunks import ChunkBlock

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("book", type=Path, help="a text that nothing was trained on")
parser.add_argument("store", type=Path, help="a folder for what was read: some 3 GB for 128 chunks")
parser.add_argument("--model", default="qwen2.5-coder-0.5b")
parser.add_argument("--lengths", type=int, nargs="*", default=[16, 64, 128], help="chunks that are chosen from")
parser.add_argument("--answers", type=int, nargs="*", default=[4, 16, 32], help="those at which answers are asked for")
parser.add_argument("--open", type=int, nargs="*", default=[1, 2, 4], help="how many chunks are opened")
parser.add_argument("--condensed", action="store_true", help="answer by condensed chunks too (trained projections)")
parser.add_argument("--new-tokens", type=int, default=24)
parser.add_argument("--dtype", default="auto")
parser.add_argument("--output", default="opened_chunks")
arguments = parser.parse_args()
FACTS = [json.loads(line) for line in (Path(__file__).parent / "facts.jsonl").read_text().splitlines()]

llm = FocusLLM.from_pretrained(arguments.model, dtype=arguments.dtype, far_context="opened")
base, tokenizer, config = llm.model.base, llm.tokenizer, llm.model.settings
CONDENSED = config.replace(far_context="condensed")
step = config.chunk_length - config.overlap
NUM_CHUNKS = max(*arguments.lengths, *arguments.answers)


def planted() -> tuple[list[int], list[int]]:
    """The book's tokens with a fact in every chunk, and which chunk each fact is in."""
    ids = encode_ids(tokenizer, arguments.book.read_text(encoding="utf-8"))
    ids = ids[len(ids) // 10 :]  # behind the title pages
    rng = np.random.default_rng(7)
    places = rng.permutation(NUM_CHUNKS)[: len(FACTS)].tolist()
    of_chunk = {chunk: number for number, chunk in enumerate(places)}
    text: list[int] = []
    for chunk in range(NUM_CHUNKS):
        told = encode_ids(tokenizer, f" {FACTS[of_chunk[chunk]]['statement']}") if chunk in of_chunk else []
        own = ids[chunk * step : (chunk + 1) * step - len(told)]
        cut = int(rng.integers(config.overlap, len(own) - config.overlap))  # in no other chunk
        while cut < len(own) - config.overlap and not tokenizer.decode(own[cut - 1 : cut]).endswith("."):
            cut += 1
        text += [*own[:cut], *told, *own[cut:]]
    return text + ids[NUM_CHUNKS * step :][: config.overlap], places


def part(block: ChunkBlock, chunk: int, count: int) -> tuple[ChunkBlock, int]:
    """So many chunks with this one among them, and its index there."""
    first = chunk // count * count
    return block.part(first, min(first + count, block.num_chunks)), chunk - first


def answer(
    block: ChunkBlock, question: list[int], words: torch.Tensor | None, open_chunks: int | None
) -> tuple[str, Request]:
    """Greedy, with so many chunks open; None: all of them condensed. And what the request knows then."""
    how = CONDENSED if open_chunks is None else config.replace(open_tokens=open_chunks * config.chunk_length)
    request = start_request(base, [block], question, how, len(question), word_scores=words)
    token, made = int(prefill(base, request, how)[-1].argmax()), []
    ends = base.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    while token not in ends and len(made) < arguments.new_tokens:
        made.append(token)
        token = int(decode(base, [request], [token], how)[0].argmax())
    return str(tokenizer.decode(made)), request


def by_ranks(*ways: torch.Tensor) -> torch.Tensor:
    """Reciprocal ranks added (Cormack and others, SIGIR 2009, k = 60); what gets nothing has no rank."""
    total = torch.zeros(len(ways[0]), dtype=torch.float64)
    for scores in ways:
        places = scores.argsort(descending=True, stable=True)
        total[places] += (1 / (61 + torch.arange(len(places), dtype=torch.float64))) * (scores[places] > 0)
    return total


def rank(scores: torch.Tensor, right: int) -> int:
    """How many chunks come before the right one; equals that stand before it too."""
    return int((scores > scores[right]).sum() + (scores[:right] == scores[right]).sum())


@torch.no_grad()
def case(number: int, kind: str, chunk: int, block: ChunkBlock, texts: list[str]) -> dict[str, object]:
    """One question at all lengths."""
    fact, asked = FACTS[number], FACTS[number]["questions"][kind]
    question = frame_question(tokenizer, asked)[1]
    found: dict[str, object] = {"number": number, "words": kind, "chunk": chunk}
    kept = raw.setdefault((number, kind), {})
    passage, read = answer(block.part(chunk, chunk + 1), question, None, 1)
    found |= {"passage": passage, "right with the passage": is_right(passage, fact)}
    cited, _ = cite_sentences(Context([document], read.blocks, [(0, chunk)], [], []), read.watched, 0, "", [])
    found["cited"] = next(i for i, citation in enumerate(cited) if is_of(citation, fact["statement"]))
    for count in sorted({*arguments.lengths, *arguments.answers}):
        own, right = part(block, chunk, count)
        first = chunk - right
        words = torch.from_numpy(WordIndex(texts[first : first + own.num_chunks]).scores(asked))
        request = start_request(base, [own], question, config, len(question))
        heads = looked(base, request, config).chunks
        kept[count] = (heads, words, right)
        ranks = {"heads": rank(heads, right), "words": rank(words, right), "both": rank(fused(heads, words), right)}
        if count in arguments.lengths:
            found[f"rank in {count}"] = ranks
        if count in arguments.answers:
            # With the right chunk alone open, the model sees what it saw of the passage.
            known = {1: passage} if not ranks["both"] else {}
            ways: dict[str, str] = {
                str(opened): known.get(opened) or answer(own, question, words, opened)[0] for opened in arguments.open
            }
            if condensed is not None:
                ways["condensed"] = answer(part(condensed, chunk, count)[0], question, None, None)[0]
            found[f"answers in {count}"] = ways
            found[f"right in {count}"] = {name: is_right(text, fact) for name, text in ways.items()}
    return found


def is_right(text: str, fact: dict[str, list[str]]) -> bool:
    """Whether one of the ways to say it is in the answer."""
    return any(re.search(rf"\b{re.escape(way)}", text.lower()) for way in fact["answers"])


def is_of(citation: Citation, statement: str) -> bool:
    """Whether a citation is a fact, or the sentence that has it."""
    return statement in citation.text or citation.text in statement


def summary(rows: list[dict[str, dict[str, int]]]) -> dict[str, object]:
    """Means of questions."""
    told: dict[str, object] = {"questions": len(rows)}
    for count in arguments.lengths:
        for way in rows[-1][f"rank in {count}"]:
            ranks = np.array([row[f"rank in {count}"][way] for row in rows])
            told[f"right chunk of {count}, {way}"] = {
                "first": float((ranks == 0).mean()),
                "among four": float((ranks < 4).mean()),
            }
    for count in arguments.answers:
        ways = rows[0][f"right in {count}"]
        right = {way: float(np.mean([row[f"right in {count}"][way] for row in rows])) for way in ways}
        told[f"right answers of {count}, by number opened"] = right
    cited = np.array([row["cited"] for row in rows])
    told["the fact cited with the passage"] = {
        "first": float((cited == 0).mean()),
        "among four": float((cited < 4).mean()),
    }
    told["right answers with the passage"] = float(np.mean([row["right with the passage"] for row in rows]))
    return told


ids, places = planted()
document = llm.read(ids, name=arguments.book.name, store=arguments.store, progress=True)
condensed = llm.model.encode(document.token_ids, config=CONDENSED)[0] if arguments.condensed else None
texts = [document.text[chunk.start : chunk.end] for chunk in document.chunks]
settings = {
    "model": arguments.model,
    "book": arguments.book.name,
    "chunks": NUM_CHUNKS,
    "answers": arguments.answers,
    "open": arguments.open,
}
settings |= {"dtype": str(base.dtype)}
before = earlier(arguments.output)
rows = before.get("rows", []) if before.get("settings") == settings else []
raw_path = arguments.store / f"{arguments.output}.pt"
raw = torch.load(raw_path) if raw_path.exists() and rows else {}
cases = [(number, kind) for number in range(len(places)) for kind in FACTS[number]["questions"]]
cases = [cases[i] for i in np.random.default_rng(3).permutation(len(cases))]  # so that a part of a run has all kinds
for number, kind in cases[len(rows) :]:
    rows.append(case(number, kind, places[number], document.blocks[0], texts))
    print(rows[-1], flush=True)
    torch.save(raw, raw_path)
    kinds = ("same", "other", "like")
    for row in rows:
        for count, (heads, words, right) in raw[row["number"], row["words"]].items():
            if f"rank in {count}" in row:
                row[f"rank in {count}"]["by ranks"] = rank(by_ranks(heads, words), right)
    told = {kind: summary(own) for kind in kinds if (own := [row for row in rows if row["words"] == kind])}
    finish(arguments.output, {"settings": settings, "summary": told, "rows": rows}, quiet=True)
print(json.dumps(told, indent=2))
