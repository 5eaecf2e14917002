"""Files as a whole: text by its byte order mark; written, replaced and removed so that nothing half-done is taken for
the whole, whenever the process dies. What is made has the permissions that the user's umask leaves.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import xxhash

from focusllm.errors import FocusError

PART = ".part-"
"""How the names of things begin that are being written or removed."""
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, with whose mark it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def open_text(path: str | Path) -> TextIO:
    """A text to be read: in the encoding that its byte order mark tells, without one in UTF-8.

    Raises:
        OSError: it cannot be opened; ValueError: its name has a NUL in it.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    return open(path, encoding=next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8"))


def digest_of(path: Path) -> str:
    """Changes when a file's content does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to what this gives; `path` is replaced when all went well."""
    temporary = part_beside(path)
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(mode)  # some libraries, safetensors' say, put a file of their own in its place
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of files, on the disk for good when it is there.

    A folder cannot replace one with files in it, so an old one steps aside for a moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_beside(path)
    part.mkdir()
    try:
        yield part
        give_usual_modes(part.rglob("*"), part)
        for file in part.iterdir():
            to_disk(file)
        put_in_place(part, path)
        to_disk(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def give_usual_modes(paths: Iterable[Path], folder: Path) -> None:
    """Give files the mode that a new file in a folder gets; safetensors writes them for their user alone."""
    probe = part_beside(folder / "mode")
    probe.touch(exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in paths:
        if path.is_file():
            path.chmod(mode)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a finished folder."""
    if path.exists():
        old = path.replace(part_beside(path))
        part.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.replace(path)


def remove_folder(path: Path) -> None:
    """Remove a folder; what is left of it when the process dies meanwhile has no name that anybody looks for.

    Raises:
        OSError: it cannot be renamed.
    """
    shutil.rmtree(path.replace(part_beside(path)), ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written or half removed."""
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


def part_beside(path: Path) -> Path:
    """A new name beside a path, for what is being made or removed."""
    return path.with_name(f"{PART}{secrets.token_hex(8)}")


def to_disk(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk for good."""
    if path.is_dir() and os.name != "posix":  # Windows syncs no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
