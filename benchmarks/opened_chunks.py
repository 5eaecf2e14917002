"""Chunks opened instead of condensed: is the right one chosen, and is the question answered?

HF_HUB_OFFLINE=1 python benchmarks/opened_chunks.py BOOK --tokens 16384 --cases 40 --output opened_walden_16384

Made-up facts, each put into a chunk of a held-out book in the place of some of its tokens, one at a time, and asked.
Half of the questions use the fact's own words, half say it in others. A chunk depends on its own tokens only, so that
the book is read once and for every case one chunk more. "passage" is the base model with the fact's own chunk in front
of the question and nothing else: what choosing can reach at most. BM25 (bm25s) ranks the same chunks by words.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import bm25s
import numpy as np
import torch

from common import earlier, finish
from focusllm import FocusLLM
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.decoding.opened import looked
from focusllm.documents.text import encode_ids, frame_ids, frame_question
from focusllm.memory.chunks import ChunkBlock, encode, lookup_of
from focusllm.method.kv import KV
from focusllm.method.opened import read_behind, read_start

PEOPLE = ("Tobias Marrow", "Ottilie Vance", "Silas Quill", "Rosalind Crane", "Barnaby Yarrow", "Philippa Zeller")
TRADES = {
    "apothecary": "seller of medicines",
    "blacksmith": "worker in hot iron",
    "innkeeper": "owner of the tavern",
    "carpenter": "builder in wood",
    "weaver": "maker of cloth",
    "notary": "drawer-up of contracts",
}
THINGS = {
    "spyglass": "optical device to look far with",
    "sabre": "curved blade",
    "cello": "large stringed instrument",
    "brooch": "pin for a dress",
    "diary": "private notebook",
    "pistol": "small firearm",
    "chalice": "drinking vessel for the altar",
    "sextant": "tool for finding the latitude",
}
PLACES = (
    *("in the cellar of the windmill", "under the altar cloth", "inside a barrel of flour", "in the rabbit hutch"),
    *("behind the portrait of the duke", "in the saddlebag of the grey mare", "beneath the loose tile in the washroom"),
    *("at the back of the coal shed", "in the drawer of the sewing table", "under the bridge by the toll gate"),
)
SAME_WORDS = (
    ("{who} keeps the {thing} {place}.", "Where does {who} keep the {thing}?"),
    ("Years later {who} confessed that the {thing} was still {place}.", "Where was the {thing}, according to {who}?"),
    ("One could always find the {thing} of {who} {place}.", "Where could one find the {thing} of {who}?"),
)
OTHER_WORDS = (
    ("The {trade} put the {thing} {place}.", "Which hiding spot was chosen for the {other} by the {job}?"),
    (
        "For safety the {thing} of the {trade} is kept {place}.",
        "At what spot is the {other} of the {job}?",
    ),
)

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("book", type=Path, help="a text that nothing was trained on")
parser.add_argument("--model", default="qwen2.5-coder-0.5b")
parser.add_argument("--tokens", type=int, default=16384, help="of the book")
parser.add_argument("--cases", type=int, default=40)
parser.add_argument("--open", type=int, nargs="*", default=[1, 2, 4], help="how many chunks are opened")
parser.add_argument("--new-tokens", type=int, default=24)
parser.add_argument("--dtype", default="auto")
parser.add_argument("--output", default="opened_chunks")
arguments = parser.parse_args()

llm = FocusLLM.from_pretrained(arguments.model, dtype=arguments.dtype, far_context="opened", adapter="none")
base, tokenizer, config = llm.model.base, llm.tokenizer, llm.model.settings
heads, start_ids = llm.model.lookup_heads, frame_ids(llm.tokenizer)[0]
start = read_start(base, start_ids)


def fact(rng: np.random.Generator, number: int) -> tuple[str, str, str]:
    """Statement, question, answer; every other one is asked for in other words."""

    def pick(choices: tuple) -> object:
        return choices[int(rng.integers(len(choices)))]

    thing, trade, place = pick(tuple(THINGS)), pick(tuple(TRADES)), pick(PLACES)
    statement, question = pick(OTHER_WORDS if number % 2 else SAME_WORDS)
    words = {"who": pick(PEOPLE), "thing": thing, "trade": trade, "place": place}
    words |= {"other": THINGS[thing], "job": TRADES[trade]}
    return statement.format(**words), question.format(**words), str(place)


def is_right(answer: str, place: str) -> bool:
    """Whether the place's last word is in the answer."""
    return re.findall(r"\w+", place.lower())[-1] in re.findall(r"\w+", answer.lower())


