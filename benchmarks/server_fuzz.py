"""Requests that nobody should send, thousands of them: is any answered with a server's error, or not at all?

pip install schemathesis==4.32.5
python benchmarks/server_fuzz.py --requests 10000

One part is made by schemathesis from the server's own description (fields left out, of other types, out of range),
the other here: bodies of good requests with bytes and values changed, cut off, nested, huge, in no Unicode, with odd
headers, methods and paths. Afterwards the server must be alive, and answer a good request as before.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import finish
from server_process import ServerProcess, served, tiny_model

WITHIN = 60
"""Seconds that an answer may take."""
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "\x00",
    "é" * 3000,
    [],
    {},
    [[]],
    {"a": None},
    "\ud800",
    "../../etc",
]
GOOD: dict[str, Any] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 2, "n": 1, "stop": ["a"], "logprobs": 1},
    "/v1/messages": {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 16},
    "/v1/vector_stores": {"name": "notes", "file_ids": []},
    "/tokenize": {"model": "tiny", "prompt": "Hi"},
    "/detokenize": {"model": "tiny", "tokens": [65, 66]},
}
HEADERS = [
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": "multipart/form-data"},
    {"Content-Type": "multipart/form-data; boundary=x"},
    {"Authorization": "Bearer \xff"},
    {"Accept-Encoding": "\x01"},
    {"Expect": "100-continue"},
    {"Range": "bytes=9-1"},
]

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--requests", type=int, default=10_000, help="of both parts together, at least")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--output", default="server_fuzz")


def changed(draw: random.Random, value: Any) -> Any:
    """A JSON value with one place in it changed."""
    value = copy.deepcopy(value)
    place = value
    while isinstance(place, dict | list) and place:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or draw.random() < 0.4:
            what = draw.randrange(3)
            if what == 0:
                del place[key]
            elif what == 1 and isinstance(place, dict):
                place[draw.choice(["x", "stream", "n", "temperature", "seed", "documents", "tools"])] = draw.choice(ODD)
            else:
                place[key] = draw.choice(ODD)
            break
        place = place[key]
    return value


def body(draw: random.Random, good: Any) -> bytes:
    """A body that is mostly no good."""
    raw = json.dumps(changed(draw, good)).encode()
    what = draw.randrange(8)
    if what == 0:
        return raw[: draw.randrange(len(raw) + 1)]
    if what == 1:
        place = draw.randrange(len(raw))
        return raw[:place] + bytes([draw.randrange(256)]) + raw[place + 1 :]
    if what == 2:
        return draw.choice([b"", b"\xff\xfe", b"[" * 20_000, b"nan", b'{"model":' * 500, b"0" * 5000])
    return raw


def status_of(server: ServerProcess, method: str, path: str, sent: bytes, headers: dict[str, str]) -> str:
    """What a request is answered with; "none": nothing within the time."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WITHIN)
    try:
        connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        response.read()
        return str(response.status)
    except TimeoutError:
        return "none"
    except (ConnectionError, http.client.HTTPException, ValueError) as error:  # what is no HTTP may be hung up on
        return type(error).__name__
    finally:
        connection.close()


def fuzz(server: ServerProcess, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """So many requests made here: their statuses, and those that should not be."""
    draw, seen, bad = random.Random(seed), Counter[str](), list[str]()
    paths = [*GOOD, *("/v1/models/%2e%2e", "/v1/files", "/v1/files/x", "/v1/vector_stores/x/files", "/nothing", "/%00")]
    for _ in range(count):
        path = draw.choice(paths)
        method = (
            "POST" if path in GOOD and draw.random() < 0.9 else draw.choice(["GET", "PUT", "DELETE", "POST", "BREW"])
        )
        headers = draw.choice(HEADERS) if draw.random() < 0.1 else {}
        sent = body(draw, GOOD.get(path, {"a": 1}))
        status = status_of(server, method, path, sent, headers)
        seen[status] += 1
        if status.startswith("5") or status == "none":
            bad.append(f"{status} {method} {path} {sent[:300]!r}")
    return seen, bad


def schemathesis(server: ServerProcess, examples: int, seed: int, folder: Path) -> str:
    """What schemathesis found, in its own words."""
    options = ["--checks", "not_a_server_error", "--continue-on-failure", "--exclude-path", "/ready", "--no-color"]
    options += ["--phases", "coverage,fuzzing", "--max-examples", str(examples), "--seed", str(seed)]
    options += ["--request-timeout", str(WITHIN), "--suppress-health-check", "all", "--warnings", "off"]
    program = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json", *options]
    return subprocess.run(program, capture_output=True, text=True, check=False, cwd=folder).stdout


def count_of(server: ServerProcess) -> int:
    """How many requests the server has counted."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WITHIN)
    connection.request("GET", "/metrics")
    told = connection.getresponse().read().decode()
    return round(sum(float(number) for number in re.findall(r"^focusllm_requests_total\{.*\} (\S+)$", told, re.M)))


def main() -> None:
    """Fuzz a server, and keep what was seen."""
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--library", str(folder / "library"), "--max-tokens", "64", "--max-body", str(2**20))
        with served(tiny_model(folder / "model"), folder / "log", *options) as server:
            right = json.dumps(GOOD["/v1/chat/completions"]).encode()
            before = status_of(server, "POST", "/v1/chat/completions", right, {})
            found = schemathesis(server, 150, arguments.seed, folder)
            made = count_of(server)
            seen, bad = fuzz(server, max(arguments.requests - made, 1000), arguments.seed)
            result = {
                "seed": arguments.seed,
                "requests": count_of(server),
                "by_schemathesis": made,
                "schemathesis": found.strip().splitlines()[-25:],
                "statuses": dict(sorted(seen.items())),
                "bad": bad,
                "good_before_and_after": [before, status_of(server, "POST", "/v1/chat/completions", right, {})],
            }
        result["failed_in_the_log"] = (folder / "log").read_text(errors="replace").count("Traceback")
    finish(arguments.output, result, quiet=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
