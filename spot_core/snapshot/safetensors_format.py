"""The safetensors format: a header of JSON, then the tensors back to back."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spot_core.snapshot.trees import byte_count

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_ALIGNMENT = 64


def ordered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By descending item size, then name: packed without holes, every tensor is aligned."""
    return {key: tensors[key] for key in sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))}


class SafetensorsLayout:
    """Where tensors lie in a file. before: what comes before the content of each. tensors: in the file's order."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        header = _header(tensors, metadata)
        self.before = [header, *[b""] * (len(tensors) - 1)] if tensors else []
        self._after = b"" if tensors else header

    def after(self, content: object, tensors: Sequence[torch.Tensor]) -> bytes:
        """What comes after the last one."""
        return self._after


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + byte_count(tensor)
        described[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    body = json.dumps(described, separators=(",", ":")).encode()
    body += b" " * (-(8 + len(body)) % _ALIGNMENT)
    return struct.pack("<Q", len(body)) + body
