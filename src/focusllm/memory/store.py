"""Where the chunks' keys and values lie, and in how many bits: rows are asked for, and come as the passes take them.

    KV        as computed, on the device: rows are views
    Packed    int8 or int4, or in host memory beside a GPU: rows are unpacked (and moved) when they are asked for
    RowFile   a record a chunk in a file, as computed or packed, each with a checksum and its tokens' digest
    ChunkFile the record of one chunk, whichever texts it is of, in a file of its own (`chunk_file`)

int8: a scale for every token of every key-value head. int4: two values a byte, a scale and a least value for every
`GROUP` dimensions. (Per-token scales of keys and values: KVQuant, arXiv 2401.18079; KIVI, arXiv 2402.02750.)

Letters: R rows (chunks), K key-value heads, C tokens of a chunk, D head dimension.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import xxhash
from torch import Tensor, nn

from focusllm.errors import DocumentError
from focusllm.files import whole_file
from focusllm.json_text import parse_json
from focusllm.machine import readable_bytes
from focusllm.method.base import layout
from focusllm.method.kv import KV

GROUP = 32
FORMAT = 2
"""Files before 2 do not say whose they are."""
HEADER = 4096
TRAILER = 16
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class RowStore(Protocol):
    """Keys and values of R chunks of C tokens each."""

    @property
    def num_rows(self) -> int:
        """R."""

    @property
    def length(self) -> int:
        """C."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory held (files are not counted)."""

    def rows(self, start: int, stop: int) -> KV:
        """Some rows [n, K, C, D] a layer, on the device and in the type that the passes compute in."""


class DamagedRow(Exception):
    """A record of a file is not what was written for these tokens."""


class MissingRow(DamagedRow):
    """There is no such record any more; nothing is wrong, it was taken away to make room."""


