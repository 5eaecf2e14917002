"""The command line on a tiny model: output, exit codes, and that bad input is one clear line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import GOLDEN

TEXT = "".join(f"Line {i} of the story tells of thing number {i * 7}.\n" for i in range(12))


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    return path


def test_ask(focusllm, model_folder: Path, story: Path) -> None:
    code, out, err = focusllm("ask", story, "-q", "What?", "--model", model_folder, "--max-new-tokens", 6)
    assert code == 0
    assert "Looked for in:" in err
    assert "story.txt, characters " in err
    assert re.search(r"tokens/s; peak memory [\d.]+ [GM]iB", err)
    answer = json.loads(focusllm("ask", story, "-q", "What?", "-m", model_folder, "--max-new-tokens", 6, "--json")[1])
    assert out.strip() == answer["answers"][0]["text"]  # the answer alone


def test_ask_json(focusllm, model_folder: Path, story: Path) -> None:
    code, out, _ = focusllm(
        "ask",
        story,
        story,
        "-q",
        "What?",
        "-q",
        "Why?",
        "-m",
        model_folder,
        "--max-new-tokens",
        4,
        "--json",
        "--citations",
        2,
    )
    answer = json.loads(out)
    assert code == 0
    assert [one["question"] for one in answer["answers"]] == ["What?", "Why?"]
    assert len(answer["answers"][0]["citations"]) == 2
    assert answer["documents"][1]["num_tokens"] == len(TEXT)
    assert answer["answers"][0]["num_generated_tokens"] == 4


def test_ask_keeps_what_was_read(focusllm, model_folder: Path, story: Path, tmp_path: Path) -> None:
    common = ("ask", story, "-q", "What?", "-m", model_folder, "--max-new-tokens", 6, "--json")
    plain = json.loads(focusllm(*common)[1])["answers"][0]["text"]
    for kv_dtype in ("same", "int8", "same"):
        code, out, _ = focusllm(*common, "--store", tmp_path / "kept", "--kv-dtype", kv_dtype)
        assert code == 0
        if kv_dtype == "same":
            assert json.loads(out)["answers"][0]["text"] == plain
    assert len({path.name.split("-")[0] for path in (tmp_path / "kept").iterdir()}) == 2
    code, _, err = focusllm(*common, "--store", story / "no-folder")
    assert code == 2
    assert "cannot be written" in err
    code, _, err = focusllm(*common, "--kv-dtype", "int2")
    assert code == 2
    assert "kv_dtype is 'int2'; it must be 'same', 'int8' or 'int4'" in err


def test_ask_equals_the_library(focusllm, model_folder: Path, story: Path, tiny_llm) -> None:
    _, out, _ = focusllm("ask", story, "-q", "What?", "-m", model_folder, "--max-new-tokens", 6, "--json")
    expected = tiny_llm.ask(tiny_llm.read(story), "What?", max_new_tokens=6)
    assert json.loads(out)["answers"][0]["text"] == expected.text


def test_questions_at_a_prompt(focusllm, model_folder: Path, story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["What?", "Why?", ""])
    monkeypatch.setattr("builtins.input", lambda: next(typed))
    code, _, err = focusllm("ask", story, "-m", model_folder, "--max-new-tokens", 2)
    assert code == 0
    assert err.count("tokens/s") == 2


def test_end_of_input_at_a_prompt(focusllm, model_folder: Path, story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert focusllm("ask", story, "-m", model_folder)[0] == 0


def test_document_from_standard_input(model_folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "focusllm",
        "ask",
        "-",
        "-q",
        "What?",
        "-m",
        str(model_folder),
        "--max-new-tokens",
        "2",
        "--json",
    ]
    result = subprocess.run(command, input=TEXT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["documents"][0]["name"] == "stdin"


def test_a_file_whose_content_looks_like_a_path(focusllm, model_folder: Path, story: Path, tmp_path: Path) -> None:
    (tmp_path / "pointer.txt").write_text(str(story))
    out = focusllm("ask", tmp_path / "pointer.txt", "-q", "What?", "-m", model_folder, "--max-new-tokens", 2, "--json")[
        1
    ]
    assert json.loads(out)["documents"][0]["num_tokens"] == len(str(story))


def test_bad_typed_question_keeps_the_session(
    focusllm, model_folder: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["x" * 500, "What?", ""])
    monkeypatch.setattr("builtins.input", lambda: next(typed))
    code, out, err = focusllm("ask", story, "-m", model_folder, "--max-new-tokens", 2, "--json")
    assert code == 0
    assert "the question takes" in err
    assert [answer["question"] for answer in json.loads(out)["answers"]] == ["What?"]


@pytest.mark.parametrize("store", [True, False])
def test_a_read_that_is_cancelled(
    focusllm, model_folder: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: bool
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("focusllm.memory.chunks.read_behind", stop)
    given = ("--store", tmp_path / "kept") if store else ()
    code, _, err = focusllm("ask", story, "-q", "What?", "-m", model_folder, *given)
    assert code == 130
    expected = (
        f"the same command goes on with what is in {tmp_path / 'kept'}." if store else "with --store FOLDER it could"
    )
    assert f"Stopped; {expected}" in err


def test_generate(focusllm, model_folder: Path, story: Path) -> None:
    code, out, err = focusllm("generate", story, "-m", model_folder, "--max-new-tokens", 5)
    assert code == 0
    assert "5 tokens; first after" in err
    assert "first after" not in out
    code, out, _ = focusllm(
        "generate", story, "-m", model_folder, "--max-new-tokens", 5, "--json", "--temperature", 1, "--seed", 3
    )
    again = focusllm(
        "generate", story, "-m", model_folder, "--max-new-tokens", 5, "--json", "--temperature", 1, "--seed", 3
    )[1]
    assert json.loads(out)["text"] == json.loads(again)["text"]


def test_verify_a_model(focusllm, model_folder: Path) -> None:
    code, out, _ = focusllm("verify", model_folder)
    assert code == 0
    assert out.count("pass  ") == 13
    assert "13 of 13 passed" in out


def test_verify_cases(focusllm, tmp_path: Path) -> None:
    for name in ("i1_mha_1chunk_exact", "t1_continuation"):  # test_conformance.py replays all
        shutil.copytree(GOLDEN / name, tmp_path / name)
    code, out, _ = focusllm("verify", "--cases", tmp_path)
    assert code == 0
    assert out.count("pass  ") == 2
    assert "i1_mha_1chunk_exact: logits f32" in out


def test_verify_reports_failures(focusllm, tmp_path: Path) -> None:
    case = json.loads((GOLDEN / "i7_short_memory" / "case.json").read_text())
    case["forced_tokens"][0] += 1
    (tmp_path / "one").mkdir()
    for name in ("golden", "weights"):
        (tmp_path / "one" / f"{name}.safetensors").write_bytes(
            (GOLDEN / "i7_short_memory" / f"{name}.safetensors").read_bytes()
        )
    (tmp_path / "one" / "case.json").write_text(json.dumps(case))
    code, out, _ = focusllm("verify", "--cases", tmp_path, "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False


def test_info(focusllm, model_folder: Path) -> None:
    code, out, _ = focusllm("info", "-m", model_folder, "-n", 1000, "-n", 2000000000)
    assert code == 0
    assert "full copies" in out
    assert "too much" in out
    assert "too many chunks" in focusllm("info", "-m", model_folder, "-n", 20000, "--chunk-overlap", 0)[1]
    facts = json.loads(focusllm("info", "-m", model_folder, "-n", 1000, "--json")[1])
    assert facts["layers"] == 3
    assert facts["chunk_overlap"] == 1  # of 24 tokens: 44 chunks
    assert facts["costs"][0]["chunks"] == (1000 + 43) * facts["kv_bytes_per_token"]
    assert facts["adapter"] == str(model_folder / "candidate_projections")
    assert json.loads(focusllm("info", "-m", "smollm2-135m", "--json")[1])["adapter"] == "in the package"


def test_train_and_go_on(focusllm, model_folder: Path, story: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    story.write_text(TEXT * 40)
    settings = tmp_path / "tiny.toml"
    settings.write_text(
        "chunk_lengths = [32]\nmemory_lengths = [64]\nlocal_lengths = [16]\nprompt_lengths = [8]\n"
        "answer_length = 8\nsamples_per_memory = 2\nevaluation_memories = 1\nsteps = 3\n"
    )
    command = ("train", story, "-c", settings, "-m", model_folder, "-o", tmp_path / "out", "--rank", 2)
    code, out, err = focusllm(*command)
    assert code == 0
    assert f"The adapter is in {tmp_path / 'out' / 'adapter'}" in out
    assert "step 0, held out: " in err
    assert "the same without memory: " in err
    code, out, _ = focusllm(*command, "--json")  # finished: nothing is done again
    assert code == 0
    assert json.loads(out)["adapter"] == str(tmp_path / "out" / "adapter")
    (tmp_path / "short.txt").write_text(TEXT)
    adapter = ("--adapter", tmp_path / "out" / "adapter")
    assert focusllm("ask", tmp_path / "short.txt", "-q", "What?", "-m", model_folder, *adapter)[0] == 0
    code, _, err = focusllm(*command, "--lr", 0.5)
    assert code == 2
    assert "other settings (learning_rate is 0.004, now 0.5)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there are no sources"),
        (("nowhere",), "there is no file or folder nowhere"),
        (("x", "-c", "none.toml"), "the settings none.toml cannot be read"),
        (("x", "--projections", "qz"), "projections is 'qz'"),
        (("x", "-o", "/proc/nothing"), "/proc/nothing cannot be written"),
        (("x" * 300,), "there is no file or folder xxx"),
        (("x", "-o", "x" * 300), "x cannot be written"),
        (("x", "-c", "x" * 300), "x cannot be read"),
        (("x", "-m", "x" * 300), "x cannot be loaded"),
    ],
)
def test_train_with_bad_input(
    focusllm, model_folder: Path, arguments: tuple, message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    (Path("x") / "x.txt").write_text(TEXT * 40)
    code, out, err = focusllm("train", *arguments, *(() if "-m" in arguments else ("-m", model_folder)))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1  # and no bar beside it


def test_untrained_candidates_are_mentioned(focusllm, model_folder: Path, story: Path) -> None:
    import shutil

    shutil.rmtree(model_folder / "candidate_projections")
    asked = ("ask", story, "-q", "What?", "-m", model_folder, "--max-new-tokens", 1)
    code, _, err = focusllm(*asked, "--far-context", "condensed")
    assert code == 0
    assert "no trained candidate projections are loaded" in err
    code, _, err = focusllm(*asked)
    assert code == 0, err
    assert f"`focusllm heads {model_folder}` finds them" in err
    assert focusllm("heads", model_folder, "--questions", 8)[0] == 0
    assert "Note" not in focusllm(*asked)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "{missing}", "-q", "What?"], "there is no file"),
        (["ask", "{folder}", "-q", "What?"], "folder has no file with text; hidden and ignored"),
        (["ask", "{empty}", "-q", "What?"], "has no text in it"),
        (["ask", "{binary}", "-q", "What?"], "is not text"),
        (["ask", "{latin}", "-q", "What?", "--encoding", "utf-8"], "is not utf-8: byte 0xe9"),
        (["ask", "{story}", "-q", " "], "the question is empty"),
        (["ask", "{story}", "-q", "x" * 500], "the question takes"),
        (["ask", "-"], "give them with -q"),
        (["ask", "{story}", "-q", "What?", "--chunk-length", "4000"], "use a chunk_length of at most"),
        (["ask", "{story}", "-q", "What?", "--chunk-length", "0"], "chunk_length is 0"),
        (["ask", "{story}", "-q", "What?", "--decoding", "fast"], "decoding is 'fast'"),
        (["ask", "{story}", "-q", "What?", "--dtype", "int3"], "dtype is 'int3'"),
        (["ask", "{story}", "-q", "What?", "--device", "tpu"], "device is 'tpu'"),
        (["ask", "{story}", "-q", "What?", "--adapter", "{folder}"], "is not an adapter"),
        (["ask", "{story}", "-q", "What?", "--adapter", "{missing}"], "there is no adapter folder"),
        (["ask", "{story}", "-q", "What?", "--encoding", "utf-99"], "not a known encoding"),
        (["ask", "{story}", "-q", "What?", "--store", "{story}/x"], "cannot be written to"),
        (["ask", "{long}", "-q", "What?"], "cannot be read (File name too long)"),
        (["ask", "{story}", "-q", "What?", "--adapter", "{long}"], "there is no adapter folder xxx"),
        (["ask", "{story}", "-q", "What?", "--adapter", "a/{long}"], "the adapter a/xxx"),
        (["ask", "{story}", "-q", "What?", "--store", "{long}"], "chunks cannot be kept in xxx"),
        (["ask", "{story}", "-q", "What?", "--store", ""], "the value of --store is empty"),
        (["ask", "{story}", "-q", "What?", "--store="], "the value of --store is empty"),
        (["ask", "", "-q", "What?"], "an argument is empty"),
        (["generate", "{long}"], "cannot be read (File name too long)"),
        (["info", "--adapter", "{long}"], "there is no adapter folder xxx"),
        (["ask", "{story}", "-q", "What?", "--device", "meta"], "device is 'meta', which cannot be used"),
        (["ask", "{story}", "-q", "What?", "--device", "xla"], "device is 'xla', which cannot be used"),
        (["ask", "{story}", "-q", "What?", "--device", "mkldnn"], "device is 'mkldnn', which cannot be used"),
        (["verify", "nowhere", "--device", "meta"], "device is 'meta', which cannot be used"),
        (["verify", "{long}"], "cannot be loaded"),
        (["verify", "--cases", "{long}"], "no golden cases in xxx"),
        (["verify", "--cases", ""], "the value of --cases is empty"),
        (["generate", "{missing}"], "there is no file"),
        (["info", "--dtype", "int3"], "dtype is 'int3'"),
        (["verify"], "there is nothing to verify"),
        (["verify", "--cases", "{folder}"], "no golden cases"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    focusllm, model_folder: Path, story: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"missing": tmp_path / "missing.txt", "folder": tmp_path / "folder", "story": story, "long": "x" * 300}
    places["folder"].mkdir()
    for name, data in {
        "empty": b" \n",
        "binary": b"\x7fELF\x02\x01\x01\0\0\0\xff\xfe\x80",
        "latin": b"caf\xe9",
    }.items():
        places[name] = tmp_path / name
        places[name].write_bytes(data)
    filled = [argument.format(**places) for argument in arguments]
    if arguments[0] != "verify":
        filled += ["--model", str(model_folder)]
    code, out, err = focusllm(*filled)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask"],
        ["ask", "x", "--max-new-tokens", "0"],
        ["nonsense"],
        ["ask", "x", "--no-such"],
        ["ask", "x", "--temperature", "nan"],
        ["ask", "x", "--temperature", "inf"],
        ["generate", "x", "--top-p", "nan"],
    ],
)
def test_wrong_usage_exits_with_2(focusllm, arguments: list[str]) -> None:
    assert focusllm(*arguments)[0] == 2


def test_unknown_model(focusllm, story: Path, tmp_path: Path) -> None:
    for name in (tmp_path / "none", "x" * 300, f"owner/{'x' * 300}"):
        for command in (["ask", story, "-q", "What?"], ["info"]):
            code, _, err = focusllm(*command, "-m", name)
            assert code == 2
            assert "cannot be loaded" in err
            assert len(err.splitlines()) == 1


def test_unsupported_model(focusllm, story: Path, tmp_path: Path) -> None:
    import transformers

    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    code, _, err = focusllm("ask", story, "-q", "What?", "-m", tmp_path / "gpt2")
    assert code == 2
    assert "gpt2 models are not supported" in err


def test_version(focusllm) -> None:
    code, out, _ = focusllm("--version")
    assert code == 0
    assert out.strip().count(".") == 2


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["bench", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['focusllm', *{arguments}]\nfrom focusllm.cli.app import app\n"
        "try: app()\nexcept SystemExit: pass\nimport time\nprint('torch' in sys.modules, time.process_time())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    has_torch, seconds = result.stdout.split()[-2:]
    assert has_torch == "False"
    assert float(seconds) < 2  # of the processor, whatever else it does; it takes half a second


# --- the process ------------------------------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """Standard output as if it were one."""

    def isatty(self) -> bool:
        return True


def written(
    focusllm, monkeypatch: pytest.MonkeyPatch, arguments: tuple, kind: type[io.TextIOWrapper], encoding: str
) -> bytes:
    """What a command writes to another standard output."""
    stream = kind(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as changed:
        changed.setattr(sys, "stdout", stream)
        assert focusllm(*arguments)[0] == 0
    return stream.buffer.getvalue()


def test_what_a_model_says_on_a_terminal_and_elsewhere(
    focusllm, model_folder: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("generate", story, "-m", model_folder, "--max-new-tokens", 60, "--temperature", 2, "--seed", 1)
    plain = written(focusllm, monkeypatch, arguments, io.TextIOWrapper, "utf-8").decode()
    controls = set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain))
    assert controls  # into a file it goes as it is
    assert not plain.isascii()
    shown = written(focusllm, monkeypatch, arguments, Terminal, "utf-8").decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    for control in controls:
        assert control.encode("unicode_escape").decode() in shown
    replaced = written(focusllm, monkeypatch, arguments, io.TextIOWrapper, "ascii").decode("ascii")
    assert replaced == plain.encode("ascii", "replace").decode()


def test_what_files_say_does_not_command_the_terminal(focusllm, model_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a\x1b]0;owned\x07\n[bold]b.txt"
    odd.write_text("\x1b]0;owned\x07\x1b[2Jred " * 60)
    code, _, err = focusllm("ask", odd, "-q", "What?", "-m", model_folder, "--max-new-tokens", 2)
    assert code == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", err)
    assert "a?]0;owned??[bold]b.txt, characters" in err  # its name
    assert "\\x1b[2Jred" in err
    code, _, err = focusllm("ask", f"{odd}.none", "-q", "What?", "-m", model_folder)
    assert code == 2
    assert "a\\x1b]0;owned\\x07\\n[bold]b.txt.none" in err
    assert len(err.splitlines()) == 1


def test_names_are_no_markup(focusllm, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slug = tmp_path / "[slug].txt"
    slug.write_text(TEXT)
    code, _, err = focusllm("ask", slug, "-q", "What?", "-m", model_folder, "--max-new-tokens", 2)
    assert code == 0
    assert "Reading [slug].txt" in err
    from focusllm.cli import terminal

    for shown in (terminal.reading_progress, terminal.evaluation_progress, terminal.bench_progress):
        with shown(*(("[b]:smile:",) if shown is terminal.reading_progress else ()), quiet=False) as report:
            report(*(() if shown is terminal.reading_progress else ("[b]:smile:",)), 1, 2)
        assert "[b]:smile:" in capsys.readouterr().err
    with terminal.training_progress(2, quiet=False) as (_, reading, _):
        reading("[b]:smile:", 3)
    assert "[b]:smile:" in capsys.readouterr().err


def test_a_bar_goes_when_its_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    from focusllm.cli.terminal import reading_progress

    def read() -> None:
        with reading_progress("story", quiet=False) as report:
            report(1, 2)
            raise NotImplementedError

    with pytest.raises(NotImplementedError):
        read()
    assert capsys.readouterr().err == ""
    with reading_progress("story", quiet=False):
        pass  # nothing to read
    assert capsys.readouterr().err == ""


def test_a_folder_in_the_place_of_a_store_file(focusllm, model_folder: Path, story: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ("ask", story, "-q", "What?", "-m", model_folder, "--max-new-tokens", 2, "--store", store)
    assert focusllm(*command)[0] == 0
    for path in store.glob("*.rows"):
        path.unlink()
        path.mkdir()
    code, out, err = focusllm(*command)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert ".rows (Is a directory)" in err


def run_cli(*arguments: object, before: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
    """`focusllm ARGUMENTS` as a process of its own, behind some lines of Python."""
    program = f"import sys\nsys.argv = ['focusllm', *sys.argv[1:]]\n{before}\nfrom focusllm.cli import main\nmain()\n"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings})


SIGNAL = """
import os
class Sender:  # as if it came while a module is imported
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Sender())
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("focusllm.cli.app", signal.SIGINT),
        ("typer", signal.SIGINT),
        ("typer", signal.SIGTERM),
        ("torch", signal.SIGTERM),
        ("numpy", signal.SIGINT),
    ],
)
def test_a_signal_at_any_time_is_one_word(module: str, number: signal.Signals, story: Path) -> None:
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # not so behind a shell's `&`
    before = heard + SIGNAL.format(module=module, number=int(number))
    found = run_cli("ask", story, "-q", "What?", "-m", "nowhere", before=before)
    assert found.returncode == 128 + number
    assert (found.stdout, found.stderr) == ("", "Stopped.\n")


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{SIGNAL}"
    assert run_cli("--version", before=before.format(module="typer", number=int(signal.SIGINT))).returncode == 0


