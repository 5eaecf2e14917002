"""A long document asked of a server for the first time ever, and after a restart: how much sooner is the first token?

python benchmarks/server_restart.py BOOK FOLDER --tokens 110000

The server is a process of its own, with a library in FOLDER. What counts is the time from the upload's beginning, and
after the restart from the question, to the first token that a client receives; the model's loading is not in it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import openai

from common import finish
from focusllm import FocusLLM
from focusllm.documents.text import encode_text
from server_process import ServerProcess, served

QUESTION = "What is the name of the ship?"

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("book", type=Path)
parser.add_argument("folder", type=Path, help="must be empty, or not there")
parser.add_argument("--tokens", type=int, default=110_000)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--questions", type=int, default=3, help="how often it is restarted and asked")
parser.add_argument("--output", default="server_restart")


def client_of(server: ServerProcess) -> openai.OpenAI:
    """A client."""
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=24 * 3600)


def first_token(client: openai.OpenAI, model: str, store: str) -> float:
    """Seconds until the first token of an answer comes."""
    began = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=4,
        stream=True,
        extra_body={"vector_store_ids": [store]},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            return time.perf_counter() - began
    raise RuntimeError("the answer has no token.")


def main() -> None:
    """Measure, and keep what was measured."""
    arguments = parser.parse_args()
    tokenizer = FocusLLM.from_pretrained(arguments.model, weights="plain").tokenizer
    book = arguments.book.read_text(encoding="utf-8")
    spans = encode_text(tokenizer, book).spans[: arguments.tokens]
    text = book[: spans[-1][1]].encode()
    options = ("--library", str(arguments.folder), "--max-body", str(2**26))
    name, log, after = arguments.model, arguments.folder.with_suffix(".log"), list[float]()
    with served(Path(name), log, *options, served_as=name) as server:
        client, began = client_of(server), time.perf_counter()
        file = client.files.create(file=("book.txt", text), purpose="assistants")
        store = client.vector_stores.create(name="books").id
        state = client.vector_stores.files.create_and_poll(file.id, vector_store_id=store)
        if state.status != "completed":
            raise RuntimeError(f"the file is {state.status}: {state.last_error}")
        read = time.perf_counter() - began
        first = read + first_token(client, name, store)
        print(f"read in {read:.1f} s, first token after {first:.1f} s", flush=True)
    for _ in range(arguments.questions):
        with served(Path(name), log, *options, served_as=name) as server:
            after.append(first_token(client_of(server), name, store))
            print(f"after a restart: {after[-1]:.2f} s", flush=True)
    result = {
        "model": name,
        "tokens": len(spans),
        "first_ever_seconds": first,
        "after_restart_seconds": after,
        "times_sooner": first / max(after),
    }
    finish(arguments.output, result, quiet=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
