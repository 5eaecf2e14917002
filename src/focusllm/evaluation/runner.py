"""One loop over tasks, lengths, methods and examples that may be killed at any moment and goes on when run again.

config.json       what is measured, on which machine; written first. Another configuration is refused
examples.jsonl    a line for every finished example, appended and flushed; half a line at the end is dropped
results.json      at the end: configuration, versions, machine, means, and every example with prediction and score.
                  Nothing that a clock or another run could change: byte for byte that of an unbroken run
timings.json      at the end: seconds, memory, the share of chunks that needed no reading and the processor, of the
                  same examples
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout

from focusllm import __version__
from focusllm.errors import ConfigError, DocumentError
from focusllm.evaluation.example import Example, LengthError, LossExample, Setting
from focusllm.evaluation.method import Method
from focusllm.evaluation.methods import build
from focusllm.evaluation.plan import Cell, Plan
from focusllm.files import whole_file, writing_to
from focusllm.json_text import parse_json
from focusllm.llm import FocusLLM
from focusllm.machine import machine
from focusllm.memory.chunk_cache import LastText
from focusllm.memory.chunks import add_model
from focusllm.memory.cost import forget_peak_memory, peak_memory
from focusllm.method.adapter import injected, sink_token
from focusllm.method.packed import kept_as

OWN_LENGTH = 8192
"""What an example of a task with own lengths counts for in the progress."""
PACKAGES = ("torch", "transformers", "tokenizers", "bm25s", "rouge", "rouge-score", "jieba", "wonderwords")
"""What numbers depend on, as far as it is installed."""
TIMINGS = ("seconds", "first_token_seconds", "peak_memory", "known_chunks")
MOST_NOTES = 10
GO_ON = "what was measured is kept: make room, and run the same command again to go on"
Report = Callable[[str, float, float], None]
"""Called with (what is measured, tokens done, tokens in all)."""
Line = dict[str, Any]


def evaluate(plan: Plan, llm: FocusLLM, folder: Path, report: Report = lambda *_: None) -> dict[str, Any]:
    """Measure what is missing in a run folder, and write the results.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: the folder holds another run, or another process works in it.
        DocumentError: files that a task needs are missing; a damaged run folder.
        FocusError: a full disk. What was measured stays; run again, it goes on.
    """
    with writing_to(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    setting = plan.setting(llm.tokenizer)
    chunks = LastText(llm.model.base)
    methods = {spec: build(spec, llm, chunks) for spec in plan.methods}
    plan.check_examples(setting)
    with _only_one(folder):
        config = _settled(folder / "config.json", _config(plan, llm, folder, methods), llm)
        total = sum(_weight(cell, plan) for cell in plan.cells)
        lines: dict[Cell, list[Line]] = {}
        notes: dict[str, list[str]] = {}
        before = 0.0
        with closing(_Log(folder / "examples.jsonl")) as log:
            for cell in plan.cells:
                title = f"{cell.task} {f'{cell.length:,} ' if cell.length else ''}{cell.method}"
                chunks.clear()  # another method's memory is not this one's
                setting.notes.clear()
                say = partial(_say, report, title, before, _weight(cell, plan) / plan.limit, total)
                lines[cell] = list(_cell(cell, plan, methods[cell.method], setting, log, say))
                before += _weight(cell, plan)
                if setting.notes:
                    notes[cell.task] = list(dict.fromkeys([*notes.get(cell.task, ()), *setting.notes]))
        report("done", total, total)
        results = _results({**config, "notes": {task: _few(said) for task, said in notes.items()}}, plan, lines)
        _write(folder / "results.json", results)
        _write(folder / "timings.json", [_timing(cell, made) for cell, made in lines.items()])
    return results


def _say(report: Report, title: str, before: float, each: float, total: float, number: int) -> None:
    report(title, before + number * each, total)


def _cell(
    cell: Cell, plan: Plan, method: Method, setting: Setting, log: _Log, say: Callable[[int], None]
) -> Iterator[Line]:
    """The lines of a cell, from the log or measured now. A length that the method cannot hold ends it.

    Args:
        say: called with the number of an example before it is measured: not where it is known, which takes no time, so
            that the time left is not guessed from that.
    """
    task = plan.task(cell.task)
    of_cell = {"task": cell.task, "length": cell.length, "method": cell.method}
    processor = machine(method.base.device)["processor"]
    try:
        examples: Iterator[Example | LossExample] = task.examples(cell.length, plan.limit, setting)
        for number, example in enumerate(examples):
            of_example = {**of_cell, "id": example.id}
            reason = method.fits(method.num_tokens(example))
            if reason is not None:  # found out anew every time: it is quick, and another machine may have more memory
                yield {**of_example, "skipped": reason, "meta": example.meta}
                if task.has_own_lengths:
                    continue
                return
            line = log.known.get((cell.task, cell.length, cell.method, example.id))
            if line is None:
                say(min(number, plan.limit))
                line = {**of_example, **_measure(task, method, example), "processor": processor}
                log.append(line)
            yield line
    except LengthError as error:
        yield {**of_cell, "id": "", "skipped": str(error).rstrip("."), "meta": {}}


def _measure(task: Any, method: Method, example: Example | LossExample) -> Line:
    device, chunks = method.base.device, method.chunks
    forget_peak_memory(device)
    asked, read = chunks.num_asked, chunks.num_read
    try:
        found = _loss(method, example) if isinstance(example, LossExample) else _answer(task, method, example)
    except ConfigError as error:  # found out when it was tried: no room beside the question, say
        return {"skipped": str(error).rstrip("."), "meta": example.meta}
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        chunks.clear()
        return {"skipped": "it ran out of memory", "meta": example.meta}
    found |= {"meta": example.meta, "peak_memory": peak_memory(device)}
    asked, read = chunks.num_asked - asked, chunks.num_read - read
    return found | ({"known_chunks": 1 - read / asked} if asked else {})


def _loss(method: Method, example: LossExample) -> Line:
    begin = time.perf_counter()
    nats, labels = method.loss(example)
    return {"nats": nats, "labels": labels, "seconds": time.perf_counter() - begin}


def _answer(task: Any, method: Method, example: Example) -> Line:
    made = asdict(method.generate(example))
    prediction = made.pop("text")
    scored = {"score": task.score(prediction, example), "references": list(example.references)}
    return {"prediction": prediction, **scored, **made}


def _is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, of Python, or of torch's allocator on a CPU, which has no class of its own for it."""
    is_one = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_one or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _results(config: dict[str, Any], plan: Plan, lines: dict[Cell, list[Line]]) -> dict[str, Any]:
    cells = [{**asdict(cell), **summarise(plan.task(cell.task).metric, made)} for cell, made in lines.items()]
    apart = (*TIMINGS, "processor")
    kept = [{name: line[name] for name in line if name not in apart} for made in lines.values() for line in made]
    return {**config, "results": cells, "examples": kept}


