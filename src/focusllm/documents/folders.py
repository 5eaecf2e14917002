"""Which files a folder or a pattern means: those that are not hidden and that no `.gitignore` leaves out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

from focusllm.errors import DocumentError

IGNORE_FILE = ".gitignore"
Rules = list[tuple[Path, GitIgnoreSpec]]
"""A folder and what its `.gitignore` says, the outermost first."""


def is_pattern(path: str | Path) -> bool:
    """Whether a path names files by a pattern (`src/**/*.py`); not if a file has that very name."""
    return glob.has_magic(str(path)) and not os.path.lexists(path)


def find_files(path: str | Path) -> tuple[Path, list[str]]:
    """The files that a folder holds or a pattern names.

    Returns:
        The folder, of a pattern the last one that it names without a wild card; and the files' names relative to it,
        with `/`, sorted.

    Raises:
        DocumentError: no such folder, or one that cannot be listed.
    """
    wanted: set[str] | None = None
    folder = Path(path)
    if is_pattern(path):
        fixed = folder.parts[: _first_wild(folder.parts)]
        pattern = str(Path(*folder.parts[len(fixed) :]))
        folder = Path(*fixed)
        wanted = {Path(name).as_posix() for name in glob.glob(pattern, root_dir=folder, recursive=True)}
    if not os.path.isdir(folder):
        raise DocumentError(f"there is no folder {folder}; check the path.")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise DocumentError(f"{folder} cannot be read ({error.strerror or error}); check its permissions.") from error
    names = (name.relative_to(folder.absolute()).as_posix() for name in _walk(folder.absolute()))
    return folder, sorted(name for name in names if wanted is None or name in wanted)


def _first_wild(parts: tuple[str, ...]) -> int:
    return next(i for i, part in enumerate(parts) if glob.has_magic(part))


def _walk(folder: Path) -> Iterator[Path]:
    rules_of: dict[Path, Rules] = {folder: _rules_above(folder)}
    for root, folders, names in os.walk(folder):
        here = Path(root)
        rules = rules_of.pop(here)
        if IGNORE_FILE in names:
            rules = [*rules, (here, _read_rules(here / IGNORE_FILE))]
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_ignored(here / name, rules, "/")]
        rules_of |= {here / name: rules for name in folders}
        yield from (here / name for name in names if not name.startswith(".") and not _is_ignored(here / name, rules))


def _rules_above(folder: Path) -> Rules:
    """What the folders above say, up to the one that holds the repository, if there is one."""
    above = [folder, *folder.parents]
    top = next((i for i, parent in enumerate(above) if (parent / ".git").exists()), 0)
    found = [parent for parent in reversed(above[1 : top + 1]) if (parent / IGNORE_FILE).is_file()]
    return [(parent, _read_rules(parent / IGNORE_FILE)) for parent in found]


def _read_rules(path: Path) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except (OSError, ValueError):  # one that cannot be read, or made sense of, leaves nothing out
        return GitIgnoreSpec.from_lines([])


def _is_ignored(path: Path, rules: Rules, end: str = "") -> bool:
    """What the innermost `.gitignore` with a rule for this path says."""
    for folder, spec in reversed(rules):
        said = spec.check_file(path.relative_to(folder).as_posix() + end).include
        if said is not None:
            return said
    return False
