"""Native files as adapters describe them, and how each is written once its tensors are on the host.

An adapter names files in the trainer's own formats; the core copies the tensors, writes and commits. Tensors are
`stable` if only the optimizer step changes them (parameters, optimizer state): their copy may overlap the next
forward and backward. Everything else is `volatile` and copied at once.
"""

from __future__ import annotations

import copy
import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

import torch

_SAFETENSORS_DTYPES = {
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


_IMMUTABLE = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """A safetensors file. tensors: live tensors by key; volatile: keys that forward or backward may change."""

    path: str
    tensors: Mapping[str, torch.Tensor]
    volatile: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    is_part: ClassVar[bool] = False


def nothing(tensor: torch.Tensor) -> bool:
    """Volatile in a file whose tensors all are stable."""
    return False


def everything(tensor: torch.Tensor) -> bool:
    """Volatile in a file whose tensors may change at any time."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """A `torch.save` file of nested dicts, lists and tuples with tensors and other values in them.

    is_volatile: which of its tensors forward or backward may change. stable_keys: of a tree that is a dict, the parts
    in which only the optimizer step changes anything at all, containers and numbers too: an optimizer's `state`.
    inert_keys: None if it is loaded with `weights_only=True`; otherwise for `loading.load_inert`, parts of the tree
    that a resume does not need. is_part: each rank has its own.
    """

    path: str
    tree: Any
    is_volatile: Callable[[torch.Tensor], bool] = nothing
    stable_keys: frozenset[str] = frozenset()
    inert_keys: frozenset[str] | None = None
    is_part: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesFile:
    """Any other small file. content runs in the writer thread and must not touch what training changes.

    is_part: each rank has its own.
    """

    path: str
    content: Callable[[], bytes]
    is_part: bool = False


NativeFile = SafetensorsFile | TorchFile | BytesFile


def tensor_bytes(file: NativeFile) -> int:
    """Size of a file's tensors: close to the size of the file where there are any."""
    if isinstance(file, BytesFile):
        return 0
    tensors = file.tensors.values() if isinstance(file, SafetensorsFile) else tensors_of(file.tree)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def rebuild(tree: Any, leaf: Callable[[torch.Tensor], Any]) -> Any:
    """Copy of nested containers with `leaf` applied to each tensor: later changes to the original don't show."""
    if isinstance(tree, torch.Tensor):
        return leaf(tree)
    if isinstance(tree, _IMMUTABLE):
        return tree
    if isinstance(tree, dict):
        copied = {key: rebuild(value, leaf) for key, value in tree.items()}
        return copied if type(tree) is dict else _like(tree, copied)
    if isinstance(tree, (list, tuple)):
        items = [rebuild(value, leaf) for value in tree]
        if type(tree) is list:
            return items
        return tree.__class__(*items) if hasattr(tree, "_fields") else tree.__class__(items)
    return copy.deepcopy(tree)


def _like(original: Any, copied: dict[Any, Any]) -> Any:
    try:
        return type(original)(copied)
    except TypeError:
        return copied  # a defaultdict and the like: the plain dict loads as well


def torch_bytes(tree: Any) -> bytes:
    """What `torch.save` writes, for small trees."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors, wherever they are, have the same dtype, shape and bytes: NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_flat_bytes(a), _flat_bytes(b))


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Every tensor of nested containers, in the order `rebuild` visits them."""
    found: list[torch.Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list[torch.Tensor]) -> None:
    # Of an optimizer there are thousands, gathered while the training thread waits for the interpreter.
    if isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _gather(value, found)
    elif isinstance(tree, torch.Tensor):
        found.append(tree)


def safetensors_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Keys by descending item size, then name: packed without holes, every tensor is aligned."""
    return sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))


def safetensors_header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length-prefixed JSON header for tensors stored back to back in the mapping's order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


def write_safetensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write host tensors in the mapping's order, which must be that of `safetensors_order`."""
    file.write(safetensors_header(tensors, metadata))
    for tensor in tensors.values():
        if tensor.numel():
            file.write(_flat_bytes(tensor).numpy().data)
