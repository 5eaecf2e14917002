"""A library and processes: killed, several at once, one that may only read; the command line; folders that change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from conftest import byte_tokenizer
from focusllm import ConfigError, DocumentError, FocusLLM, Library, LibraryError
from focusllm.library.syncing import sync, watch
from test_library import BOOK, NEW, book, tiny

TESTS = Path(__file__).parent


def python(*arguments: object, within: Sequence[object] = ()) -> subprocess.Popen[str]:
    """Another process, with what this one can import, started by another command."""
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*map(str, within), sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=TESTS)


def said_by(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_processes_leave_no_wrong_document(tmp_path: Path, kills: int) -> None:
    found = json.loads(said_by(python(TESTS / "library_kills.py", tmp_path / "library", kills, 1)))
    assert found["wrong"] == []
    assert found["documents_checked"] > kills / 2


WRITES = """
import sys, torch
torch.set_num_threads(1)
from test_library import book, tiny
from focusllm import Library
library = Library(sys.argv[1], tiny())
for turn in range(3):
    library.add(book(turn, 4), name=f"{sys.argv[2]} {turn}", into="all")
    library.update(f"{sys.argv[2]} {turn}", book(9, 4))
    library.gc()
print(len(library.entries()))
"""


def test_several_processes_at_once_and_one_that_only_reads(tmp_path: Path) -> None:
    llm, folder = tiny(), tmp_path / "library"
    writers = [python("-c", WRITES, folder, name) for name in ("a", "b")]
    reader, seen = None, 0
    while any(writer.poll() is None for writer in writers):
        if reader is None and (folder / "catalogue.sqlite").exists():
            reader = Library(folder, llm, read_only=True)
        if reader is not None and (names := [entry.name for entry in reader.entries()]):
            document = reader.document(names[-1])
            assert document.text in [book(seed, 4) for seed in (0, 1, 2, 9)]
            seen += 1
    assert seen
    assert [int(said_by(writer)) for writer in writers]
    library = Library(folder, llm)
    assert library.names("all") == sorted(f"{name} {turn}" for name in "ab" for turn in range(3))
    assert len({library.ask(name, "Who?", max_new_tokens=4).text for name in library.names()}) == 1
    assert not library.verify().damaged_files


def test_a_library_that_may_only_be_read(tmp_path: Path) -> None:
    llm, folder = tiny(), tmp_path / "library"
    library = Library(folder, llm)
    library.add(BOOK, name="book")
    answer = library.ask("book", "Who?", max_new_tokens=6)
    library.chunks.make_room(library.nbytes() // 2)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".rows", ".keys", ".sqlite")}

    before = files()
    reader = Library(folder, llm, read_only=True)
    assert reader.ask("book", "Who?", max_new_tokens=6).text == answer.text
    for change in (
        lambda: reader.add("A text."),
        lambda: reader.update("book", "Another."),
        lambda: reader.remove("book"),
        lambda: reader.put_into("set", "book"),
        reader.gc,
    ):
        with pytest.raises(LibraryError, match="may only be read"):
            change()
    assert files() == before


READS = """
import os, sys, torch
torch.set_num_threads(1)
from test_library import tiny
from focusllm import Library
assert not os.access(sys.argv[1], os.W_OK)
for _ in range(2):
    library = Library(sys.argv[1], tiny())
    assert library.read_only
    print(repr(library.ask("book", "Who?", max_new_tokens=6).text), flush=True)
    sys.stdin.readline()
