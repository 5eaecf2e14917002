"""Kills a process that works on a library, at random moments, and looks at what is left.

python tests/library_kills.py FOLDER KILLS SEED

A process is forked for every kill, from one that has imported everything and never computed: forking those that have
does not go well with threads. It adds, updates, collects and syncs without end; 1 to 400 milliseconds after its first
sign of life it gets SIGKILL. Then another one checks that every document is one of the texts that it may be, holds
exactly the numbers that a library without kills holds, and that no file is damaged. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from focusllm.library.library import Library
from test_library import book, same_numbers, tiny

TEXTS = [book(seed, 4) for seed in range(5)]
NAMES = ("a", "b", "c")


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that works, with a pipe: its id, and where to read from."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    try:
        torch.set_num_threads(1)
        work(writing)
        os._exit(0)
    except BaseException as error:
        os.write(writing, repr(error).encode())
        os._exit(1)


def edit(folder: Path, seed: int, writing: int) -> None:
    """Work on the library until the process is killed."""
    draw = random.Random(seed)
    library = Library(folder, tiny())
    os.write(writing, b".")
    while True:
        name, text = draw.choice(NAMES), draw.choice(TEXTS)
        known = {entry.name for entry in library.entries()}
        what = draw.choice(("put", "put", "remove", "gc", "budget"))
        if what == "put":
            library.update(name, text) if name in known else library.add(text, name=name, into="set")
        elif what == "remove" and name in known:
            library.remove(name)
        elif what == "budget":
            library.chunks.make_room(library.nbytes() // 2)
        else:
            library.gc()


def check(folder: Path, writing: int) -> None:
    """Look at what is left, and say it as JSON; the texts' right numbers are in a library beside it."""
    llm = tiny()
    right, library = Library(folder.with_name("right"), llm), Library(folder, llm)
    found = library.verify()
    wrong = [*found.damaged_files, *found.damaged_documents]
    names = [entry.name for entry in library.entries()]
    for name in names:
        text = library.content(name).text
        if text not in TEXTS or not same_numbers(library.document(name), right.document(str(TEXTS.index(text))), llm):
            wrong.append(name)
    os.write(writing, json.dumps({"documents": len(names), "wrong": wrong}).encode())


def prepare(folder: Path, writing: int) -> None:
    """Make the library with the right numbers."""
    library = Library(folder.with_name("right"), tiny())
    for number, text in enumerate(TEXTS):
        library.add(text, name=str(number))


def outcome(child: int, reading: int) -> bytes:
    """All that a process says until its end."""
    with open(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill, check, and say what was found."""
    draw = random.Random(seed)
    assert not outcome(*forked(lambda writing: prepare(folder, writing)))
    results, parts = [], 0
    for number in range(kills):
        child, reading = forked(lambda writing, number=number: edit(folder, seed * 1000 + number, writing))
        first = os.read(reading, 1)
        time.sleep(draw.uniform(0.001, 0.4))
        os.kill(child, signal.SIGKILL)
        said = first + outcome(child, reading)
        assert said == b".", said
        parts += len(list(folder.rglob(".part-*")))
        results.append(json.loads(outcome(*forked(lambda writing: check(folder, writing)))))
    wrong = [result["wrong"] for result in results if result["wrong"]]
    documents = sum(result["documents"] for result in results)
    found = {"kills": kills, "documents_checked": documents, "half_written_files": parts, "wrong": wrong}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
