"""Files and folders that are there as a whole, with the modes that the user's umask gives them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import build, with_candidates
from focusllm import FocusError, FocusForCausalLM
from focusllm.files import PART, whole_file, whole_folder, writing_to


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755), (2, 0o664, 0o775)])
def test_the_umask_is_respected(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    with umask(mask):
        for _ in range(2):  # written, and written over
            with whole_file(tmp_path / "file") as part:
                part.write_text("text")
            with whole_folder(tmp_path / "folder") as part:
                (part / "inside").write_text("text")
            FocusForCausalLM(with_candidates(build())).save_pretrained(tmp_path / "model")
            with whole_folder(tmp_path / "weights") as part:
                safetensors.torch.save_file({"x": torch.zeros(1)}, part / "x.safetensors")
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {modes[path] for path in modes if path.is_file()} == {file}, modes
    assert {modes[path] for path in modes if path.is_dir()} == {folder}, modes
    assert not [path for path in modes if path.name.startswith(PART)]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with whole_file(path) as part:
        part.write_text("text")
    assert path.read_text() == "text"


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def write() -> None:
        with writing_to(tmp_path / "file", "make some"), whole_file(tmp_path / "file") as part:
            part.write_text("ne")
            raise OSError("no room")

    with pytest.raises(FocusError, match=r"cannot be written \(no room\); make some\."):
        write()
    assert (tmp_path / "file").read_text() == "old"
    assert not list(tmp_path.glob(f"{PART}*"))
