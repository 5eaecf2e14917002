"""Writing files and folders so that they are there as a whole or not at all, whenever the process dies.

Their modes are those of the user's umask, as if they had been written without a detour.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from focusllm.errors import FocusError

PART = ".part-"
"""How the names of things begin that are being written."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to what this gives; `path` is replaced when all went well."""
    temporary = _part_beside(path)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))  # safetensors puts a file of its own there, for its user alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of files, on the disk for good when it is there.

    A folder cannot replace one with files in it, so an old one steps aside for a moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_beside(path)
    part.mkdir()
    try:
        yield part
        give_usual_modes(part.rglob("*"), part)
        for file in part.iterdir():
            _to_disk(file)
        put_in_place(part, path)
        _to_disk(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def give_usual_modes(paths: Iterable[Path], folder: Path) -> None:
    """Give files the mode that a new file in a folder gets; safetensors writes them for their user alone."""
    probe = _part_beside(folder / "mode")
    probe.touch(exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in paths:
        if path.is_file():
            path.chmod(mode)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a finished folder."""
    if path.exists():
        old = _part_beside(path)
        path.replace(old)
        part.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.replace(path)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(f"{PART}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def writing_to(place: Path, remedy: str) -> Iterator[None]:
    """Turn what full and unwritable disks raise into one sentence. For what writes alone: nothing else is looked at.

    Raises:
        FocusError: with the place, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        raise FocusError(f"{place} cannot be written ({error.strerror or error}); {remedy}.") from error


def _part_beside(path: Path) -> Path:
    return path.with_name(f"{PART}{os.urandom(8).hex()}")


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # Windows syncs no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
