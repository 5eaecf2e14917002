"""Evaluation: runs that are killed and go on, refusals, reports."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from focusllm import FocusLLM, cli
from focusllm.errors import ConfigError, DocumentError, FocusError
from focusllm.evaluation import runner, tasks
from focusllm.evaluation.example import Setting
from focusllm.evaluation.method import Method
from focusllm.evaluation.methods import build
from focusllm.evaluation.plan import Plan
from focusllm.evaluation.report import overview, write_report
from focusllm.evaluation.results import by_sentence, differences_of, load, read
from focusllm.evaluation.runner import evaluate
from focusllm.files import PART
from focusllm.memory.chunk_cache import LastText
from focusllm.options import parse_lengths

# --- runs -------------------------------------------------------------------------------------------------------------

# Runs the command line, and kills itself in place of the n-th line, or in the middle of writing it.
KILLED = """
import json, os, signal, sys
from focusllm import cli
from focusllm.evaluation import runner
at, half = int(sys.argv[1]), sys.argv[2] == "half"
append, count = runner._Log.append, 0
def dying(self, line):
    global count
    count += 1
    if count == at:
        if half:
            text = json.dumps(line).encode()
            self.file.write(text[: len(text) // 2])
            self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, line)
runner._Log.append = dying
sys.argv = ["focusllm", *sys.argv[3:]]
cli.main()
"""


def test_a_killed_run_goes_on_to_the_same_bytes(
    model_folder: Path, setting: Setting, tmp_path: Path, focusllm: Any
) -> None:
    def command(folder: Path) -> list[str]:
        selection = ["passkey", "perplexity", "--lengths", "500,700", "--limit", "2", "--text", setting.text]
        methods = ["--method", "focus", "--method", "full"]
        return ["eval", *selection, *methods, "--model", str(model_folder), "--output", str(folder)]

    def killed(folder: Path, at: int, half: str = "") -> bool:
        program = [sys.executable, "-c", KILLED, str(at), half, *command(folder)]
        return subprocess.run(program, capture_output=True).returncode == -signal.SIGKILL

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert focusllm(*command(whole))[0] == 0
    assert killed(broken, 3)
    assert killed(broken, 6, "half")
    assert not (broken / "results.json").exists()
    data = (broken / "examples.jsonl").read_bytes()
    assert len(data.splitlines()) == 2 + 5 + 1
    assert not data.endswith(b"\n")
    assert focusllm(*command(broken))[0] == 0
    assert (broken / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    lines = [json.loads(line) for line in (broken / "examples.jsonl").read_text().splitlines()]
    keys = [(line["task"], line["length"], line["method"], line["id"]) for line in lines]
    assert len(set(keys)) == len(keys) == 12  # 2 tasks, 2 lengths, 2 methods, 2 examples; full does not fit at 700


def plan_for(setting: Setting, **changes: Any) -> Plan:
    plan = Plan(("passkey",), ("full", "streaming"), (200, 520), 2, text=setting.text)
    return dataclasses.replace(plan, **changes)


@pytest.fixture
def small(llm: FocusLLM, monkeypatch: pytest.MonkeyPatch) -> FocusLLM:
    from focusllm.evaluation.tasks import passkey

    monkeypatch.setattr(passkey, "INTRO", "Find it.\n")
    return llm


def test_what_is_known_is_not_told_as_progress(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    run, seen = tmp_path / "run", list[tuple[str, float, float]]()
    evaluate(plan_for(setting), small, run)
    lines = (run / "examples.jsonl").read_text().splitlines()
    (run / "examples.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    evaluate(plan_for(setting), small, run, lambda *entry: seen.append(entry))
    total = 2 * 2 * (200 + 520)
    assert seen == [("passkey 520 streaming", total - 520, total), ("done", total, total)]


def test_results_say_what_was_measured(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    seen: list[tuple[str, float, float]] = []
    results = evaluate(plan_for(setting), small, tmp_path / "run", lambda *entry: seen.append(entry))
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    cells = {(cell["length"], cell["method"]): cell for cell in results["results"]}
    assert cells[200, "full"]["examples"] == 2
    assert cells[520, "full"] == {
        "task": "passkey",
        "length": 520,
        "method": "full",
        "metric": "accuracy",
        "value": None,
        "examples": 0,
        "skipped": 1,
        "reason": "the base model has 256 positions",
    }
    assert results["plan"]["task_versions"] == {"passkey": 1}
    assert set(results["versions"]) >= {"focusllm", "torch", "transformers"}
    assert len(results["adapter"]) == 16
    scores = [line["score"] for line in results["examples"] if line["method"] == "streaming" and line["length"] == 520]
    assert cells[520, "streaming"]["value"] == sum(scores) / 2
    assert "seconds" not in json.dumps(results)
    timings = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert all(cell["seconds"] > 0 for cell in timings if cell["length"] == 200)
    done = [entry[1] for entry in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize("change", [{"limit": 3}, {"seed": 1}, {"methods": ("full",)}, {"lengths": (200,)}])
def test_another_configuration_is_refused(
    change: dict[str, Any], small: FocusLLM, setting: Setting, tmp_path: Path
) -> None:
    evaluate(plan_for(setting), small, tmp_path / "run")
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(ConfigError, match=f"holds a run with plan.{next(iter(change))}.*choose another --output"):
        evaluate(plan_for(setting, **change), small, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_another_adapter_is_refused(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting), small, tmp_path / "run")
    with torch.no_grad():
        next(iter(small.model.base.model.layers[0].self_attn.q_proj.own_parameters().values())).add_(1)
    with pytest.raises(ConfigError, match="a run with adapter"):
        evaluate(plan_for(setting), small, tmp_path / "run")


def test_damaged_lines_are_named(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting), small, tmp_path / "run")
    path = tmp_path / "run" / "examples.jsonl"
    path.write_text("{oops\n" + path.read_text())
    with pytest.raises(DocumentError, match="line 1 is damaged"):
        evaluate(plan_for(setting), small, tmp_path / "run")


def test_what_a_method_has_no_room_for_is_left_out(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_for(setting), tasks=("passkey",), methods=("truncate:to=local", "focus"))
    small.model.focus_config = small.config.replace(local_length=6)
    results = evaluate(plan, small, tmp_path / "run")
    found = {cell["method"]: cell for cell in results["results"]}
    assert found["truncate:to=local"]["skipped"] > 0
    assert "tokens are left for the prompt" in found["truncate:to=local"]["reason"]
    assert found["focus"]["skipped"] == 0


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no room here."),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_one_example_that_cannot_be_done_does_not_end_the_others(
    error: Exception, small: FocusLLM, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, count = Method.generate, iter(range(9))

    def failing(self: Method, example: Any) -> Any:
        if next(count) == 1:
            raise error
        return generate(self, example)

    monkeypatch.setattr(Method, "generate", failing)
    plan = plan_for(setting, methods=("streaming",), lengths=(200,), limit=3)
    (cell,) = evaluate(plan, small, tmp_path / "run")["results"]
    assert (cell["examples"], cell["skipped"]) == (2, 1)
    assert cell["reason"] in ("no room here", "it ran out of memory")


def test_an_error_of_another_kind_is_not_hidden(
    small: FocusLLM, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Method, "generate", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        evaluate(plan_for(setting), small, tmp_path / "run")


def test_other_files_under_the_same_name_are_refused(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting), small, tmp_path / "run")
    Path(setting.text, "more.txt").write_text("More.")
    with pytest.raises(ConfigError, match=r"a run with inputs.text '[0-9a-f]{16}'"):
        evaluate(plan_for(setting), small, tmp_path / "run")


def test_a_text_that_was_edited_at_the_same_size_is_refused(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting), small, tmp_path / "run")
    text = Path(setting.text, "1.txt")
    before = text.stat()
    text.write_text(text.read_text().replace("Page 1", "Line 1"))
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert text.stat().st_size == before.st_size
    with pytest.raises(ConfigError, match=r"a run with inputs.text '[0-9a-f]{16}'"):
        evaluate(plan_for(setting), small, tmp_path / "run")


@contextlib.contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Every write beyond it fails, as on a full disk: the system's own refusal, with another reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1000, 2000])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    small: FocusLLM, setting: Setting, tmp_path: Path, room: int
) -> None:
    whole = evaluate(plan_for(setting), small, tmp_path / "whole")
    run = tmp_path / "run"
    with (
        files_of_at_most(room),
        pytest.raises(FocusError, match=r"cannot be written .*: make room, and run") as refused,
    ):
        evaluate(plan_for(setting), small, run)
    assert "\n" not in str(refused.value)
    for path in run.glob("*.json"):
        json.loads(path.read_text())  # whole, if it is there
    assert not list(run.glob(f"{PART}*"))
    measured = (run / "examples.jsonl").read_bytes().count(b"\n") if (run / "examples.jsonl").exists() else 0
    assert (measured > 0) == (room > 1000)
    found = evaluate(plan_for(setting), small, run)
    assert found["examples"] == whole["examples"]
    assert (run / "examples.jsonl").read_bytes().count(b"\n") == 6  # full does not fit at 520


def test_a_disk_that_fills_up_in_the_middle_of_a_line(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    whole = evaluate(plan_for(setting), small, tmp_path / "whole")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", run)  # as one leaves that is stopped before its first example
    lines = (tmp_path / "whole" / "examples.jsonl").read_bytes().splitlines(keepends=True)
    with (
        files_of_at_most(len(lines[0] + lines[1]) + len(lines[2]) // 2),
        pytest.raises(FocusError, match=r"examples\.jsonl cannot be written .*: make room, and run"),
    ):
        evaluate(plan_for(setting), small, run)
    assert (run / "examples.jsonl").read_bytes().count(b"\n") == 2
    assert evaluate(plan_for(setting), small, run) == whole


def test_a_report_on_a_full_disk_is_whole_or_not_there(
    small: FocusLLM, setting: Setting, tmp_path: Path, focusllm: Any
) -> None:
    evaluate(plan_for(setting), small, tmp_path / "run")
    report = tmp_path / "report"
    with files_of_at_most(30_000):
        code, _, err = focusllm("eval", "report", tmp_path / "run", "-o", report)
    assert code == 2
    assert f"{report} cannot be written (File too large); make room, or choose another folder." in err
    assert len(err.splitlines()) == 1
    left = {path.name: path.read_bytes() for path in report.iterdir()}
    assert "report.html" not in left
    assert focusllm("eval", "report", tmp_path / "run", "-o", report)[0] == 0
    whole = {path.name: path.read_bytes() for path in report.iterdir()}
    assert left.items() <= whole.items()
    with files_of_at_most(30_000):
        assert focusllm("eval", "report", tmp_path / "run", "-o", report)[0] == 2
    assert {path.name: path.read_bytes() for path in report.iterdir()} == whole


def test_a_run_among_its_own_texts_goes_on(small: FocusLLM, setting: Setting) -> None:
    run = Path(setting.text, "run")
    first = evaluate(plan_for(setting), small, run)
    assert evaluate(plan_for(setting), small, run) == first


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets")
def test_a_method_does_not_count_what_another_has_read(
    small: FocusLLM, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Big(LastText):
        def clear(self) -> None:
            super().clear()
            self.more = torch.empty(0)

        def blocks(self, *arguments: Any) -> Any:
            self.more = torch.ones(2**26)  # 256 MiB more than it takes
            return super().blocks(*arguments)

    monkeypatch.setattr(runner, "LastText", Big)
    plan = plan_for(setting, methods=("focus", "streaming"), lengths=(300,), limit=1)
    evaluate(plan, small, tmp_path / "run")
    cells = json.loads((tmp_path / "run" / "timings.json").read_text())
    held = {cell["method"]: cell["peak_memory"] for cell in cells}
    assert held["streaming"] < held["focus"] - 2**27


def test_lengths_are_read() -> None:
    assert parse_lengths("1M, 4096,8k") == [4096, 8192, 2**20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paskey", "--lengths", "1k"], "no task 'paskey'; did you mean passkey"),
        (["passkey", "--lengths", "1k", "--method", "ful"], "no method 'ful'; did you mean full"),
        (["passkey"], "no lengths are given for passkey"),
        (["math", "--lengths", "1k"], "no task 'math'; did you mean math-find"),
        (["passkey", "--lengths", "0"], "the length '0' is not a number of at least 1"),
        (["passkey", "--lengths", "1k", "--limit", "0"], "the limit is 0"),
        (["passkey", "--lengths", "1k", "--set", "chunk_length"], "name=value"),
        (["passkey", "--lengths", "1k", "--set", "dtype=float32"], "unknown setting dtype; known settings are: chunk_"),
        (["report"], "Missing argument"),
        (["report", "nowhere"], "nowhere has no results"),
        (["passkey", "--lengths", "1k", "--output", "/dev/null/run"], "/dev/null/run cannot be written"),
        (["passkey", "--lengths", "1k", "--output", "x" * 300], "x cannot be written (File name too long)"),
        (["report", "x" * 300], "x has no results"),
        (["report", "x", "--output", ""], "the value of --output is empty"),
        (["passkey", "--lengths", "1k", "--data="], "the value of --data is empty"),
    ],
)
def test_bad_commands_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = [] if arguments[0] == "report" or "--output" in arguments else ["--output", "unused-run"]
    monkeypatch.setattr(sys, "argv", ["focusllm", "eval", *arguments, *output])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("unused-run").exists()


def test_places_whose_names_are_too_long(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    long = "x" * 300
    with pytest.raises(DocumentError, match="there is no file or folder xxx"):
        evaluate(plan_for(setting, tasks=("perplexity",), text=long), small, tmp_path / "run")
    with pytest.raises(DocumentError, match=r"the data folder x* has no "):
        evaluate(plan_for(setting, tasks=("longbench-musique",), lengths=(), data=long), small, tmp_path / "run")
    plan = plan_for(setting, tasks=("key-value",), methods=("streaming",), lengths=(300,), limit=1, text=long)
    assert evaluate(plan, small, tmp_path / "run")["inputs"]["text"] is None  # it needs no text


def test_a_family_stands_for_its_tasks() -> None:
    selected = Plan(("passkey", "babilong"), ("focus",), (4096,)).tasks
    assert selected[0] == "passkey"
    assert set(selected[1:]) == {name for name in tasks.registry() if name.startswith("babilong-")} != set()


def test_nothing_selected_is_refused() -> None:
    with pytest.raises(ConfigError, match="no task is selected"):
        Plan((), ("focus",))


def test_a_length_that_a_task_cannot_be_made_at_is_said(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    plan = plan_for(setting, methods=("streaming",), lengths=(60, 300))
    impossible, possible = evaluate(plan, small, tmp_path / "run")["results"]
    assert impossible["value"] is None
    assert "passkey at 60 tokens has no room for its text" in impossible["reason"]
    assert possible["examples"] == 2
    (row, _) = load([tmp_path / "run"])
    assert row.left_out.startswith("streaming, at 60 tokens: left out, for passkey at 60 tokens has no room")
    with pytest.raises(ConfigError, match="no room for its text"):
        evaluate(plan_for(setting, lengths=(60,)), small, tmp_path / "none")


def test_other_weights_are_refused(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    plan = plan_for(setting, methods=("streaming",), lengths=(200,), limit=1)
    evaluate(plan, small, tmp_path / "run")
    with torch.no_grad():
        small.model.base.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(ConfigError, match="holds a run with weights"):
        evaluate(plan, small, tmp_path / "run")


def test_another_machine_goes_on_and_is_named(
    small: FocusLLM, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(setting, methods=("full",), lengths=(200, 520), limit=1)
    first = evaluate(plan, small, tmp_path / "run")
    monkeypatch.setattr(runner, "machine", lambda _: {"processor": "another"})
    assert evaluate(plan, small, tmp_path / "run") == first  # which measures nothing
    monkeypatch.setattr(type(build("full", small)), "fits", lambda *_: None)  # what did not fit there may fit here
    second = evaluate(plan, small, tmp_path / "run")
    assert second["machine"] == first["machine"]
    assert [cell["skipped"] for cell in first["results"]] == [0, 1]
    assert [cell["skipped"] for cell in second["results"]] == [0, 0]
    timings = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert [cell["examples"][0]["processor"] for cell in timings] == [first["machine"]["processor"], "another"]
    assert (
        "another" in differences_of(read([tmp_path / "run", run_beside(plan, small, tmp_path, monkeypatch)]))["passkey"]
    )


def run_beside(plan: Plan, llm: FocusLLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "machine", lambda _: {"processor": "a third"})
    evaluate(plan, llm, folder / "beside")
    return folder / "beside"


def test_packages_that_are_installed_later_do_not_end_a_run(
    small: FocusLLM, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(setting, methods=("streaming",), lengths=(200,), limit=1)
    versions = runner._versions()
    without = {name: number for name, number in versions.items() if name != "bm25s"}
    monkeypatch.setattr(runner, "_versions", lambda: without)
    evaluate(plan, small, tmp_path / "run")
    monkeypatch.setattr(runner, "_versions", lambda: versions)
    evaluate(plan, small, tmp_path / "run")
    monkeypatch.setattr(runner, "_versions", lambda: {**versions, "torch": "1.0"})
    with pytest.raises(ConfigError, match=r"holds a run with versions\.torch"):
        evaluate(plan, small, tmp_path / "run")


def test_rows_that_are_left_out_are_in_the_results(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    row = json.dumps({"input": "Who?", "context": "Ada.", "answers": ["Ada"], "all_classes": None})
    (tmp_path / "musique.jsonl").write_text(f"{row}\n{{broken\n{row}\n")
    plan = plan_for(setting, tasks=("longbench-musique",), methods=("streaming",), lengths=(), data=str(tmp_path))
    results = evaluate(plan, small, tmp_path / "run")
    assert results["notes"]["longbench-musique"][-1] == "1 of 3 rows up to here are left out."
    write_report([tmp_path / "run"], tmp_path / "report")
    assert "1 of 3 rows up to here are left out." in (tmp_path / "report" / "report.html").read_text()


def test_an_error_of_perplexity_is_the_spread_over_texts() -> None:
    lines = [{"nats": nats, "labels": 4} for nats in (8.0, 12.0, 10.0)]
    found = runner.summarise("perplexity", lines)
    assert found["value"] == pytest.approx(math.exp(2.5))
    assert found["standard_error"] == pytest.approx(math.exp(2.5) * 0.5 / math.sqrt(3))  # losses 2, 3 and 2.5


@pytest.mark.parametrize(("typed", "meant"), [("lst", "list"), ("reprot", "report"), ("raport", "report")])
def test_a_mistyped_command_is_no_task(typed: str, meant: str, focusllm: Any) -> None:
    code, _, err = focusllm("eval", typed)
    assert code == 2
    assert f"there is no task {typed!r}; did you mean `focusllm eval {meant}`?" in err
    for name in tasks.registry():  # and no task is taken for a command
        assert not difflib.get_close_matches(name, ["run", "list", "report"], cutoff=0.7)


# --- report -----------------------------------------------------------------------------------------------------------


def test_a_report_is_one_page_with_plots(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting), small, tmp_path / "first")
    texts = plan_for(setting, tasks=("perplexity", "passkey"), methods=("streaming",), lengths=(300, 400))
    evaluate(texts, small, tmp_path / "second")
    paths = write_report([tmp_path / "first", tmp_path / "second"], tmp_path / "report")
    names = {path.name for path in paths}
    assert names >= {
        "report.html",
        "perplexity-by-length.png",
        "perplexity-by-seconds.png",
        "passkey-by-depth.png",
        "passkey-by-seconds.png",
        "passkey-by-memory.png",
    }
    pictures = [path for path in paths if path.suffix == ".png"]
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
    overview = (tmp_path / "report" / "overview.md").read_text()
    assert overview.startswith("| task | tokens | score | examples | full | streaming |\n|---|---|---|---|---|---|\n")
    assert re.search(r"\| passkey \| 520 \| accuracy \| 2 \| - \| [\d.]+ \|", overview)
    page = paths[0].read_text()
    assert "the base model has 256 positions" in page
    assert not re.search(r"(src|href)=.?https?:|<script", page)
    assert page.count("data:image/svg+xml") == len(pictures)


def test_what_runs_of_a_task_differ_in_is_said(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    for name, changes in (
        ("first", {}),
        ("like it", {"methods": ("focus",)}),
        ("Other", {"methods": ("focus",), "seed": 7, "limit": 1, "lengths": (200, 300)}),
        ("longer", {"methods": ("focus",), "limit": 1, "lengths": (300,)}),
        ("apart", {"tasks": ("needle",), "seed": 9}),
    ):
        evaluate(plan_for(setting, **{"lengths": (200,), "methods": ("streaming",)} | changes), small, tmp_path / name)
    assert differences_of(read([tmp_path / name for name in ("first", "like it", "longer", "apart")])) == {}
    assert by_sentence({"a": "x.", "b": "y.", "c": "x."}) == ["a, c: x.", "b: y."]
    said = differences_of(read([tmp_path / "first", tmp_path / "Other", tmp_path / "apart"]))
    assert said == {"passkey": "the runs differ in seed (first: 0; Other: 7), limit (first: 2; Other: 1)."}
    write_report([tmp_path / "first", tmp_path / "Other"], tmp_path / "report")
    for page in ("overview.md", "report.html"):
        assert "runs differ in seed (first: 0; Other: 7)" in (tmp_path / "report" / page).read_text()
    for name, lengths in (("short", (300,)), ("long", (300, 2000))):  # whose texts of 300 tokens are others
        evaluate(
            plan_for(setting, tasks=("perplexity",), methods=("streaming",), lengths=lengths), small, tmp_path / name
        )
    said = differences_of(read([tmp_path / "short", tmp_path / "long"]))
    assert said == {"perplexity": "the runs differ in greatest length (short: 300; long: 2000)."}


def test_families_have_a_mean_of_the_methods_that_have_all(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting, methods=("streaming", "full"), lengths=(300, 200)), small, tmp_path / "run")
    row, other = (row for row in load([tmp_path / "run"]) if row.length == 200)
    values = {"family-a": 0.5, "family-b": 1.0, "family-c": 0.0}
    rows = [dataclasses.replace(row, task=task, value=value) for task, value in values.items()]
    rows += [dataclasses.replace(other, task=task, value=1.0) for task in ("family-a", "family-b", "pair-a", "pair-b")]
    assert [line for line in overview(rows) if "mean" in line[0]] == [
        ["family: mean of 3 tasks", "200", "mean", "", "50.0", ""]
    ]
    assert [line[1] for line in overview(load([tmp_path / "run"]))[1:]] == ["200", "300"]


def test_a_run_without_a_digest_of_weights_is_not_told_apart(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    for name in ("first", "second"):
        evaluate(plan_for(setting, lengths=(200,), methods=("streaming",), limit=1), small, tmp_path / name)
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    for weights, expected in ((None, {}), ("f" * 16, {"passkey"})):
        (tmp_path / "first" / "results.json").write_text(json.dumps(results | {"weights": weights}))
        assert set(differences_of(read([tmp_path / "first", tmp_path / "second"]))) == set(expected)


def test_seconds_of_first_and_later_questions(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(
        plan_for(setting, tasks=("document",), methods=("focus",), lengths=(500,), limit=3), small, tmp_path / "run"
    )
    (row,) = load([tmp_path / "run"])
    (cell,) = json.loads((tmp_path / "run" / "timings.json").read_text())
    times = [example["seconds"] for example in cell["examples"]]
    assert row.first_seconds == times[0]
    assert row.later_seconds == pytest.approx(sum(times[1:]) / 2)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"results": [{}], "examples": [], "plan": {}}'])
def test_results_of_something_else_are_refused(content: str, tmp_path: Path, focusllm: Any) -> None:
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "timings.json").write_text("[]")
    code, _, err = focusllm("eval", "report", tmp_path, "-o", tmp_path / "report")
    assert code == 2
    assert "are not those of a run" in err


def test_methods_of_two_runs_are_told_apart(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    for name in ("first", "second"):
        evaluate(plan_for(setting), small, tmp_path / name)
    methods = {row.method for row in load([tmp_path / "first", tmp_path / "second"])}
    assert methods == {"full (first)", "full (second)", "streaming (first)", "streaming (second)"}


def test_other_ways_of_one_method_are_told_apart(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting, methods=("focus", "streaming"), lengths=(200,)), small, tmp_path / "first")
    evaluate(plan_for(setting, methods=("focus",), lengths=(300,)), small, tmp_path / "second")
    assert {row.method for row in load([tmp_path / "first", tmp_path / "second"])} == {"focus", "streaming"}
    small.model.focus_config = small.config.replace(chunk_length=20)
    evaluate(plan_for(setting, tasks=("needle",), methods=("focus",), lengths=(520,)), small, tmp_path / "third")
    rows = load([tmp_path / name for name in ("first", "second", "third")])
    assert {row.method for row in rows} == {"focus (first)", "focus (second)", "focus (third)", "streaming"}


def test_a_part_of_the_examples_is_said_to_be_one(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    evaluate(plan_for(setting, methods=("streaming",), lengths=(200,)), small, tmp_path / "run")
    (row,) = load([tmp_path / "run"])
    assert "(" not in row.shown
    part = dataclasses.replace(row, skipped=1, reason="it was long")
    assert part.shown == f"{row.shown} (2 of 3)"
    assert part.left_out == "streaming, 1 of 3 examples at 200 tokens: left out, for it was long."
    none = dataclasses.replace(part, examples=0, value=None)
    assert none.left_out == "streaming, at 200 tokens: left out, for it was long."
    assert dataclasses.replace(none, length=None).left_out.startswith("streaming, 1 of 1 examples: left out")


def test_a_run_writes_its_report(model_folder: Path, setting: Setting, tmp_path: Path, focusllm: Any) -> None:
    selection = ["passkey", "--lengths", "400", "--limit", 1, "--text", setting.text, "--method", "streaming"]
    code, _, err = focusllm("eval", *selection, "-m", model_folder, "-o", tmp_path / "run")
    assert code == 0
    assert f"The report is {tmp_path / 'run' / 'report' / 'report.html'}." in err
    assert (tmp_path / "run" / "report" / "passkey-by-seconds.png").exists()


def test_runs_of_one_name_are_told_apart_too(small: FocusLLM, setting: Setting, tmp_path: Path) -> None:
    folders = [tmp_path / parent / "run" for parent in "ab"]
    for folder in folders:
        evaluate(plan_for(setting, methods=("streaming",)), small, folder)
    assert {row.method for row in load(folders)} == {f"streaming ({folder})" for folder in folders}


def test_a_missing_package_is_named_before_anything_is_generated(
    small: FocusLLM, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(self: object, prediction: str, example: object) -> float:
        raise ConfigError("this task needs the package rouge: pip install '.[eval]'.")

    monkeypatch.setattr(type(tasks.get("passkey")), "score", score)
    with pytest.raises(ConfigError, match="needs the package rouge"):
        evaluate(plan_for(setting), small, tmp_path / "run")
    assert not (tmp_path / "run" / "examples.jsonl").exists()
