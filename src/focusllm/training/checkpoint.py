"""Checkpoints: everything a training needs to go on as if it had never stopped, each whole or not there at all.

    OUTPUT/checkpoints/step-000200/           adapter (as every adapter), optimizer.pt, state.json, checksums.json
    OUTPUT/checkpoints/damaged-step-000200/   one whose checksums are wrong, set aside; nothing reads it

The data position is the number of the step: samples are a function of it. Nothing random is drawn elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from focusllm.errors import TrainingError, first_line
from focusllm.files import digest_of, remove_folder, remove_parts, whole_folder
from focusllm.huggingface.adapter_files import load_tensors
from focusllm.json_text import parse_json

FOLDER = "checkpoints"
SUMS_NAME = "checksums.json"
FORMAT = 2
"""Those before 2 have no checksums."""
LEAST = 2
"""Checkpoints that are kept at least, for the newest may turn out to be damaged."""


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
        (part / "state.json").write_text(json.dumps({**state, "step": step, "format": FORMAT}))
        write_sums(part)
    return target


def write_sums(folder: Path) -> None:
    """Write the checksums of a checkpoint's files, but not of the model card, which nothing is read from."""
    sums = {
        path.name: digest_of(path) for path in sorted(folder.iterdir()) if path.name not in (SUMS_NAME, "README.md")
    }
    (folder / SUMS_NAME).write_text(json.dumps(sums))


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint; empty: nothing. One without checksums, of an earlier version, is opened."""
    try:
        state = parse_json((folder / "state.json").read_bytes())
        if state.get("format", 1) >= FORMAT or (folder / SUMS_NAME).exists():
            sums = parse_json((folder / SUMS_NAME).read_bytes())
            odd = [name for name, written in sums.items() if digest_of(folder / name) != written]
            return f"{odd[0]} is not what was written" if odd else ""
        load(folder)
        load_tensors(folder)
    except Exception as error:  # whatever a damaged archive makes of itself
        return first_line(error)
    return ""


def newest(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from (None: there is none yet), and damaged ones that are newer, with what is wrong.

    Raises:
        TrainingError: all are damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(all_of(output)):
        reason = fault(folder)
        if not reason:
            return folder, damaged
        damaged[folder] = reason
    if damaged:
        folder, reason = next(iter(damaged.items()))
        raise TrainingError(
            f"the checkpoint {folder} is damaged ({reason}), and there is no whole one before it; use another output "
            f"folder to begin anew."
        )
    return None, damaged


def set_aside(folder: Path) -> None:
    """Give a damaged checkpoint a name that nothing reads."""
    aside = folder.with_name(f"damaged-{folder.name}")
    if aside.exists():
        remove_folder(aside)
    folder.replace(aside)


def clear(output: Path) -> None:
    """Remove what killed processes left half written or half removed."""
    remove_parts(output)
    remove_parts(output / FOLDER)
    if (output / FOLDER).is_dir():
        for path in set(_named(output)) - set(all_of(output)):
            remove_folder(path)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and optimizer of a checkpoint.

    Raises:
        TrainingError: files that are damaged.
    """
    try:
        state = parse_json((folder / "state.json").read_bytes())
        return state, torch.load(folder / "optimizer.pt", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes of itself
        raise TrainingError(
            f"the checkpoint {folder} is damaged ({first_line(error)}); delete it to go on from the one before."
        ) from error


def all_of(output: Path) -> list[Path]:
    """The whole checkpoints of a training, oldest first."""
    return sorted((path for path in _named(output) if (path / "state.json").exists()), key=step_of)


def _named(output: Path) -> list[Path]:
    found = (output / FOLDER).glob("step-*") if (output / FOLDER).is_dir() else ()
    return [path for path in found if re.fullmatch(r"step-\d{6,}", path.name)]


def prune(output: Path, keep_last: int, best: str | None) -> None:
    """Remove all but the newest checkpoints, at least `LEAST`, and the best one."""
    for path in all_of(output)[: -max(LEAST, keep_last)]:
        if path.name != best:
            remove_folder(path)
