"""`focusllm bench` on a tiny model: what is asked for, fitted, skipped and left behind. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_ids
from focusllm.bench import run as bench_run
from focusllm.bench.contenders import QUESTIONS, Focus, Full, Job
from focusllm.bench.measure import bytes_of_weights, expected_seconds, fit, flops_per_token, linear_shapes, spread
from focusllm.bench.plan import Plan, Spec, parse_contenders, sample_text
from focusllm.bench.report import print_table, write_result
from focusllm.checks.info import describe
from focusllm.documents.text import frame_question
from focusllm.errors import ConfigError
from focusllm.llm import FocusLLM
from focusllm.machine import peak_resident
from focusllm.memory.chunking import cut, num_local_chunks, steps
from focusllm.memory.cost import estimate
from focusllm.options import parse_lengths

LENGTHS = [1000, 2000, 4000, 8000]


class Scripted:
    """A process that takes 1 second for 1,000 tokens, full attention the square of that; or does what it is told."""

    trouble: dict[tuple[str, int], tuple[int, str]] = {}  # noqa: RUF012 - the turn, and what happens in it; set by tests
    turns: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, job: Job, limit_minutes: float):
        self.name, self.length = job.spec.name, len(job.document)
        x = self.length / 1000
        self.seconds = x * x if job.spec.is_quadratic else x

    def reply(self) -> dict[str, Any]:
        return {"loaded_memory": 10**8}

    def turn(self) -> dict[str, Any]:
        self.turns.append((self.name, self.length))
        number, reason = self.trouble.get((self.name, self.length), (0, ""))
        if self.turns.count((self.name, self.length)) == number:
            raise bench_run._Lost(reason)
        return {
            "prefill_seconds": self.seconds,
            "seconds_per_token": 0.1 + self.length * 1e-5,
            "second_question_seconds": 0.5,
            "linear_tokens": self.length,
            "bytes_per_token": 10**6,
            "peak_memory": 10**8 + self.length * 1000,
        }

    def end(self) -> None:
        pass

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, model_folder: Path):
    """A run over `Scripted`, as a function of the plan's fields; limits are 1 FLOP/s and 1 byte/s."""
    monkeypatch.setattr(bench_run, "_Process", Scripted)
    monkeypatch.setattr(bench_run, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(bench_run, "copy_rate", lambda *_: 1e9)
    monkeypatch.setattr(Scripted, "trouble", {})
    monkeypatch.setattr(Scripted, "turns", [])

    def run(
        contenders: str,
        *settings: str,
        lengths: list[int] = LENGTHS,
        keep: Callable[[dict[str, Any]], object] = lambda _: None,
        **changes: Any,
    ) -> dict[str, Any]:
        plan = Plan(parse_contenders(contenders, settings), lengths, str(model_folder), threads=1, **changes)
        return bench_run.run(plan, "A text. " * 1100, keep=keep)

    return run


def rows_of(result: dict[str, Any], name: str) -> dict[int, dict[str, Any]]:
    return {row["tokens"]: row for row in result["results"] if row["contender"] == name}


def test_lengths() -> None:
    assert parse_lengths("32K, 4096,1m,4096") == [4096, 32768, 2**20]
    for text in ("", "12x", "0", "4096,", "-5", "1.5K"):
        with pytest.raises(ConfigError, match="is not a number of at least 1"):
            parse_lengths(text)


def test_contenders_and_variants(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    specs = parse_contenders(
        "exact,full,llama.cpp",
        ["chunk_length=512", "big:chunk_length=4096,rechunk=false", "exact:local_length=9"],
        [f"q8={tmp_path}/model.gguf"],
    )
    assert [(spec.name, spec.kind, spec.settings) for spec in specs] == [
        ("exact", "focus", {"chunk_length": 512, "decoding": "exact", "local_length": 9}),
        ("full", "full", {}),
        ("llama.cpp", "llama.cpp", {}),
        ("big", "focus", {"chunk_length": 4096, "rechunk": False}),
        ("q8", "llama.cpp", {}),
    ]
    assert specs[-1].gguf == tmp_path / "model.gguf"
    assert specs[2].gguf is None


def test_spread_and_fit() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    found = fit(LENGTHS, [3e-3 * n + 2e-6 * n * n for n in LENGTHS], (1, 2))
    assert found is not None
    assert found.coefficients == pytest.approx((3e-3, 2e-6))
    assert found.at(100_000) == pytest.approx(3e2 + 2e4)
    line = fit(LENGTHS, [0.1 + 1e-5 * n for n in LENGTHS], (0, 1))
    assert line is not None
    assert line.coefficients == pytest.approx((0.1, 1e-5))
    assert fit([1000], [1.0], (1, 2)) is None
    falling = fit(LENGTHS, [4.0, 3.0, 2.0, 1.0], (0, 1))  # noise must not make a fit negative further out
    assert falling is not None
    assert min(falling.coefficients) >= 0


def test_expected_seconds() -> None:
    assert expected_seconds([], [], 4000, True) is None
    assert expected_seconds([1000], [2.0], 4000, True) == 8.0
    assert expected_seconds([1000, 2000], [1.0, 4.0], 4000, True) == pytest.approx(16)
    assert expected_seconds([1000, 2000], [1.0, 2.0], 4000, False) == pytest.approx(4)


def test_work_is_counted_from_the_models_own_layers(tiny_llm: FocusLLM) -> None:
    base, config = tiny_llm.model.base, tiny_llm.model.config
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    assert flops_per_token(linear_shapes(base)) == 2 * config.num_hidden_layers * per_layer
    total = sum(parameter.nbytes for parameter in base.parameters())
    tied = base.lm_head.weight is base.model.embed_tokens.weight
    assert bytes_of_weights(base) == total - (0 if tied else base.model.embed_tokens.weight.nbytes)


def job_of(model_folder: Path, tiny_llm: FocusLLM, spec: Spec, length: int) -> Job:
    frames = [frame_question(tiny_llm.tokenizer, question) for question in QUESTIONS]
    return Job(spec, Plan([spec], [length], str(model_folder)), torch.get_num_threads(), frames, random_ids(length))


@pytest.mark.parametrize("decoding", ["cached", "exact"])
def test_focus_takes_a_turn(model_folder: Path, tiny_llm: FocusLLM, decoding: str) -> None:
    job = job_of(model_folder, tiny_llm, Spec("focus", "focus", {"decoding": decoding}), 200)
    contender = Focus(job)
    turn = contender.turn(job.document, 3)
    config = contender.llm.config
    before, after = job.frames[0]
    num_own = len(before) + len(after)
    bounds = cut(200, config)
    lengths = [stop - start for start, stop in bounds]
    near = num_local_chunks(steps([start for start, _ in bounds], 200), num_own, config)  # they fit beside the question
    far, last = len(lengths) - near, 200 - bounds[-near][0]
    assert 0 < near < len(lengths)
    assert turn.linear_tokens == sum(lengths) + far * config.prompt_length + num_own + last
    read = lengths[:-near]  # at every token
    if decoding == "cached":  # some of the full ones, and a short last one
        full = [length for length in read if length == config.chunk_length]
        read = full[: config.refresh_rows] + read[len(full) :]
    kv_tokens = sum(read) + len(read) * (config.prompt_length + 1) + num_own + last
    weights = bytes_of_weights(contender.llm.model.base) * (2 if decoding == "exact" else 1)
    assert turn.bytes_per_token == weights + kv_tokens * 2 * 3 * 2 * 16 * 4
    assert min(turn.prefill_seconds, turn.seconds_per_token, turn.second_question_seconds) > 0
    assert contender.peak_memory() > weights


def test_full_takes_a_turn_and_keeps_its_cache(model_folder: Path, tiny_llm: FocusLLM) -> None:
    job = job_of(model_folder, tiny_llm, Spec("full", "full"), 100)
    contender = Full(job)
    seen: list[int] = []
    forward = contender.llm.model.base.forward

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        seen.append(input_ids.shape[1])
        return forward(input_ids, **arguments)

    contender.llm.model.base.forward = counted
    turn = contender.turn(job.document, 3)
    (before, after), (_, other) = job.frames
    assert turn.linear_tokens == len(before) + 100 + len(after)
    assert seen == [turn.linear_tokens, 1, 1, len(other)]  # the document is not read again
    assert turn.seconds_per_token > 0


def test_contenders_take_turns(scripted) -> None:
    result = scripted("focus,full", lengths=[1000, 2000], repeats=2)
    one, two = [("focus", 1000), ("full", 1000)], [("focus", 2000), ("full", 2000)]
    assert Scripted.turns == [*one, *one, *two, *two]
    row = rows_of(result, "full")[2000]
    assert row["status"] == "measured"
    assert row["prefill_seconds"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert row["tokens_per_second"]["median"] == pytest.approx(1 / 0.12)
    assert len(row["rounds"]) == 2
    flops = flops_per_token(linear_shapes(describe(result["plan"]["model"], None, "auto", {})[1]))
    assert row["share_of_products"] == pytest.approx(2000 * flops / 4 / 1e9)
    assert row["share_of_bandwidth"] == pytest.approx(10**6 / 0.12 / 1e9)


def test_full_beyond_its_limit_is_a_fit(scripted) -> None:
    result = scripted("focus,full", full_to=4000)
    row = rows_of(result, "full")[8000]
    assert row["status"] == "fit"
    assert row["reason"] == "longer than --full-to 4000"
    assert row["prefill_seconds"]["median"] == pytest.approx(64)
    assert row["seconds_per_token"]["median"] == pytest.approx(0.18)
    assert row["peak_memory"] == pytest.approx(10**8 + 8 * 10**6)
    assert row["fits"]["prefill_seconds"]["lengths"] == (1000, 2000, 4000)
    assert ("full", 8000) not in Scripted.turns
    assert rows_of(result, "focus")[8000]["status"] == "measured"
    assert rows_of(scripted("full", full_to=1000), "full")[8000]["status"] == "skipped"  # one length gives no fit


def test_what_would_take_too_long_is_skipped(scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 60))  # every turn seems to take a minute
    monkeypatch.setattr(bench_run.time, "perf_counter", lambda: next(clock))
    result = scripted("focus", lengths=[1000, 9000], repeats=1, limit_minutes=5)
    assert rows_of(result, "focus")[1000]["status"] == "measured"
    skipped = rows_of(result, "focus")[9000]
    assert skipped["status"] == "skipped"
    assert skipped["reason"] == "a turn would take about 9.0 minutes (--limit-minutes 5)"


def test_one_that_dies_does_not_stop_the_others(scripted) -> None:
    died = "its process died with exit code -9, perhaps for want of memory"
    Scripted.trouble = {("exact", 2000): (2, died), ("full", 1000): (1, died)}
    result = scripted("focus,exact,full", repeats=3)
    exact, full, focus = (rows_of(result, name) for name in ("exact", "full", "focus"))
    assert [row["status"] for row in exact.values()] == ["measured", "measured", "skipped", "skipped"]
    assert [len(exact[length]["rounds"]) for length in (1000, 2000)] == [3, 1]
    assert [row.get("reason") for row in exact.values()] == [None, died, died, died]
    assert [row["status"] for row in full.values()] == ["skipped"] * 4
    assert [row["status"] for row in focus.values()] == ["measured"] * 4
    assert Scripted.turns.count(("exact", 2000)) == 2


def test_too_little_memory_is_said_before_it_is_spent(scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    config = describe(scripted("focus", lengths=[1000])["plan"]["model"], None, "auto", {})
    needed = estimate(config[1], config[2], 4000).new
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda device: needed)
    rows = rows_of(scripted("focus"), "focus")
    assert rows[4000]["status"] == "measured"
    assert rows[8000]["reason"].startswith("reading 8,000 tokens needs about")


def test_without_llama_cpp(scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(bench_run, "find_spec", lambda name: None)
    row = rows_of(scripted("focus,llama.cpp", lengths=[1000]), "llama.cpp")[1000]
    assert row["status"] == "skipped"
    assert row["reason"] == "not installed (pip install '.[bench]' in a clone of focusllm compiles it)"
    monkeypatch.setattr(bench_run, "find_spec", lambda name: object())
    row = rows_of(scripted("focus,llama.cpp", lengths=[1000]), "llama.cpp")[1000]
    assert row["reason"] == "it reads GGUF files; name this model's with --gguf"


def test_a_short_text_is_repeated(monkeypatch: pytest.MonkeyPatch, scripted, model_folder: Path) -> None:
    documents, notes = [], []
    make = Scripted.__init__
    monkeypatch.setattr(
        Scripted, "__init__", lambda self, job, limit: (documents.append(job.document), make(self, job, limit))[1]
    )
    plan = Plan(parse_contenders("focus"), [5, 23], str(model_folder), repeats=1)
    result = bench_run.run(plan, "0123456789", "digits.txt", notify=notes.append)
    ids = documents[1][:10]
    assert len(set(ids)) == 10
    assert documents == [ids[:5], [*ids, *ids, *ids[:3]]]
    assert result["text"]["repeated"] is True
    assert notes == ["digits.txt has 10 tokens; it is repeated to 23."]


def test_table_and_files(scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result = scripted("focus,full,exact", full_to=4000)
    paths = write_result(result, tmp_path)
    assert [path.name for path in paths] == [
        *("bench.json", "bench-answer.png", "bench-prefill.png", "bench-decoding.png")
    ]
    assert json.loads(paths[0].read_text())["results"] == json.loads(json.dumps(result["results"]))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
    print_table(result, Console(width=120))
    out = capsys.readouterr().out
    assert out.count("full") == 6  # four rows, and twice in the reason
    assert "~64" in out
    assert "full at 8,000 tokens fitted: longer than --full-to 4000." in out
    assert "products 1 GFLOP/s, bandwidth 1.0 GB/s" in out


def test_what_is_measured_is_kept_on_the_way(scripted) -> None:
    kept: list[dict[str, Any]] = []
    result = scripted("focus", keep=kept.append)
    assert [[row["tokens"] for row in found["results"]] for found in kept] == [LENGTHS[:n] for n in (1, 2, 3)]
    assert kept[-1]["results"] == result["results"][:-1]


def test_without_matplotlib_there_are_no_plots(scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert [path.name for path in write_result(scripted("focus", lengths=[1000]), tmp_path)] == ["bench.json"]


def test_from_the_command_line(focusllm, model_folder: Path, tmp_path: Path) -> None:
    """In a real process: what is measured is there, and the last line of the output is the result."""
    output = tmp_path / "out"
    code, out, err = focusllm(
        *("bench", "--contenders", "focus", "--lengths", "200", "--new-tokens", 3, "--repeats", 1),
        *("-m", model_folder, "-o", output, "--threads", 1),
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((output / "bench.json").read_text())
    assert result["command"].startswith("focusllm bench --contenders focus ")
    assert result["machine"]["threads"] == 1
    (row,) = result["results"]
    assert row["status"] == "measured", row
    assert row["peak_memory"] >= row["loaded_memory"] > 0
    assert len(row["rounds"]) == 1


def test_json_alone(focusllm, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_Process": Scripted, "product_rate": lambda *_: 1e9, "copy_rate": lambda *_: 1e9}.items():
        monkeypatch.setattr(bench_run, name, value)
    command = ("bench", "--contenders", "focus", "--lengths", "300", "--json", "-m", model_folder, "-o", tmp_path)
    code, out, _ = focusllm(*command)
    assert code == 0
    assert json.loads(out)["results"][0]["tokens"] == 300
    assert len(out.splitlines()) == 1


def test_a_kept_result_is_shown_again(scripted, focusllm: Any, tmp_path: Path) -> None:
    kept, *plots = write_result({"command": "focusllm bench", **scripted("focus,full", full_to=4000)}, tmp_path)
    code, out, err = focusllm("bench", "--from", kept, "-o", tmp_path / "again")
    assert code == 0, err
    assert "full at 8,000 tokens fitted" in out
    assert "The machine beside 1,000 tokens" in out
    assert json.loads(out.splitlines()[-1]) == json.loads(kept.read_text())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(path.name for path in plots)
    assert focusllm("bench", "--from", kept, "-o", tmp_path, "--json")[1].count("\n") == 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"results": [{"status": "fit"}]}', '{"results": [], "plan": {}}', "[" * 100_000]
)
def test_a_kept_result_of_something_else_is_refused(content: str, focusllm: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    for name, message in ((path, "other.json is no result of focusllm bench; name"), ("none.json", "cannot be read")):
        code, out, err = focusllm("bench", "--from", name, "-o", tmp_path)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_an_unknown_device_is_one_sentence(focusllm: Any, model_folder: Path, tmp_path: Path) -> None:
    code, _, err = focusllm("bench", "--device", "foo", "--lengths", "300", "-m", model_folder, "-o", tmp_path)
    assert code == 2
    assert "device is 'foo', which cannot be used" in err


def test_a_process_that_takes_too_long_is_ended(model_folder: Path, tiny_llm: FocusLLM) -> None:
    job = job_of(model_folder, tiny_llm, Spec("focus", "focus"), 100)
    with bench_run._Process(job, 1e-5) as process, pytest.raises(bench_run._Lost, match="stopped after 1e-05 minutes"):
        process.reply()
    assert not process.process.is_alive()


def test_peak_memory_is_this_process_own() -> None:
    program = """
from focusllm.machine import peak_resident
before = peak_resident()
block = b"x" * 2**27
print(before, peak_resident())
"""
    block = torch.ones(2**29, dtype=torch.uint8)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    before, after = map(int, found.stdout.split())
    assert 2**20 < before < peak_resident() - block.nbytes // 2  # what started it holds more
    assert 2**27 <= after - before + 2**20 < 2**28


def test_sample_text_is_long() -> None:
    assert len(sample_text()) > 300_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "fokus"], "there is no contender 'fokus'; did you mean focus?"),
        (["--contenders", "zzz"], "there is no contender 'zzz'; known are focus, exact, full, llama.cpp."),
        (["--contenders", ","], "there is nothing to measure"),
        (["--lengths", "many"], "the length 'many' is not a number"),
        (["--lengths", "1000000"], "focus at 1,000,000 tokens: 43479 chunks need 43479 positions"),
        (["--lengths", "1000000"], "no chunk_length holds many more than 147072 tokens beside this local_length"),
        (["--set", "chunk=3"], "unknown setting chunk; known settings are: chunk_length"),
        (["--set", "chunk_length"], "is not name=value"),
        (["--set", "chunk_length=many"], "chunk_length is 'many'"),
        (["--set", "full:chunk_length=8"], "is for 'full', which takes none"),
        (["--set", "tight:local_length=8"], "tight: the question takes"),
        (["--new-tokens", "1"], "new_tokens is 1; it must be at least 2."),
        (["--repeats", "0"], "repeats is 0; it must be at least 1."),
        (["--threads", "0"], "threads is 0; it must be at least 1."),
        (["--limit-minutes", "0"], "limit_minutes is 0; it must be above 0, at most 10,080."),
        (["--limit-minutes", "nan"], "limit_minutes is nan; it must be above 0"),
        (["--limit-minutes", "inf"], "limit_minutes is inf; it must be above 0"),
        (["--limit-minutes", "1e6"], "limit_minutes is 1e+06; it must be above 0"),
        (["--limit-minutes", "-1"], "limit_minutes is -1; it must be above 0"),
        (["--device", "meta"], "device is 'meta', which cannot be used"),
        (["--text", "x" * 300], "x cannot be read (File name too long)"),
        (["--gguf", "x" * 300], "there is no file xxx"),
        (["--gguf", f"tall={'x' * 300}"], "there is no file xxx"),
        (["--output", "x" * 300], "x cannot be written (File name too long)"),
        (["--text", "none.txt"], "there is no file none.txt"),
        (["--gguf", "none.gguf"], "there is no file none.gguf"),
        (["--gguf", "focus=none.gguf"], "is for 'focus', which reads none"),
        (["--output", "/proc/nothing"], "/proc/nothing cannot be written"),
    ],
)
def test_bad_input(focusllm, model_folder: Path, tmp_path, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = focusllm("bench", "--lengths", "300", "-m", model_folder, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
