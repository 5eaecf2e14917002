"""The files of chunks: where they lie, what they take, and which of them go when there is no room.

Two a chunk: `.rows`, its keys and values, which a question reads of the few chunks that it opens; and `.keys`, the
look-up keys, which it needs of all. So rows go first, those that were not used for longest; what is gone is read again
from the document's text when it is needed. When a file was used is its time of modification. No torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from focusllm.files import PART

ROWS, KEYS = ".rows", ".keys"
LEFT_BEHIND = 3600.0
"""Seconds after which a half-written file is nobody's any more."""


@dataclass(frozen=True)
class KeptFile:
    """A file of a chunk."""

    path: Path
    key: str
    nbytes: int
    used: float

    @property
    def is_rows(self) -> bool:
        """Whether it holds keys and values, not look-up keys."""
        return self.path.suffix == ROWS


class ChunkFolder:
    """The files of all chunks of a library."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str, kind: str) -> Path:
        """Where a chunk's file is, or goes."""
        return self.folder / key[:2] / f"{key}{kind}"

    def files(self) -> list[KeptFile]:
        """All whole files."""
        return list(self._files(part=False))

    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(file.nbytes for file in self.files())

    def make_room(self, budget: int) -> int:
        """Remove what was not used for longest until the rest takes no more than a budget; how many bytes that were."""
        files = sorted(self.files(), key=lambda file: (not file.is_rows, file.used))
        too_many = freed = max(0, sum(file.nbytes for file in files) - budget)
        for file in files:
            if too_many <= 0:
                break
            too_many -= file.nbytes
            self.remove(file)
        return freed - too_many

    def collect(self, listed: Collection[KeptFile], wanted: Collection[str]) -> int:
        """Remove files of no document, and what killed processes left half-written; how many bytes those were.

        Args:
            listed: the files, as they were before it was asked what is wanted: a document is in the catalogue before
                its chunks are read, so that none of a new one is removed.
            wanted: keys of all documents' chunks.
        """
        old = time.time() - LEFT_BEHIND
        gone = [file for file in listed if file.key not in wanted]
        gone += [file for file in self._files(part=True) if file.used < old]
        for file in gone:
            self.remove(file)
        return sum(file.nbytes for file in gone)

    def remove(self, file: KeptFile) -> None:
        """Remove a file; whoever reads it meanwhile reads it to its end."""
        with suppress(FileNotFoundError):
            file.path.unlink()

    def _files(self, part: bool) -> Iterator[KeptFile]:
        with suppress(FileNotFoundError):
            for folder in list(os.scandir(self.folder)):
                if not folder.is_dir():
                    continue
                for found in list(os.scandir(folder)):
                    with suppress(FileNotFoundError):  # removed by another process meanwhile
                        stat, path = found.stat(), Path(found.path)
                        if found.name.startswith(PART) if part else path.suffix in (ROWS, KEYS):
                            yield KeptFile(path, path.stem, stat.st_size, stat.st_mtime)
