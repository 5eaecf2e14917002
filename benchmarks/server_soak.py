"""Many clients at once, for minutes: is every answer what it is alone, and does nothing leak?

python benchmarks/server_soak.py --clients 64 --minutes 10

Streaming clients ask a tiny random model over HTTP, with prompts of all lengths, some about documents; one in five goes
away in the middle. Every case was asked alone before, and must be answered just so (greedy). Nothing but 429 may be
refused. Memory and file handles of the server are looked at all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2 as httpx

from common import finish
from server_process import ServerProcess, served, tiny_model

WORDS = ("sea", "ship", "whale", "captain", "harbour", "storm", "rope", "sail", "anchor", "gull", "lantern", "cargo")
LONGEST_WAIT = 120
"""Seconds that one answer may take, in the queue and out of it."""

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--clients", type=int, default=64)
parser.add_argument("--minutes", type=float, default=10)
parser.add_argument("--cases", type=int, default=40)
parser.add_argument("--output", default="server_soak")


def cases(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests: path and body."""
    found, draw = [], random.Random(5)

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    for number in range(count):
        body: dict[str, Any] = {"model": "tiny", "max_tokens": draw.randint(1, 60), "stream": True}
        if number % 5 == 4:
            found.append(("/v1/completions", {**body, "prompt": text(draw.randint(1, 300))}))
            continue
        messages = [{"role": "user", "content": text(draw.choice((2, 10, 50, 300)))}]
        if number % 3 == 1:
            messages += [{"role": "assistant", "content": text(5)}, {"role": "user", "content": text(4)}]
        if number % 4 == 0:
            body["documents"] = [{"title": f"log {number}", "text": text(draw.randint(5, 600))}]
        found.append(("/v1/chat/completions", {**body, "messages": messages}))
    return found


async def answered(client: httpx.AsyncClient, path: str, body: dict[str, Any], leaves_after: int | None = None) -> str:
    """The text of a streamed answer; a client that leaves gets no more of it than so many events.

    Raises:
        httpx.HTTPStatusError: it is refused. RuntimeError: the stream says so.
    """
    text, count = "", 0
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            count += 1
            if leaves_after is not None and count > leaves_after:
                return text
    return text


async def ask_on(
    number: int,
    client: httpx.AsyncClient,
    wanted: list[tuple[str, dict[str, Any], str]],
    end: float,
    seen: Counter[str],
) -> None:
    """One client, until the end."""
    draw = random.Random(number)
    while time.monotonic() < end:
        path, body, right = draw.choice(wanted)
        leaves = draw.randint(0, 8) if draw.random() < 0.2 else None
        try:
            text = await asyncio.wait_for(answered(client, path, body, leaves), LONGEST_WAIT)
        except httpx.HTTPStatusError as error:
            seen[f"status {error.response.status_code}"] += 1
            await asyncio.sleep(min(float(error.response.headers.get("retry-after", 1)), 2))
        except (httpx.HTTPError, RuntimeError, TimeoutError) as error:
            seen[f"{type(error).__name__}: {error}"] += 1
        else:
            if leaves is not None:
                seen["left"] += 1
                seen["wrong"] += not right.startswith(text)
            else:
                seen["answered"] += 1
                seen["wrong"] += text != right


async def watched(server: ServerProcess, end: float) -> list[dict[str, float]]:
    """Memory and handles over time."""
    found, began = [], time.monotonic()
    while time.monotonic() < end:
        seconds = time.monotonic() - began
        found.append({"seconds": seconds, "resident": server.resident, "open": server.num_open})
        await asyncio.sleep(2)
    return found


async def soak(server: ServerProcess, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.address, timeout=LONGEST_WAIT, limits=limits) as client:
        wanted = [(path, body, await answered(client, path, body)) for path, body in cases(arguments.cases)]
        open_before, seen = server.num_open, Counter[str]()
        end = time.monotonic() + 60 * arguments.minutes
        clients = [ask_on(number, client, wanted, end, seen) for number in range(arguments.clients)]
        samples, *_ = await asyncio.gather(watched(server, end), *clients)
        await asyncio.sleep(2)
    half = [sample["resident"] for sample in samples[len(samples) // 2 :]]
    first, last = half[: len(half) // 2], half[len(half) // 2 :]
    return {
        "clients": arguments.clients,
        "minutes": arguments.minutes,
        "seen": dict(seen),
        "resident_in_the_third_quarter": sum(first) / len(first),
        "resident_in_the_last_quarter": sum(last) / len(last),
        "open_before": open_before,
        "open_after": server.num_open,
        "most_open": max(sample["open"] for sample in samples),
        "samples": samples[:: max(1, len(samples) // 60)],
    }


def main() -> None:
    """Load a server, and keep what was seen."""
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--far-context", "opened", "--max-waiting", "48")
        with served(tiny_model(folder / "model"), folder / "log", *options) as server:
            result = asyncio.run(soak(server, arguments))
        result["failed_in_the_log"] = (folder / "log").read_text(errors="replace").count("Traceback")
    finish(arguments.output, result, quiet=True)
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=2))


if __name__ == "__main__":
    main()