def _few(notes: list[str]) -> list[str]:
    """The first ones and the last one, which counts them."""
    return notes if len(notes) <= MOST_NOTES else [*notes[: MOST_NOTES - 2], "...", notes[-1]]


def summarise(metric: str, lines: Sequence[Line]) -> dict[str, Any]:
    """The value of a cell, a mean score or the perplexity of all labels, and its standard error over the examples."""
    skipped = [line for line in lines if "skipped" in line]
    done = [line for line in lines if "skipped" not in line]
    found: dict[str, Any] = {"metric": metric, "value": None, "examples": len(done), "skipped": len(skipped)}
    if skipped:
        found["reason"] = skipped[0]["skipped"]
    if not done:
        return found
    if "nats" in done[0]:
        labels = sum(line["labels"] for line in done)
        found["value"] = math.exp(sum(line["nats"] for line in done) / labels)
        slope = found["value"]  # of the exponential there
        measured = [line["nats"] * len(done) / labels for line in done]  # their mean is the loss a label
    else:
        measured, slope = [line["score"] for line in done], 1.0
        found["value"] = sum(measured) / len(measured)
    if len(measured) > 1:
        mean = sum(measured) / len(measured)
        variance = sum((value - mean) ** 2 for value in measured) / (len(measured) - 1)
        found["standard_error"] = slope * math.sqrt(variance / len(measured))
    return found


def _timing(cell: Cell, lines: Sequence[Line]) -> dict[str, Any]:
    told = ("id", *TIMINGS, "processor")
    timed = [{name: line[name] for name in told if name in line} for line in lines if "seconds" in line]
    means = {}
    for name in TIMINGS:
        found = [line[name] for line in timed if name in line]
        means[name] = sum(found) / len(found) if found else None
    return {**asdict(cell), **means, "examples": timed}


