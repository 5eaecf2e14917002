"""Where the chunks' keys and values lie, and in how many bits: rows are asked for, and come as the passes take them.

    KV        as computed, on the device: rows are views
    Packed    int8 or int4, or in host memory beside a GPU: rows are unpacked (and moved) when they are asked for
    RowFile   a record a chunk in a file, as computed or packed, each with a checksum and its tokens' digest

int8: a scale for every token of every key-value head. int4: two values a byte, a scale and a least value for every
`GROUP` dimensions. (Per-token scales of keys and values: KVQuant, arXiv 2401.18079; KIVI, arXiv 2402.02750.)

Letters: R rows (chunks), K key-value heads, C tokens of a chunk, D head dimension.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
import xxhash
from torch import Tensor, nn

from focusllm.errors import DocumentError
from focusllm.machine import readable_bytes
from focusllm.method.base import layout
from focusllm.method.kv import KV

GROUP = 32
HEADER = 4096
TRAILER = 16


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

    def unpack(self, parts: Sequence[Tensor]) -> KV:
        """The way back, onto the device."""
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
    again. Without a name it is gone with this object.

    Raises:
        DocumentError: the disk is full or the file cannot be written.
    """

    def __init__(self, packing: Packing, num_rows: int, length: int, path: Path | None, folder: Path):
        self.packing, self.num_rows, self.length, self.path = packing, num_rows, length, path
        self.row_bytes = packing.row_bytes(length)
        self._folder = folder
        self._turn = threading.Lock()
        self._digests: dict[int, bytes] = {}
        header = {"format": 1, "dtype": str(packing.dtype), "kv_dtype": packing.kv_dtype, "length": length}
        wanted = json.dumps({**header, **packing.sizes}).encode().ljust(HEADER)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._opened(path, folder)
            weakref.finalize(self, self._file.close)
            self._file.seek(0)
            if self._file.read(HEADER) != wanted:  # new, or not ours to read
                self._file.truncate(0)
                self._write(0, wanted)
        except OSError as error:
            raise _cannot_write(path, folder, error, num_rows * self.row_bytes) from error

    @staticmethod
    def _opened(path: Path | None, folder: Path) -> Any:
        if path is None:
            return tempfile.TemporaryFile(dir=folder, buffering=0)
        return open(path, "r+b" if path.exists() else "w+b", buffering=0)

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
        with self._turn:
            try:
                self._file.seek(self._place(start))
                got = _read_into(self._file, memoryview(raw.numpy().data).cast("B"))
            except OSError as error:
                raise DamagedRow(f"{self.path or 'a temporary file'}: {os.strerror(error.errno or 0)}") from error
        for i, record in enumerate(raw.numpy()):
            checks = xxhash.xxh3_64_digest(record[: self.row_bytes]) + self._digests.get(start + i, b"")
            if (i + 1) * raw.shape[1] > got or record[self.row_bytes :].tobytes() != checks:
                raise DamagedRow(f"record {start + i} of {self.path or 'a temporary file'}")
        return raw

    def unpack(self, raw: Tensor) -> KV:
        """Records to keys and values [n, K, C, D] a layer."""
        parts, offset = [], 0
        for shape, dtype in self.packing.parts(self.length):
            size = torch.Size(shape).numel() * dtype.itemsize
            parts.append(raw[:, offset : offset + size].contiguous().view(dtype).view(-1, *shape))
            offset += size
        return self.packing.unpack(parts)

    def write(self, row: int, kv: KV, token_ids: Tensor) -> None:
        """Write rows with their checksums and their tokens' digests."""
        parts = self.packing.pack(kv)
        raw = torch.cat([part.reshape(kv.num_rows, -1).view(torch.uint8).cpu() for part in parts], 1).numpy()
        try:
            for i, (record, tokens) in enumerate(zip(raw, token_ids.tolist(), strict=True)):
                self._digests[row + i] = _digest(tokens)
                checked = xxhash.xxh3_64_digest(record) + self._digests[row + i]
                with self._turn:
                    self._write(self._place(row + i), memoryview(record).cast("B"))
                    self._file.write(checked)
        except OSError as error:
            left = (self.num_rows - row) * self.row_bytes
            raise _cannot_write(self.path, self._folder, error, left) from error

    def has(self, row: int, token_ids: Sequence[int]) -> bool:
        """Whether a record of these tokens is there (its contents are checked when they are read)."""
        self._digests[row] = _digest(token_ids)
        try:
            with self._turn:
                self._file.seek(self._place(row) + self.row_bytes + 8)
                return self._file.read(8) == self._digests[row]
        except OSError:  # a disk that fails: the chunk is read from its tokens
            return False

    def _place(self, row: int) -> int:
        return HEADER + row * (self.row_bytes + TRAILER)

    def _write(self, place: int, content: Any) -> None:
        self._file.seek(place)
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]


def _read_into(file: BinaryIO, view: memoryview) -> int:
    got = 0
    while got < len(view):
        count = file.readinto(view[got:])  # type: ignore[attr-defined]
        if not count:
            break
        got += count
    return got


def _digest(token_ids: Sequence[int]) -> bytes:
    return xxhash.xxh3_64_digest(",".join(map(str, token_ids)).encode())


def _cannot_write(path: Path | None, folder: Path, error: OSError, needed: int) -> DocumentError:
    kept = "What is written is kept: make room and read again" if path else "Make room and read again"
    free = f", {readable_bytes(shutil.disk_usage(folder).free)} are free" if os.path.exists(folder) else ""
    return DocumentError(
        f"the chunks' keys and values cannot be written to {path or folder} ({os.strerror(error.errno or 0)}); about "
        f"{readable_bytes(needed)} are still needed{free}. {kept}, or use "
        f"another folder or kv_dtype='int8'."
    )
