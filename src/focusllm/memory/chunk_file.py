"""One chunk's keys and values in a file of its own: whole or not there, and open only while it is read or written, so
that any number of documents may share it and any number of chunks leaves no handle open.

    header (what it is of)   the packed row, as `store` packs it   the sum of both
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from focusllm.files import whole_file
from focusllm.json_text import parse_json
from focusllm.memory.store import HEADER, TRAILER, DamagedRow, MissingRow, Packing, cannot_write, row_header
from focusllm.method.kv import KV


class ChunkFile:
    """A store of one row.

    Args:
        path: need not be there yet. key: what the chunk is known by; in the header.
    """

    num_rows = 1
    nbytes = 0
    """Nothing is held in memory."""

    def __init__(self, packing: Packing, length: int, path: Path, key: str):
        self.packing, self.length, self.path, self.key = packing, length, path, key

    def rows(self, start: int, stop: int) -> KV:
        """The row [1, K, C, D] a layer, read, checked and unpacked; it counts as used now.

        Raises:
            MissingRow: there is no file. DamagedRow: it cannot be read, or is not what was written.
        """
        try:
            content = np.fromfile(self.path, np.uint8)
        except FileNotFoundError as error:
            raise MissingRow(str(self.path)) from error
        except OSError as error:
            raise DamagedRow(f"{self.path}: {os.strerror(error.errno or 0)}") from error
        whole = HEADER + self.packing.row_bytes(self.length) + TRAILER
        if len(content) != whole or not _is_summed(content) or content[:HEADER].tobytes() != self._header:
            raise DamagedRow(str(self.path))
        with suppress(OSError):  # one that may only be read
            os.utime(self.path)
        return self.packing.from_bytes(torch.from_numpy(content)[None, HEADER:], self.length)

    def write(self, row: int, kv: KV, token_ids: Tensor) -> None:
        """Write the row; another process that writes the same one does no harm.

        Raises:
            DocumentError: the disk is full, or cannot be written to.
        """
        record = self.packing.to_bytes(kv)[0].numpy()
        sum_of = xxhash.xxh3_128(self._header)
        sum_of.update(record.data)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as part, part.open("wb") as file:
                file.write(self._header)
                file.write(record.data)
                file.write(sum_of.digest())
        except OSError as error:
            raise cannot_write(self.path, self.path.parent, error, len(record)) from error

    @property
    def _header(self) -> bytes:
        return row_header(self.packing, self.length, self.key)


def is_whole(path: Path, key: str) -> bool:
    """Whether a file holds what was written into it for a key."""
    try:
        content = np.fromfile(path, np.uint8)
        return _is_summed(content) and bool(parse_json(content[:HEADER].tobytes())["document"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_summed(content: np.ndarray) -> bool:
    return content[-TRAILER:].tobytes() == xxhash.xxh3_128_digest(content[:-TRAILER].data)
