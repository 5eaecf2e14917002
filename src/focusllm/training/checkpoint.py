"""Checkpoints: everything a training needs to go on as if it had never stopped, each whole or not there at all.

    OUTPUT/checkpoints/step-000200/   adapter (as every adapter), optimizer.pt, state.json
    OUTPUT/checkpoints/.part-*        one that was being written; removed at the next start

The data position is the number of the step: samples are a function of it. Nothing random is drawn elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from focusllm.errors import TrainingError

FOLDER = "checkpoints"


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder so that it is there with all its files or not at all, whenever the process dies.

    Raises:
        TrainingError: the disk is full or not writable; what was there before is still there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
        try:
            write(part)
            for file in part.iterdir():
                _to_disk(file)
            _replace(part, folder)
            _to_disk(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise TrainingError(
            f"{folder} cannot be written ({error.strerror or error}); earlier checkpoints are untouched. Make room and "
            f"run the same command again to go on."
        ) from error


def write_file(path: Path, content: str) -> None:
    """Replace a text file, whole or not at all.

    Raises:
        TrainingError: as `write_whole`.
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error.strerror or error}); make room and run again."
        ) from error


def save(
    output: Path, step: int, state: dict[str, Any], optimizer: dict[str, Any], adapter: Callable[[Path], None]
) -> Path:
    """Write the checkpoint after `step` steps; `adapter` writes the projections into a folder."""

    def write(part: Path) -> None:
        adapter(part)
        torch.save(optimizer, part / "optimizer.pt")
        (part / "state.json").write_text(json.dumps({**state, "step": step}))

    target = output / FOLDER / f"step-{step:06d}"
    write_whole(target, write)
    return target


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and optimizer of a checkpoint.

    Raises:
        TrainingError: files that are damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        return state, torch.load(folder / "optimizer.pt", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes of itself
        raise TrainingError(
            f"the checkpoint {folder} is damaged ({error}); delete this folder to go on from the one before."
        ) from error


def all_of(output: Path) -> list[Path]:
    """The whole checkpoints of a training, oldest first."""
    found = (output / FOLDER).glob("step-*") if (output / FOLDER).is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"step-\d{6,}", path.name) and (path / "state.json").exists())


def prune(output: Path, keep_last: int, best: str | None) -> None:
    """Remove all but the newest checkpoints and the best one, and what a killed process left half written."""
    for path in all_of(output)[:-keep_last]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)
    for path in (output / FOLDER).glob(".part-*"):
        shutil.rmtree(path, ignore_errors=True)


def _replace(part: Path, folder: Path) -> None:
    """Put `part` in the place of `folder`. An old one (a finished adapter) steps aside, for it cannot be replaced."""
    part.chmod(0o755)
    if folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
        os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(part, folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
