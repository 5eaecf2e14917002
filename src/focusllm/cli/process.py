"""The process that a command runs in: its signals, its streams, and how it ends. Light, for it is there first.

0    done
1    standard output cannot be written (a full disk); or, of `verify`, something is wrong
2    bad input, a full disk, too little memory: a `FocusError`, as one line
130  stopped by SIGINT (Ctrl-C)
141  nobody reads standard output any more (`| head`), which needs no words
143  stopped by SIGTERM
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from focusllm.cli.terminal import Stopped, notify
from focusllm.errors import ConfigError, FocusError

EXIT_UNWRITABLE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 128
"""And the signal's number."""


def run(module: str) -> None:
    """Run the `app` of a module with the arguments of this process, and leave.

    Args:
        module: imported here, so that a signal meanwhile ends the process as at any other time.
    """
    with _signals() as signals, _streams(), _remarks_of_libraries():
        try:
            check_arguments(sys.argv[1:])
            importlib.import_module(module).app()
            code: Any = 0
        except BaseException as error:
            signals.is_over = True
            code = _ending(error, signals.received)
        code = _flushed(code)
    sys.exit(code)


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse empty arguments: of a variable that is not set, say. None means anything, but `.` or a default might.

    Raises:
        ConfigError: one is empty.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, equals, value = argument.partition("=")
        if argument == "" or (equals and not value and name.startswith("--")):
            which = name if equals else before if before.startswith("-") else ""
            what = f"the value of {which}" if which else "an argument"
            raise ConfigError(f"{what} is empty; give it, or leave the option out.")


def _ending(error: BaseException, received: int | None) -> Any:
    """Say what there is to say of what ended a command; the exit code."""
    is_done = isinstance(error, SystemExit) and not error.code
    if isinstance(error, Stopped | KeyboardInterrupt) or (received and not is_done):  # whatever a library makes of it
        said = str(error if isinstance(error, Stopped) else Stopped())
        if said:
            notify(said)
        return EXIT_STOPPED + (received or signal.SIGINT)
    if isinstance(error, FocusError):
        notify(f"focusllm: {error}")
        return EXIT_BAD_INPUT
    if isinstance(error, OutputError):
        return _unwritable(error)
    if isinstance(error, SystemExit):
        return error.code
    raise error


class OutputError(Exception):
    """Standard output cannot be written. No OSError, so that nobody takes it for that of another file."""

    def __init__(self, reason: OSError):
        super().__init__(reason.strerror or str(reason))
        self.errno = reason.errno


def _unwritable(error: OutputError) -> int:
    if error.errno == errno.EPIPE:
        return EXIT_STOPPED + getattr(signal, "SIGPIPE", 13)
    notify(f"focusllm: standard output cannot be written ({error}); make room, or write it elsewhere.")
    return EXIT_UNWRITABLE


def _flushed(code: Any) -> Any:
    """The exit code when all that was written is out, which may yet fail."""
    try:
        sys.stdout.flush()
    except OutputError as error:
        code = code or _unwritable(error)
        with suppress(OSError, ValueError):  # what is left in the buffer goes nowhere, instead of failing once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


class _Output:
    """Standard output whose errors are known as such."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            raise OutputError(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Remarks(_Output):
    """Standard error: what cannot be said there is left unsaid."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def _streams() -> Iterator[None]:
    """Streams that take any character, whatever their encoding: on standard output `?` stands for one that is not in it
    (on standard error Python spells it out).
    """
    before = sys.stdout, sys.stderr
    closed = open(os.devnull, "w")  # noqa: SIM115 - for `>&-`
    sys.stdout, sys.stderr = _Output(before[0] or closed), _Remarks(before[1] or closed)
    if isinstance(before[0], io.TextIOWrapper):
        before[0].reconfigure(errors="replace")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        closed.close()


@dataclass
class _Signals:
    received: int | None = None
    """The first one's number."""
    is_over: bool = False
    """Whether the process is about to end anyway."""


@contextmanager
def _signals() -> Iterator[_Signals]:
    """SIGINT and SIGTERM as KeyboardInterrupt, so that everything is cleaned up.

    Signals that the process was started to ignore stay ignored.
    """
    signals = _Signals()

    def stop(number: int, frame: object) -> None:
        signals.received = signals.received or number
        if not signals.is_over:
            raise KeyboardInterrupt

    def unraisable(found: Any) -> None:  # raised where nothing can be, in a destructor say: then in what comes next
        if isinstance(found.exc_value, KeyboardInterrupt) and signals.received:
            signal.raise_signal(signals.received)
        else:
            sys.__unraisablehook__(found)

    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    taken = {number: old for number, old in wanted.items() if signal.getsignal(number) is old}
    if threading.current_thread() is not threading.main_thread():
        taken = {}
    for number in taken:
        signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        for number, old in taken.items():
            signal.signal(number, old)


class _Remark(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notify(record.getMessage())


@contextmanager
def _remarks_of_libraries() -> Iterator[None]:
    """Our own warnings as remarks; those of libraries that have no handlers, which Python would print, not at all."""
    handlers = {logging.getLogger(): logging.NullHandler(), logging.getLogger("focusllm"): _Remark(logging.WARNING)}
    for logger, handler in handlers.items():
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, handler in handlers.items():
            logger.removeHandler(handler)
