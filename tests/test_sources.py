"""Folders and patterns as one document, and names of files that are as short as is unambiguous."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from focusllm import DocumentError
from focusllm.documents.extracted import Extracted
from focusllm.documents.folders import find_files
from focusllm.documents.sources import File, open_source, pieces, short_names


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small repository with what belongs into it and what does not."""
    files = {
        "readme.md": "Read me.\n",
        "src/b.py": "b = 2\n",
        "src/a.py": "a = 1",
        "src/deep/c.py": "c = 3\n",
        "src/deep/kept.log": "kept\n",
        "src/empty/__init__.py": "",
        "out.log": "ignored\n",
        "build/x.py": "ignored\n",
        ".hidden": "hidden\n",
        ".git/config": "hidden\n",
        ".gitignore": "*.log\n/build/\n",
        "src/deep/.gitignore": "!kept.log\n",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "project" / "image.bin").write_bytes(bytes(range(256)) * 8)
    return tmp_path / "project"


def test_a_folder_is_its_files_with_their_names(project: Path) -> None:
    source = open_source(project)
    names = ["readme.md", "src/a.py", "src/b.py", "src/deep/c.py", "src/deep/kept.log"]
    assert [file.name for file in source.files] == names
    assert source.name == "project"
    assert source.text.startswith("=== readme.md ===\nRead me.\n\n=== src/a.py ===\na = 1\n\n=== src/b.py ===\n")
    for file in source.files:
        assert source.text[file.text_start : file.text_end] == (project / file.name).read_text()
    (remark,) = source.remarks
    assert remark.startswith("Files left out: image.bin ")
    assert str(project) not in remark


def test_rules_of_the_folders_above_hold(project: Path) -> None:
    (project / "src" / "x.log").write_text("ignored\n")
    assert find_files(project / "src")[1] == ["a.py", "b.py", "deep/c.py", "deep/kept.log", "empty/__init__.py"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("src/**/*.py", ["a.py", "b.py", "deep/c.py"]),
        ("src/*.py", ["a.py", "b.py"]),
        ("**/*.py", ["src/a.py", "src/b.py", "src/deep/c.py"]),
        ("src/[ab].py", ["a.py", "b.py"]),
    ],
)
def test_a_pattern(project: Path, pattern: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [file.name for file in open_source(project / pattern).files] == names
    monkeypatch.chdir(project)
    source = open_source(pattern)
    assert [file.name for file in source.files] == names
    assert source.name == pattern


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "[slug].txt").write_text("It is a slug.")
    assert open_source(tmp_path / "[slug].txt").text == "It is a slug."


def test_files_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "line\nend.txt").write_text("odd")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    source = open_source(tmp_path)
    assert [file.name for file in source.files] == ["good.txt", "line?end.txt"]
    assert source.remarks == ("Files left out: nowhere.txt is no file; pipe is no file.",)
    for number in range(8):
        (tmp_path / f"{number}.txt").symlink_to(tmp_path / "missing")
    assert open_source(tmp_path).remarks[0].endswith("4.txt is no file, and 5 more.")


@pytest.mark.parametrize("where", ["", "*.txt", "nowhere/*.txt"])
def test_nothing_to_read_is_one_sentence(tmp_path: Path, where: str) -> None:
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "blank.md").write_text(" \n")
    with pytest.raises(DocumentError, match=r"has no file with text|there is no folder") as error:
        open_source(tmp_path / where)
    assert "\n" not in str(error.value)


def test_a_part_of_a_text_is_parts_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("aaaa")
    (tmp_path / "b").write_text("bbbbbb")
    found = Extracted("bbbbbb", ((0, "page 1"), (2, "page 2"), (4, "page 3")))
    read = {"a": Extracted("aaaa"), "b": found}
    monkeypatch.setattr("focusllm.documents.sources.read_file", lambda path, _: read[Path(path).name])
    source = open_source(tmp_path)
    assert source.text == "=== a ===\naaaa\n\n=== b ===\nbbbbbb\n\n"
    got = [(p.file.name, p.start, p.end, p.part) for p in pieces(source.files, 12, 29)]
    assert got == [("a", 2, 4, None), ("b", 0, 3, "page 1 to page 2")]
    assert [p.share for p in pieces(source.files, 12, 29)] == [4 / 17, 13 / 17]
    # A line with a name alone, and what stands between two files, are parts of files without text.
    assert [(p.file.name, p.start, p.end, p.share) for p in pieces(source.files, 17, 22)] == [("b", 0, 0, 1.0)]
    assert [(p.file.name, p.start, p.end, p.share) for p in pieces(source.files, 14, 16)] == [("a", 4, 4, 1.0)]
    whole = list(pieces(source.files, 0, len(source.text)))
    assert [p.file.text_end - p.file.text_start for p in whole] == [p.end for p in whole]
    assert sum(p.share for p in whole) == 1


def test_names_are_as_short_as_is_unambiguous() -> None:
    def names(*given: tuple[str, str | None]) -> list[str]:
        return short_names([File(name, 0, 0, 1, path=path) for name, path in given])

    assert names(("x.txt", "/d/a/x.txt"), ("y.txt", "/d/a/y.txt")) == ["x.txt", "y.txt"]
    assert names(("x.txt", "/d/a/x.txt"), ("x.txt", "/d/b/x.txt")) == ["a/x.txt", "b/x.txt"]
    assert names(("x", "/d/a/c/x"), ("x", "/d/b/c/x"), ("x", "/e/x")) == ["a/c/x", "b/c/x", "e/x"]
    assert names(("x.txt", "/x.txt"), ("x.txt", "/a/x.txt")) == ["/x.txt", "a/x.txt"]
    assert names(("x.txt", "/a/x.txt"), ("x.txt", "/a/x.txt")) == ["x.txt", "x.txt"]
    assert names(("x.txt", None), ("x.txt", "/a/x.txt")) == ["x.txt", "a/x.txt"]
    assert names(("c/x.py", "/d/a/c/x.py"), ("c/x.py", "/d/b/c/x.py")) == ["a/c/x.py", "b/c/x.py"]