def test_sigterm_while_a_model_loads(focusllm, model_folder: Path, story: Path, monkeypatch) -> None:
    def loading(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("focusllm.FocusLLM.from_pretrained", loading)
    before = signal.getsignal(signal.SIGTERM)
    assert focusllm("ask", story, "-q", "What?", "-m", model_folder) == (143, "", "Stopped.\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_a_full_disk_behind_standard_output(argument: str, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        found = run_cli(argument, stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert found.returncode == 1
    assert found.stderr == (
        "focusllm: standard output cannot be written (No space left on device); make room, or write it elsewhere.\n"
    )


def test_nobody_reads_standard_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = run_cli("--help", stdout=writer)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")


def test_standard_streams_that_are_closed_or_full() -> None:
    assert run_cli("--version", before="import os\nos.close(1); sys.stdout = None").returncode == 0
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            assert run_cli("ask", "nowhere.txt", "-q", "What?", stderr=full).returncode == 2


def test_a_damaged_pdf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\nxref\n0 1\ntrailer\n<<>>\n")
    found = run_cli("ask", tmp_path / "a.pdf", "-q", "What?")
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert "a.pdf is not a PDF that can be read" in found.stderr


def test_bytes_in_units_that_show() -> None:
    from focusllm.machine import readable_bytes

    shown = [readable_bytes(count) for count in (0, 1023, 1024, 5.5 * 2**20, 2**30 - 1, 2**30, 1.25e12)]
    assert shown == ["0 bytes", "1023 bytes", "1.0 KiB", "5.5 MiB", "1,024.0 MiB", "1.0 GiB", "1,164.2 GiB"]