@dataclass(frozen=True)
class Packing:
    """How a model's keys and values are laid out when they are not as computed."""

    shapes: tuple[tuple[int, int], ...]
    """Heads and width of a token: of the keys of each layer, then of the values."""
    devices: tuple[torch.device, ...]
    """Where each layer computes."""
    dtype: torch.dtype
    """What it computes in."""
    kv_dtype: str
    """What is stored: same, int8 or int4."""

    @classmethod
    def of(cls, model: nn.Module, kv_dtype: str) -> Packing:
        """The packing of a model's keys and values."""
        layers = layout(model).layers
        keys = [(layer.num_kv_heads, layer.key_dim) for layer in layers]
        values = [(layer.num_kv_heads, layer.value_dim) for layer in layers]
        devices = tuple(next(layer.module.parameters()).device for layer in layers)
        return cls((*keys, *values), devices, next(model.parameters()).dtype, kv_dtype)

    def parts(self, length: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape of a row and type of all that its keys and values are packed into."""
        return [part for shape in self.shapes for part in self.parts_of(shape, length)]

    def parts_of(self, shape: tuple[int, int], length: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The same for keys or values of one layer."""
        heads, width = shape
        if self.kv_dtype == "same":
            return [((heads, length, width), self.dtype)]
        if self.kv_dtype == "int8":
            return [((heads, length, width), torch.int8), ((heads, length, 1), torch.float16)]
        groups = width // _group(width)
        return [((heads, length, width // 2), torch.uint8), ((heads, length, groups, 2), torch.float16)]

    def row_bytes(self, length: int) -> int:
        """Bytes of a row, keys and values of all layers."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parts(length))

    @property
    def sizes(self) -> dict[str, Any]:
        """What tells it from another model's, for a file's header."""
        (heads, width), *others = dict.fromkeys(self.shapes)
        if others:
            return {"layers": len(self.devices), "shapes": xxhash.xxh3_64_hexdigest(repr(self.shapes).encode())}
        return {"layers": len(self.devices), "num_kv_heads": heads, "head_dim": width}

    def pack(self, kv: KV) -> list[Tensor]:
        """[n, K, C, D] a layer to packed tensors: of the keys of all layers, then of the values."""
        packing = {"same": lambda x: (x,), "int8": to_int8, "int4": _to_int4}[self.kv_dtype]
        return [part for tensor in (*kv.keys, *kv.values) for part in packing(tensor)]

    def to_bytes(self, kv: KV) -> Tensor:
        """The packed tensors of every row, one behind the other: [n, bytes] on the CPU."""
        return torch.cat([part.reshape(kv.num_rows, -1).view(torch.uint8).cpu() for part in self.pack(kv)], 1)

    def from_bytes(self, raw: Tensor, length: int) -> KV:
        """The way back, from [n, bytes or more]."""
        parts, offset = [], 0
        for shape, dtype in self.parts(length):
            size = torch.Size(shape).numel() * dtype.itemsize
            parts.append(raw[:, offset : offset + size].contiguous().view(dtype).view(-1, *shape))
            offset += size
        return self.unpack(parts)

    def unpack(self, parts: Sequence[Tensor]) -> KV:
        """Packed tensors to keys and values, on the device."""
        each = len(parts) // (2 * len(self.devices))
        unpacking: Any = {"same": lambda x, _: x.contiguous(), "int8": from_int8, "int4": _from_int4}[self.kv_dtype]
        tensors = []
        for i, device in enumerate(self.devices * 2):
            packed = [part.to(device, non_blocking=True) for part in parts[i * each : (i + 1) * each]]
            tensors.append(unpacking(*packed, self.dtype))
        half = len(tensors) // 2
        return KV(tensors[:half], tensors[half:])


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] to 8 bits a number and a scale [..., 1]."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-7).half()
    return (x.float() / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def from_int8(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back."""
    wide: Tensor = packed.float().mul_(scale)
    return wide.to(dtype)


def _group(width: int) -> int:
    return GROUP if width % GROUP == 0 else width


def _to_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    grouped = x.float().view(*x.shape[:-1], -1, _group(x.shape[-1]))
    least, most = grouped.aminmax(dim=-1, keepdim=True)
    # The stored numbers are rounded ones, so the levels are counted from them.
    least, step = least.half(), ((most - least) / 15).clamp(min=1e-7).half()
    levels = ((grouped - least.float()) / step.float()).round_().clamp_(0, 15).to(torch.uint8).flatten(-2)
    return levels[..., 0::2] | (levels[..., 1::2] << 4), torch.cat([least, step], -1)


def _from_int4(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    levels = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float()
    grouped = levels.view(*levels.shape[:-1], scales.shape[-2], -1)
    wide: Tensor = grouped.mul_(scales[..., 1:]).add_(scales[..., :1])
    return wide.flatten(-2).to(dtype)


@dataclass(eq=False)
class Packed:
    """Rows in memory, packed or away from the device."""

    packing: Packing
    parts: list[Tensor]
    length: int

    @classmethod
    def empty(cls, packing: Packing, num_rows: int, length: int, device: torch.device | None) -> Packed:
        """Room for so many rows; device None: where each layer computes."""
        parts = []
        for layer, of_token in zip(packing.devices * 2, packing.shapes, strict=True):
            pinned = device is not None and device.type == "cpu" and layer.type == "cuda"
            for shape, dtype in packing.parts_of(of_token, length):
                where = device or layer
                parts.append(torch.empty((num_rows, *shape), dtype=dtype, device=where, pin_memory=pinned))
        return cls(packing, parts, length)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.parts[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts)

    def rows(self, start: int, stop: int) -> KV:
        """Some rows, unpacked."""
        return self.packing.unpack([part[start:stop] for part in self.parts])

    def write(self, row: int, kv: KV) -> None:
        """Pack rows into their place."""
        for part, given in zip(self.parts, self.packing.pack(kv), strict=True):
            part[row : row + kv.num_rows].copy_(given)


class RowFile:
    """Rows in a file: a header, then a record a row: its packed tensors, their checksum, its tokens' digest.

    A named file is there to be used again: records that are whole and belong to the same tokens need not be computed
    again. One whose header says that it is another document's is replaced. One that cannot be written is read. Without
    a name the file is gone with this object. Threads and forked processes may use it at once: it has no position.

    Args:
        key: what the rows are of (`document_key`); in the header.

    Raises:
        DocumentError: the disk is full or the file cannot be written.
    """

    def __init__(self, packing: Packing, num_rows: int, length: int, path: Path | None, folder: Path, key: str = ""):
        self.packing, self.num_rows, self.length, self.path = packing, num_rows, length, path
        self.row_bytes = packing.row_bytes(length)
        self.replaced = ""
        """Whose rows were in the file instead, if so; empty: nobody's."""
        self._folder = folder
        self._refused: OSError | None = None
        self._digests: dict[int, bytes] = {}
        header = row_header(packing, length, key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, self._refused = _opened(path, folder)
            weakref.finalize(self, self._file.close)
            found = self._read_header()
            if found != header:
                self.replaced = _owner(found)
                if path is not None and found:  # another process may be reading that one
                    self._file, self._refused = _fresh(path), None
                    weakref.finalize(self, self._file.close)
                self._write(0, header)
        except OSError as error:
            raise self._cannot_write(error, num_rows) from error

    @property
    def nbytes(self) -> int:
        """Nothing is held in memory."""
        return 0

    def rows(self, start: int, stop: int) -> KV:
        """Some rows, read, checked and unpacked.

        Raises:
            DamagedRow: as `read`.
        """
        return self.unpack(self.read(start, stop))

    def read(self, start: int, stop: int) -> Tensor:
        """Records as they are [n, bytes], checked. Computes nothing, so that another thread may do it meanwhile.

        Raises:
            DamagedRow: a record cannot be read, is cut off, not what was written, or of other tokens than were written
                or found here.
        """
        raw = torch.empty(stop - start, self.row_bytes + TRAILER, dtype=torch.uint8)
        try:
            got = _read_at(self._file, self._place(start), memoryview(raw.numpy().data).cast("B"))
        except OSError as error:
            raise DamagedRow(f"{self.path or 'a temporary file'}: {os.strerror(error.errno or 0)}") from error
        for i, record in enumerate(raw.numpy()):
            checks = xxhash.xxh3_64_digest(record[: self.row_bytes]) + self._digests.get(start + i, b"")
            if (i + 1) * raw.shape[1] > got or record[self.row_bytes :].tobytes() != checks:
                raise DamagedRow(f"record {start + i} of {self.path or 'a temporary file'}")
        return raw

    def unpack(self, raw: Tensor) -> KV:
        """Records to keys and values [n, K, C, D] a layer."""
        return self.packing.from_bytes(raw, self.length)

    def write(self, row: int, kv: KV, token_ids: Tensor) -> None:
        """Write rows with their checksums and their tokens' digests."""
        raw = self.packing.to_bytes(kv).numpy()
        try:
            for i, (record, tokens) in enumerate(zip(raw, token_ids.tolist(), strict=True)):
                self._digests[row + i] = _digest(tokens)
                checks = xxhash.xxh3_64_digest(record) + self._digests[row + i]
                self._write(self._place(row + i), memoryview(record).cast("B"))
                self._write(self._place(row + i) + self.row_bytes, checks)
        except OSError as error:
            raise self._cannot_write(error, self.num_rows - row) from error

    def has(self, row: int, token_ids: Sequence[int]) -> bool:
        """Whether a record of these tokens is there (its contents are checked when they are read)."""
        self._digests[row] = _digest(token_ids)
        found = bytearray(8)
        try:
            _read_at(self._file, self._place(row) + self.row_bytes + 8, memoryview(found))
        except OSError:  # a disk that fails: the chunk is read from its tokens
            return False
        return found == self._digests[row]

    def _place(self, row: int) -> int:
        return HEADER + row * (self.row_bytes + TRAILER)

    def _read_header(self) -> bytes:
        found = bytearray(HEADER)
        return bytes(found[: _read_at(self._file, 0, memoryview(found))])

    def _write(self, place: int, content: bytes | memoryview) -> None:
        if self._refused is not None:
            raise self._refused
        _write_at(self._file, place, memoryview(content))

    def _cannot_write(self, error: OSError, num_rows: int) -> DocumentError:
        return cannot_write(self.path, self._folder, error, num_rows * self.row_bytes)


def row_header(packing: Packing, length: int, key: str) -> bytes:
    """What a file is of. Whatever its rows depend on is in the document's key; the rest says how to read them."""
    content = {
        "format": FORMAT,
        "document": key,
        "dtype": str(packing.dtype),
        "kv_dtype": packing.kv_dtype,
        "length": length,
        **packing.sizes,
    }
    return json.dumps(content).encode().ljust(HEADER)


def _owner(header: bytes) -> str:
    """Whose a file is that is not ours, as its header tells; empty: a new file."""
    if not header:
        return ""
    try:
        return "an earlier version" if parse_json(header)["format"] < FORMAT else "another model or text"
    except (ValueError, KeyError, TypeError):
        return "something else"


def _opened(path: Path | None, folder: Path) -> tuple[IO[bytes], OSError | None]:
    """A file for reading and writing; one that is there and cannot be written for reading alone, and why."""
    if path is None:
        return tempfile.TemporaryFile(dir=folder, buffering=0), None
    try:
        return open(path, "r+b", buffering=0, opener=_create), None
    except OSError as error:
        if error.errno in UNWRITABLE and path.exists():
            return open(path, "rb", buffering=0), error
        raise


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _fresh(path: Path) -> IO[bytes]:
    """An empty file in the place of another, which whoever has it open keeps."""
    with whole_file(path):
        pass
    return open(path, "r+b", buffering=0, opener=_create)


def _read_at(file: IO[bytes], place: int, view: memoryview) -> int:
    """Read into a view from a place; how many bytes there were."""
    got = 0
    while got < len(view):
        count = _read_some(file, place + got, view[got:])
        if not count:
            break
        got += count
    return got


def _write_at(file: IO[bytes], place: int, view: memoryview) -> None:
    """Write all of a view to a place."""
    while view:
        count = _write_some(file, place, view)
        view, place = view[count:], place + count


# Never from where the file stands: forked processes share that.
if sys.platform == "win32":  # which has no forks, so that a lock among threads is enough
    _turn = threading.Lock()

    def _read_some(file: Any, place: int, view: memoryview) -> int:
        with _turn:
            file.seek(place)
            return int(file.readinto(view))

    def _write_some(file: Any, place: int, view: memoryview) -> int:
        with _turn:
            file.seek(place)
            return int(file.write(view))

else:

    def _read_some(file: IO[bytes], place: int, view: memoryview) -> int:
        return os.preadv(file.fileno(), [view], place)

    def _write_some(file: IO[bytes], place: int, view: memoryview) -> int:
        return os.pwrite(file.fileno(), view, place)


def _digest(token_ids: Sequence[int]) -> bytes:
    return xxhash.xxh3_64_digest(",".join(map(str, token_ids)).encode())


def cannot_write(path: Path | None, folder: Path, error: OSError, needed: int) -> DocumentError:
    """One sentence on a disk that takes nothing.

    Args:
        needed: bytes that are still to be written.
    """
    what = f"the chunks' keys and values cannot be written to {path or folder} ({os.strerror(error.errno or 0)})"
    if error.errno not in FULL:
        return DocumentError(f"{what}; use another folder.")
    kept = "What is written is kept: make room and read again" if path else "Make room and read again"
    free = f", {readable_bytes(shutil.disk_usage(folder).free)} are free" if os.path.exists(folder) else ""
    return DocumentError(
        f"{what}; about {readable_bytes(needed)} are still needed{free}. {kept}, or use another folder or "
        f"kv_dtype='int8'."
    )