def _config(plan: Plan, llm: FocusLLM, folder: Path, methods: dict[str, Method]) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    return {
        "plan": plan.to_dict(),
        "inputs": {name: _inputs(path, folder) for name, path in (("data", plan.data), ("text", plan.text))},
        "model": llm.name,
        "weights": _base_digest(llm),
        "device": llm.model.device.type,
        "copies": kept_as(llm.model),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "settings": llm.config.resolved().to_dict(),
        "adapter": _digest(llm),
        "lookup_heads": [list(pair) for pair in found.pairs] if (found := llm.model.found_heads) else "middle layers",
        "sees": {spec: method.sees for spec, method in methods.items()},
        "method_versions": {spec: method.version for spec, method in methods.items()},
        "versions": {"focusllm": __version__, **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _base_digest(llm: FocusLLM) -> str | None:
    """Sixteen hexadecimal digits of the base model's settings and parameters, its vocabulary and chat template; None:
    parameters are of a kind that cannot be looked at.
    """
    digest = xxhash.xxh3_128()
    try:
        add_model(digest, llm.model.base)
    except (NotImplementedError, RuntimeError):
        return None
    words = sorted(llm.tokenizer.get_vocab().items())
    digest.update(repr((words, getattr(llm.tokenizer, "chat_template", None))).encode())
    return digest.hexdigest()[:16]


def _inputs(path: str | None, run: Path) -> str | None:
    """Sixteen hexadecimal digits of the names and contents of the files under a path, those of the run left out; None:
    it is no path.

    Raises:
        DocumentError: a file cannot be read.
    """
    if path is None or not os.path.exists(path):
        return None
    found = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*"))
    digest = hashlib.sha256()
    try:
        for file in found:
            if file.is_file() and not file.resolve().is_relative_to(run.resolve()):
                with file.open("rb") as content:
                    inside = hashlib.file_digest(content, "sha256").hexdigest()
                digest.update(os.fsencode(file.relative_to(path)) + f" {inside}\n".encode())
    except OSError as error:
        raise DocumentError(f"{file} cannot be read ({error.strerror or error}); check its permissions.") from error
    return digest.hexdigest()[:16]


def _digest(llm: FocusLLM) -> str | None:
    """Sixteen hexadecimal digits of the candidate projections, numbers and sink; None: untrained ones."""
    if not llm.has_trained_candidates:
        return None
    sink = sink_token(llm.model.base)
    digest = hashlib.sha256(b"" if sink is None else f"sink {sink}".encode())
    for path, wrapper in sorted(injected(llm.model.base).items()):
        for name, parameter in sorted(wrapper.own_parameters().items()):
            digest.update(f"{path}.{name}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _settled(path: Path, config: dict[str, Any], llm: FocusLLM) -> dict[str, Any]:
    """The folder's configuration with the machine that it was begun on; written if there is none.

    Raises:
        ConfigError: it is another one.
    """
    if not path.exists():
        config = {**config, "machine": machine(llm.model.device)}
        _write(path, config)
        return config
    try:
        old: dict[str, Any] = parse_json(path.read_bytes())
        before, now = _flat(old), _flat(config)
    except (ValueError, AttributeError) as error:
        raise DocumentError(f"{path} is damaged ({error}); choose another --output.") from error
    for name in now:  # not what only one of them has: a package that was installed since, say
        if name in before and before[name] != now[name]:
            raise ConfigError(
                f"{path.parent} holds a run with {name} {before[name]!r}, and this one has {now[name]!r}; "
                f"choose another --output, or repeat that run's command to go on with it."
            )
    return old


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


class _Log:
    """examples.jsonl: what is known, and appending to it."""

    def __init__(self, path: Path):
        self.known: dict[tuple[Any, ...], Line] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a kill or a full disk may leave half a line
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = parse_json(text)
                self.known[line["task"], line["length"], line["method"], line["id"]] = line
            except (ValueError, KeyError, TypeError) as error:
                raise DocumentError(
                    f"{path}, line {number} is damaged; remove the line to measure it again."
                ) from error
        with writing_to(path, GO_ON):
            self.file = path.open("ab", buffering=0)
            self.file.truncate(len(whole))

    def append(self, line: Line) -> None:
        with writing_to(Path(self.file.name), GO_ON):
            rest = json.dumps(line).encode() + b"\n"
            while rest:
                rest = rest[self.file.write(rest) :]

    def close(self) -> None:
        self.file.close()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        with writing_to(folder, GO_ON):
            lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another process measures in {folder}; wait for it, or choose another --output.") from error
    try:
        yield
    finally:
        lock.release()


def _weight(cell: Cell, plan: Plan) -> float:
    return plan.limit * (cell.length or OWN_LENGTH)


def _write(path: Path, content: Any) -> None:
    with writing_to(path, GO_ON), whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
