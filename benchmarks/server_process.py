"""A server in a process of its own, with a tiny random model, for programs that load it, break it and kill it."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from test_server import tiny

STARTS_WITHIN = 120
"""Seconds until a server answers, on a slow machine."""


@dataclass
class ServerProcess:
    """A running `focusllm serve`."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def resident(self) -> int:
        """Bytes that it holds in memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def num_open(self) -> int:
        """Its file handles, sockets among them."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


def tiny_model(folder: Path) -> Path:
    """The model of the tests, in a folder."""
    llm = tiny()
    llm.save_pretrained(folder)
    return folder


def free_port() -> int:
    """One that nobody listens at."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def served(
    model: Path, log: Path, *options: str, served_as: str = "tiny", port: int | None = None
) -> Iterator[ServerProcess]:
    """`focusllm serve` with a model, until the block ends; what it says goes into a log."""
    port = port or free_port()
    command = [sys.executable, "-m", "focusllm", "serve", "--model", str(model), "--name", served_as]
    command += ["--port", str(port)]
    with log.open("ab") as lines:
        process = subprocess.Popen([*command, *options], stdout=lines, stderr=lines)
    server = ServerProcess(process, port)
    try:
        wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def wait_until_ready(server: ServerProcess) -> None:
    """Until it answers.

    Raises:
        RuntimeError: it ended, or takes too long.
    """
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}; its log says why.")
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not answer within {STARTS_WITHIN} s.")