"""


def test_a_mount_that_may_only_be_read(tmp_path: Path) -> None:
    folder, mount = tmp_path / "library", tmp_path / "mount"
    mount.mkdir()
    mounting = f"mount --bind {folder} {mount} && mount -o remount,bind,ro {mount}"
    folder.mkdir()
    unshared = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshared, mounting], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    library = Library(folder, tiny())
    library.add(book(0, 6), name="book")
    answer = library.ask("book", "Who?", max_new_tokens=6)
    process = python("-c", READS, mount, within=[*unshared, f'{mounting} && exec "$@"', "sh"])
    assert process.stdin is not None
    assert process.stdout is not None
    with library.catalogue._transaction():  # another process has it open
        assert process.stdout.readline() == f"{answer.text!r}\n"
    process.stdin.write("\n")  # and now none has
    process.stdin.flush()
    assert said_by(process) == f"{answer.text!r}\n"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.txt").write_text(book(1, 4))
    (folder / "deep" / "two.md").write_text(book(2, 4))
    (folder / "empty.txt").write_text("")
    (folder / ".hidden.txt").write_text("Hidden.")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    return folder


def test_a_folder_is_brought_up_to_date(tmp_path: Path, notes: Path) -> None:
    library = Library(tmp_path / "library", tiny())
    first = sync(library, notes)
    assert first.added == ["notes/deep/two.md", "notes/one.txt"]
    assert len(first.left_out) == 1
    assert "broken.pdf" in first.left_out[0]
    assert library.sets() == {"notes": first.added}
    again = sync(library, notes)
    assert (again.added, again.updated, again.removed, again.num_unchanged, again.num_read) == ([], [], [], 2, 0)
    (notes / "one.txt").write_text(NEW + book(1, 4))
    (notes / "three.txt").write_text("A third note.")
    (notes / "deep" / "two.md").unlink()
    changed = sync(library, notes)
    assert (changed.added, changed.updated, changed.removed) == (
        ["notes/three.txt"],
        ["notes/one.txt"],
        ["notes/deep/two.md"],
    )
    assert 1 <= changed.num_read <= 3
    assert library.ask("notes", "Who?", max_new_tokens=4).citations[0].document.startswith("notes/")
    other = tmp_path / "elsewhere" / "notes"
    other.mkdir(parents=True)
    with pytest.raises(LibraryError, match=r"the set notes is of .*; give this one another name"):
        sync(library, other)
    with pytest.raises(LibraryError, match="lies in"):
        sync(library, tmp_path)
    with pytest.raises(DocumentError, match="there is no folder"):
        sync(library, tmp_path / "nowhere")


def test_a_folder_is_watched(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("watchfiles")
    library, stop = Library(tmp_path / "library", tiny()), threading.Event()
    found = watch(library, notes, stop=stop)
    assert len(next(found).added) == 2
    timer = threading.Timer(1.0, (notes / "three.txt").write_text, ("A third note.",))
    timer.start()
    assert next(found).added == ["notes/three.txt"]
    stop.set()
    assert next(found, None) is None
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(ConfigError, match=r"watching a folder needs the package watchfiles: pip install '\.\[watch\]'"):
        next(watch(library, notes))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    llm: FocusLLM = tiny()
    llm.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_line(
    tmp_path: Path,
    model: Path,
    notes: Path,
    focusllm: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOCUSLLM_LIBRARY", str(tmp_path / "shelf"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    path = tmp_path / "book.txt"
    path.write_text(BOOK)

    def run(*arguments: object) -> dict | list:
        code, out, err = focusllm("library", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    added = run("add", path, "--model", model, "--dtype", "float32", "--into", "sea")
    assert added[0]["num_read"] == added[0]["num_chunks"]
    path.write_text(BOOK + NEW)
    assert run("update", "book.txt")[0]["num_read"] in (1, 2)  # by the model that it was made with
    listed = run("list")
    assert [entry["name"] for entry in listed["documents"]] == ["book.txt"]
    assert listed["sets"] == {"sea": ["book.txt"]}
    shown = run("show", "book.txt")
    assert all(chunk["kept"] for chunk in shown["chunks"])
    assert focusllm("library", "show", "book.txt", "--text")[1] == BOOK + NEW
    asked = run("ask", "sea", "-q", "Who?", "-q", "What?", "--max-new-tokens", 4)
    assert [answer["question"] for answer in asked["answers"]] == ["Who?", "What?"]
    assert asked["answers"][0]["citations"][0]["document"] == "book.txt"
    assert run("sync", notes)["added"]
    assert run("verify")["damaged_files"] == []
    key = next((tmp_path / "shelf" / "chunks").rglob("*.rows"))
    key.write_bytes(key.read_bytes()[:-9])
    assert focusllm("library", "verify")[0] == 1
    assert run("verify")["damaged_files"] == []
    assert run("remove", "notes")["removed"] == ["notes/deep/two.md", "notes/one.txt"]
    assert run("gc")["freed"] > 0
    for arguments, words in (
        (("ask", "sae", "-q", "Who?"), "there is no document 'sae'; did you mean sea?"),
        (("show", "nothing"), "there is no document 'nothing'"),
        (("add", tmp_path / "none.txt"), "there is no file"),
        (("add", path, "--disk-budget", "much"), "'much' is not a number of bytes"),
        (("list", "--library", tmp_path / "nowhere"), "there is no library in"),
        (("gc", "--library", tmp_path), "there is no library in"),
        (("add", path, "--library", tmp_path), "is not a library and has other files"),
    ):
        code, out, err = focusllm("library", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("focusllm: ")
        assert words in err
        assert err.count("\n") == 1
    for command in ("list", ("show", "book.txt"), "gc", "verify"):
        assert focusllm("library", *([command] if isinstance(command, str) else command))[0] == 0


def test_the_command_line_lists_without_torch(tmp_path: Path) -> None:
    Library(tmp_path / "library", tiny()).add("A text.")
    code = "import sys; sys.argv[1:] = ['library', 'list', '-l', sys.argv[1]]\n"
    code += "try:\n    from focusllm.cli import main; main()\nfinally:\n    assert 'torch' not in sys.modules"
    assert "1 document, " in said_by(python("-c", code, tmp_path / "library"))
