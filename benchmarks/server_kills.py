"""A server killed under load, again and again: is every file that it acknowledged there afterwards, and right?

python benchmarks/server_kills.py --kills 20

Clients upload files, put them into a vector store, ask about them and delete some, without end; at a random moment the
server gets SIGKILL, and another one is started on the same folder. Then every file whose upload was answered must be
there byte for byte (unless its removal was asked for), become read by itself, and be answered about as in a library
that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import openai

from common import finish
from server_process import ServerProcess, free_port, served, tiny_model

QUESTION = "What is told of it?"
PLACES = ("harbour", "attic", "mill", "church", "garden", "quarry", "cellar", "tower")
UNTIL_READ = 120
"""Seconds until all files are read after a start."""

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--kills", type=int, default=20)
parser.add_argument("--clients", type=int, default=4)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--output", default="server_kills")


def text_of(number: int) -> bytes:
    """The text of a file, of one chunk or many."""
    draw = random.Random(number)
    lines = [
        f"File {number}, line {n}: a thing lies in the {draw.choice(PLACES)}.\n" for n in range(draw.randint(1, 60))
    ]
    return "".join(lines).encode()


@dataclass
class Known:
    """What clients were told."""

    store: str = ""
    uploaded: dict[str, int] = field(default_factory=dict)
    """Files whose upload was answered, and which text each has."""
    attached: set[str] = field(default_factory=set)
    """Those that were put into the store, answered."""
    leaving: set[str] = field(default_factory=set)
    """Those whose removal was asked for, answered or not."""
    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def client_of(server: ServerProcess) -> openai.OpenAI:
    """A client."""
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60)


def work(server: ServerProcess, known: Known, seed: int) -> None:
    """One client, until the server is gone."""
    draw, client = random.Random(seed), client_of(server)
    try:
        while True:
            what = draw.choice(("upload", "upload", "ask", "delete"))
            with known.lock:
                known.count += 1
                number, there = known.count, sorted(known.attached - known.leaving)
            if what == "upload":
                name = f"file{number}.txt"
                file = client.files.create(file=(name, text_of(number)), purpose="assistants")
                with known.lock:
                    known.uploaded[file.id] = number
                client.vector_stores.files.create(known.store, file_id=file.id)
                with known.lock:
                    known.attached.add(file.id)
            elif what == "ask" and there:
                ask(client, [draw.choice(there)])
            elif what == "delete" and len(there) > 5:
                file_id = draw.choice(there)
                with known.lock:
                    known.leaving.add(file_id)
                client.files.delete(file_id)
    except (openai.APIConnectionError, openai.NotFoundError):  # killed; or asked about what another has just deleted
        return


def ask(client: openai.OpenAI, file_ids: list[str]) -> str:
    """The answer about some files."""
    parts = [{"type": "file", "file": {"file_id": file_id}} for file_id in file_ids]
    content = [*parts, {"type": "text", "text": QUESTION}]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
        max_tokens=12,
    )
    return answer.choices[0].message.content or ""


def problems(server: ServerProcess, fresh: ServerProcess, known: Known, draw: random.Random) -> list[str]:
    """What is not as it was acknowledged."""
    client, found = client_of(server), list[str]()
    listed = {file.id for file in client.files.list(limit=10_000)}
    for file_id, number in known.uploaded.items():
        if file_id in known.leaving:
            if file_id not in listed:
                continue  # its removal may or may not have been complete
        elif file_id not in listed:
            found.append(f"{file_id} is lost")
            continue
        if client.files.content(file_id).content != text_of(number):
            found.append(f"{file_id} has another content")
    end = time.monotonic() + UNTIL_READ
    for file_id in sorted(known.attached - known.leaving):
        state = client.vector_stores.files.retrieve(file_id, vector_store_id=known.store)
        while state.status == "in_progress" and time.monotonic() < end:
            time.sleep(0.1)
            state = client.vector_stores.files.retrieve(file_id, vector_store_id=known.store)
        if state.status != "completed":
            found.append(f"{file_id} is {state.status}: {state.last_error}")
    sure = sorted(known.attached - known.leaving)
    for file_id in draw.sample(sure, min(4, len(sure))):
        number = known.uploaded[file_id]
        other = client_of(fresh)
        same = other.files.create(file=(f"file{number}.txt", text_of(number)), purpose="assistants")
        if ask(client, [file_id]) != ask(other, [same.id]):
            found.append(f"{file_id} is answered about otherwise than in a fresh library")
    return found


def main() -> None:
    """Kill a server, and keep what was found."""
    arguments = parser.parse_args()
    draw, known, found, seen = random.Random(arguments.seed), Known(), list[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        model, log = tiny_model(folder / "model"), folder / "log"
        with served(model, log, "--library", str(folder / "fresh")) as fresh:
            for kill in range(arguments.kills + 1):
                with served(model, log, "--library", str(folder / "library"), port=port) as server:
                    if kill:
                        found += [f"after kill {kill}: {told}" for told in problems(server, fresh, known, draw)]
                    if kill == arguments.kills:
                        break
                    known.store = known.store or client_of(server).vector_stores.create(name="all").id
                    seeds = [arguments.seed + 100 * kill + n for n in range(arguments.clients)]
                    threads = [threading.Thread(target=work, args=(server, known, seed)) for seed in seeds]
                    for thread in threads:
                        thread.start()
                    time.sleep(draw.uniform(0.2, 4))
                    server.kill()
                    for thread in threads:
                        thread.join()
                seen["kills"] += 1
                print(kill, len(known.uploaded), "files", len(found), "problems", flush=True)
        failed = log.read_text(errors="replace").count("Traceback")
    result = {
        **seen,
        "seed": arguments.seed,
        "clients": arguments.clients,
        "uploaded": len(known.uploaded),
        "asked_to_be_removed": len(known.leaving),
        "problems": found,
        "failed_in_the_log": failed,
    }
    finish(arguments.output, result, quiet=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
