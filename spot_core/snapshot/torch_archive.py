"""The archive that `torch.save` writes, laid out so that tensors are in it as they are in host memory.

A zip archive, nothing in it compressed, every record's content at a multiple of 64 bytes: one for each storage, one for
the pickle, one that says which of the formats this is. `torch.load` finds records by the directory at the end. So the
storages come first, where nothing moves from one checkpoint to the next, and the pickle, whose length changes, after.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from spot_core.snapshot.pickling import TreePickler, tensor_parts
from spot_core.snapshot.trees import byte_count

_ALIGNMENT = 64
_VERSION = b"3\n"  # of the format, since torch 1.6
_NAME = "archive/"
_LOCAL, _CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
_END, _END_64, _LOCATOR_64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_SIZES_64, _PADDING = 1, 0x4246  # kinds of extra fields; the second is torch's
_IN_64 = 0xFFFFFFFF  # in place of a number that has its 64 bits elsewhere
_NEEDS_64 = 45
_DATE = 0x0021  # 1 January 1980


class TorchArchive:
    """Where tensors lie in an archive. before: what comes before the content of each in the file."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._parts = tensor_parts(tensors)
        self._directory = _Directory()
        self.before = [
            self._directory.add(f"data/{number}", byte_count(tensor)) for number, tensor in enumerate(tensors)
        ]

    def after(self, tree: Any, tensors: Sequence[torch.Tensor]) -> bytes:
        """What comes after the last one. tree: has `tensors` in it, of the same shapes and dtypes."""
        pickler = TreePickler(tensors, self._parts)
        pickled = pickler.dump(tree)
        records = {"data.pkl": pickled, "byteorder": sys.byteorder.encode(), "version": _VERSION}
        for number, storage in enumerate(pickler.others, start=len(tensors)):
            records[f"data/{number}"] = _content(storage)
        directory = self._directory.copy()
        parts = [directory.add(name, len(data), zlib.crc32(data)) + data for name, data in records.items()]
        return b"".join([*parts, directory.end()])


def _content(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy().tobytes()


class _Directory:
    """The records of an archive, one behind the other."""

    def __init__(self, entries: Sequence[bytes] = (), position: int = 0) -> None:
        self._entries, self._position = list(entries), position

    def copy(self) -> _Directory:
        return _Directory(self._entries, self._position)

    def add(self, name: str, size: int, checksum: int = 0) -> bytes:
        """Take note of a record; returns its header.

        checksum: torch.load looks at none, and the manifest has a digest of the whole.
        """
        path = (_NAME + name).encode()
        is_large = size >= _IN_64
        sizes = struct.pack("<2H2Q", _SIZES_64, 16, size, size) if is_large else b""
        short = _IN_64 if is_large else size
        ends = self._position + _LOCAL.size + len(path) + len(sizes) + 4
        padding = -ends % _ALIGNMENT
        extra = sizes + struct.pack("<2H", _PADDING, padding) + b"Z" * padding
        common = _NEEDS_64, 0, 0, 0, _DATE, checksum, short, short, len(path)
        self._entries.append(self._entry(path, size, common))
        self._position = ends + padding + size
        return _LOCAL.pack(b"PK\x03\x04", *common, len(extra)) + path + extra

    def _entry(self, path: bytes, size: int, common: tuple[int, ...]) -> bytes:
        is_far = self._position >= _IN_64
        wide = [size, size] if size >= _IN_64 else []
        wide += [self._position] if is_far else []
        extra = struct.pack(f"<2H{len(wide)}Q", _SIZES_64, 8 * len(wide), *wide) if wide else b""
        at = _IN_64 if is_far else self._position
        return _CENTRAL.pack(b"PK\x01\x02", _NEEDS_64, *common, len(extra), 0, 0, 0, 0, at) + path + extra

    def end(self) -> bytes:
        entries = b"".join(self._entries)
        count, size, at = len(self._entries), len(entries), self._position
        end_64 = _END_64.pack(b"PK\x06\x06", _END_64.size - 12, _NEEDS_64, _NEEDS_64, 0, 0, count, count, size, at)
        locator = _LOCATOR_64.pack(b"PK\x06\x07", 0, at + size, 1)
        few = min(count, 0xFFFF)
        end = _END.pack(b"PK\x05\x06", 0, 0, few, few, min(size, _IN_64), min(at, _IN_64), 0)
        return entries + end_64 + locator + end
