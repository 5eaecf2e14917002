"""A folder as a set of documents, a file each, brought up to date by what is in its files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from focusllm.documents.folders import find_files
from focusllm.documents.sources import open_source
from focusllm.errors import DocumentError, LibraryError, missing_package
from focusllm.files import digest_of
from focusllm.library.library import Library
from focusllm.memory.chunks import Progress


@dataclass
class Synced:
    """What became of a folder's files; documents by their names."""

    name: str
    """The set's."""
    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    num_unchanged: int = 0
    num_read: int = 0
    """Chunks that were read."""
    left_out: list[str] = field(default_factory=list)
    """Files that cannot be read, and why. What was read of them before stays."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)


def sync(
    library: Library,
    folder: str | Path,
    into: str | None = None,
    progress: Callable[[str], AbstractContextManager[Progress | None]] = lambda name: nullcontext(),
) -> Synced:
    """Bring a set of documents up to date with the files of a folder: hidden and ignored ones, and those without text,
    are not among them.

    Args:
        into: the set's name; None: the folder's. A document is named by the set and its place in the folder.
        progress: gives, for a document's name, a context with a function of (tokens done, tokens in all).

    Raises:
        LibraryError: the set is of another folder, or the library lies in this one. DocumentError: there is no such
            folder, or the disk is full; the documents up to there are brought up to date.
    """
    root, names = find_files(folder)
    root = root.resolve()
    found = Synced(into or root.name)
    earlier = library.catalogue.folder_of(found.name)
    if earlier not in (None, str(root)):
        raise LibraryError(f"the set {found.name} is of {earlier}, not of {root}; give this one another name.")
    if library.folder.resolve().is_relative_to(root):
        raise LibraryError(f"the library {library.folder} lies in {root} itself; keep it elsewhere.")
    entries = {entry.name: entry for entry in library.entries()}
    gone = set(library.sets().get(found.name, []))
    for place in names:
        path, name = root / place, f"{found.name}/{place}"
        try:
            if not path.is_file() or not path.stat().st_size:
                continue
            gone.discard(name)
            known = entries.get(name)
            if known is not None and known.digest == digest_of(path):
                found.num_unchanged += 1
                continue
            source = open_source(path)
        except (DocumentError, OSError) as error:
            found.left_out.append(f"{name}: {error}")
            continue
        with progress(name) as report:
            if known is None:
                change = library.add(source, name=name, into=found.name, progress=report or False)
            else:
                change = library.update(name, source, progress=report or False)
        (found.added if known is None else found.updated).append(name)
        found.num_read += change.num_read
    found.removed = sorted(gone)
    if gone:
        library.remove(found.removed)
    if earlier is None and found.name in library.sets():
        library.catalogue.set_folder(found.name, str(root))
    return found


def watch(
    library: Library,
    folder: str | Path,
    into: str | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[str], AbstractContextManager[Progress | None]] = lambda name: nullcontext(),
) -> Iterator[Synced]:
    """`sync`, and again whenever a file of the folder changes, until it is stopped.

    Raises:
        ConfigError: the package that watches is not installed. And what `sync` raises.
    """
    try:
        import watchfiles
    except ImportError as error:
        raise missing_package("watching a folder needs", "watchfiles", "watch") from error
    yield sync(library, folder, into, progress)
    for _ in watchfiles.watch(folder, stop_event=stop):
        yield sync(library, folder, into, progress)
