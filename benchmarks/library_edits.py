"""An edit of a kept document against reading it anew, in one run; and how many chunks edits of books need.

HF_HUB_OFFLINE=1 python benchmarks/library_edits.py BOOK --characters 700000 --output library_edits_pride

A sentence is added at the start, in the middle and at the end; each time the document is updated, and asked for with
all its chunks ("ready"), which must give the numbers of a new read: tokens, keys, values and look-up keys, bit for bit.
New reads are of the edited text into an empty library. Counted besides, without reading: the chunks that random
insertions, deletions and replacements of sentences change, in this text.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from common import finish
from focusllm import FocusLLM, Library
from focusllm.documents.document import Document
from focusllm.documents.sources import of_text

SENTENCE = "Nobody had expected the clockmaker to come back so soon. "

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("book", type=Path)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--dtype", default="auto")
parser.add_argument("--characters", type=int, default=700_000, help="of the book")
parser.add_argument("--new-reads", type=int, default=1, help="how many edited texts are read anew, too")
parser.add_argument("--random-edits", type=int, default=60, help="that are counted")
parser.add_argument("--count-only", action="store_true", help="read nothing: only what edits change")
parser.add_argument("--folder", type=Path, default=None, help="where the libraries are made")
parser.add_argument("--output", default="library_edits")
arguments = parser.parse_args()

text = arguments.book.read_text(encoding="utf-8")[: arguments.characters]
ends = [match.end() for match in re.finditer(r"[.!?]\s+", text)]
llm = FocusLLM.from_pretrained(arguments.model, adapter="none", dtype=arguments.dtype)


def timed(library: Library, new_text: str, is_new: bool) -> tuple[float, int]:
    """Seconds until a document is ready, and how many chunks were read."""
    start = time.perf_counter()
    change = library.add(new_text, name="book") if is_new else library.update("book", new_text)
    library.document("book")
    return time.perf_counter() - start, change.num_read


def is_same(a: Document, b: Document) -> bool:
    """Whether two documents hold the same tokens and the same numbers."""
    if a.token_ids != b.token_ids or a.chunks != b.chunks:
        return False
    for x, y in zip(a.blocks, b.blocks, strict=True):
        one, other = (block.rows(llm.model.base, 0, 1) for block in (x, y))
        pairs = zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
        if not (torch.equal(x.lookup.packed, y.lookup.packed) and all(torch.equal(*pair) for pair in pairs)):
            return False
    return True


def changed_chunks(library: Library, count: int) -> Counter[int]:
    """How many chunks random edits change."""
    draw, found = random.Random(0), Counter[int]()
    before = {chunk.key for chunk in library.content("book").chunks}
    for _ in range(count):
        number = draw.randrange(len(ends) - 2)
        at, behind = ends[number], ends[number + 1]
        inserted, kept = draw.choice(((SENTENCE, at), ("", behind), (SENTENCE, behind)))
        edited = library._cut(of_text(text[:at] + inserted + text[kept:], "book"))
        found[len({chunk.key for chunk in edited.chunks} - before)] += 1
    return found


def measured(folder: Path) -> dict[str, object]:
    """What edits cost beside new reads."""
    library = Library(folder / "library", llm)
    first_read, num_chunks = timed(library, text, is_new=True)
    print(f"{num_chunks} chunks read in {first_read:.1f} s", flush=True)
    edits = []
    for place, at in {"start": ends[0], "middle": ends[len(ends) // 2], "end": ends[-2]}.items():
        edited = text[:at] + SENTENCE + text[at:]
        seconds, num_read = timed(library, edited, is_new=False)
        edit = {"place": place, "chunks_read": num_read, "seconds": seconds}
        if len(edits) < arguments.new_reads:
            fresh = Library(folder / place, llm)
            edit["new_read_seconds"], _ = timed(fresh, edited, is_new=True)
            edit["times_sooner"] = edit["new_read_seconds"] / seconds
            edit["same_numbers"] = is_same(library.document("book"), fresh.document("book"))
        print(edit, flush=True)
        edits.append(edit)
        library.update("book", text)
    start = time.perf_counter()
    Library(library.folder, llm).document("book")
    return {"first_read_seconds": first_read, "reopened_seconds": time.perf_counter() - start, "edits": edits}


with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    counting = Library(Path(folder) / "counting", llm)
    entry = counting.catalogue.put("book", counting._cut(of_text(text, "book")))
    print(f"{entry.num_tokens:,} tokens in {entry.num_chunks} chunks", flush=True)
    counted = changed_chunks(counting, arguments.random_edits)
    result = {
        "model": arguments.model,
        "dtype": str(llm.model.dtype),
        "book": arguments.book.name,
        "characters": len(text),
        "tokens": entry.num_tokens,
        "chunks": entry.num_chunks,
        "random_edits_by_chunks_changed": {str(count): times for count, times in sorted(counted.items())},
        **({} if arguments.count_only else measured(Path(folder))),
    }

finish(arguments.output, result)
