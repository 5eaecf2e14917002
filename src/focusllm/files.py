"""Writing files and folders so that they are there as a whole or not at all, whenever the process dies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part-"
"""How the names of things begin that are being written."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to what this gives; `path` is replaced when all went well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PART}{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of files, on the disk for good when it is there.

    A folder cannot replace one with files in it, so an old one steps aside for a moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=PART))
    try:
        yield part
        for file in part.iterdir():
            _to_disk(file)
        part.chmod(0o755)
        put_in_place(part, path)
        _to_disk(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a finished folder."""
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=PART))
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


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # Windows syncs no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
