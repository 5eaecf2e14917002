"""Checkpoints: everything a training needs to go on as if it had never stopped, each whole or not there at all.

    OUTPUT/checkpoints/step-000200/   adapter (as every adapter), optimizer.pt, state.json

The data position is the number of the step: samples are a function of it. Nothing random is drawn elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from focusllm.errors import TrainingError, first_line
from focusllm.files import whole_folder

FOLDER = "checkpoints"


def name_of(step: int) -> str:
    """The folder of the checkpoint after a number of steps."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The steps after which a checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn what full and unwritable disks make of themselves (safetensors and torch have errors of their own).

    Raises:
        TrainingError: what was there before is still there.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise TrainingError(
            f"{place} cannot be written ({reason}); what was saved before is untouched. Make room and run the same "
            f"command again to go on."
        ) from error


def save(
    output: Path, step: int, state: dict[str, Any], optimizer: dict[str, Any], adapter: Callable[[Path], None]
) -> Path:
    """Write the checkpoint after `step` steps; `adapter` writes the projections into a folder.

    Raises:
        TrainingError: the disk is full or not writable.
    """
    target = output / FOLDER / name_of(step)
    with disk_errors(target), whole_folder(target) as part:
        adapter(part)
        torch.save(optimizer, part / "optimizer.pt")
        (part / "state.json").write_text(json.dumps({**state, "step": step}))
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
            f"the checkpoint {folder} is damaged ({first_line(error)}); delete it to go on from the one before."
        ) from error


def all_of(output: Path) -> list[Path]:
    """The whole checkpoints of a training, oldest first."""
    found = (output / FOLDER).glob("step-*") if (output / FOLDER).is_dir() else ()
    whole = [path for path in found if re.fullmatch(r"step-\d{6,}", path.name) and (path / "state.json").exists()]
    return sorted(whole, key=step_of)


def prune(output: Path, keep_last: int, best: str | None) -> None:
    """Remove all but the newest checkpoints and the best one."""
    for path in all_of(output)[:-keep_last]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)