def answer(blocks: list[ChunkBlock], question: list[int], open_tokens: int) -> str:
    """Greedy, with so many tokens open."""
    how = config.replace(open_tokens=open_tokens)
    request = start_request(base, blocks, question, how, len(question))
    token, made = int(prefill(base, request, how)[-1].argmax()), []
    ends = base.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    while token not in ends and len(made) < arguments.new_tokens:
        made.append(token)
        token = int(decode(base, [request], [token], how)[0].argmax())
    return tokenizer.decode(made)


@torch.no_grad()
def case(number: int, book: ChunkBlock) -> dict[str, object]:
    """One fact in one chunk; the book is as it was afterwards."""
    rng = np.random.default_rng([7, number])
    statement, asked, place = fact(rng, number)
    right = int(rng.integers(book.num_chunks))
    told = encode_ids(tokenizer, f" {statement}")
    kept = book.token_ids[right].tolist()
    cut = int(rng.integers(0, len(kept) - len(told)))
    ids = torch.tensor([[*kept[:cut], *told, *kept[cut : len(kept) - len(told)]]])
    kv, changed = book.kv, read_behind(base, start_ids, ids)
    assert isinstance(kv, KV)
    assert book.lookup is not None
    before = kv.rows(right, right + 1).map(torch.clone)
    kv.write(right, 0, changed)
    book.lookup.write(right, changed)
    book.token_ids[right] = ids[0]
    question = frame_question(tokenizer, asked)[1]
    request = start_request(base, [book], question, config, len(question))
    weights = looked(base, request, config).chunks
    words = [tokenizer.decode(row) for row in book.token_ids.tolist()]
    corpus = bm25s.tokenize([*words, asked], return_ids=False, show_progress=False)
    index = bm25s.BM25()
    index.index(corpus[:-1], show_progress=False)
    known = {word for text in corpus[:-1] for word in text}
    scores = index.get_scores([word for word in corpus[-1] if word in known])
    alone = ChunkBlock(ids, changed, start=start)
    alone = ChunkBlock(ids, changed, start=start, lookup=lookup_of(base, heads, alone))
    texts = {"passage": answer([alone], question, config.chunk_length)}
    texts |= {str(count): answer([book], question, count * config.chunk_length) for count in arguments.open}
    found = {
        "number": number,
        "words": "other" if number % 2 else "same",
        "rank": int((weights > weights[right]).sum()),
        "bm25_rank": int((scores > scores[right]).sum()),
        "place": place,
        "answers": texts,
        "right": {name: is_right(text, place) for name, text in texts.items()},
    }
    kv.write(right, 0, before)
    book.lookup.write(right, before)
    book.token_ids[right] = torch.tensor(kept)
    return found


ids = encode_ids(tokenizer, arguments.book.read_text(encoding="utf-8"))
start_of_text = len(ids) // 10  # behind the title pages
ids = ids[start_of_text : start_of_text + arguments.tokens]


def show(done: int, total: int) -> None:
    """How far reading is."""
    print(f"read {done:,} of {total:,}", flush=True)


blocks = encode(base, ids, config, show, start=start, heads=heads)
kept = earlier(arguments.output)
same = (kept.get("tokens"), kept.get("model")) == (arguments.tokens, arguments.model)
rows = kept.get("rows", []) if same else []
for number in range(len(rows), arguments.cases):
    rows.append(case(number, blocks[0]))
    print(rows[-1], flush=True)
    summary = {}
    for words in ("same", "other"):
        own = [row for row in rows if row["words"] == words]
        if own:
            summary[words] = {
                "cases": len(own),
                "right chunk first": float(np.mean([row["rank"] == 0 for row in own])),
                "among four": float(np.mean([row["rank"] < 4 for row in own])),
                "BM25 first": float(np.mean([row["bm25_rank"] == 0 for row in own])),
                "BM25 among four": float(np.mean([row["bm25_rank"] < 4 for row in own])),
                "right answers": {
                    name: float(np.mean([row["right"][name] for row in own])) for name in own[0]["right"]
                },
            }
    about = {"model": arguments.model, "book": arguments.book.name, "tokens": arguments.tokens, "heads": heads.pairs}
    finish(arguments.output, {**about, "chunks": blocks[0].num_chunks, "summary": summary, "rows": rows}, quiet=True)
print(summary)
