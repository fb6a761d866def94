"""The pickle in a `torch.save` file, made without holding the interpreter for long.

Pickling an adapter with its Adam state takes most of what torch.save takes, all of it under the GIL beside a training
that wants it. Of tensors that have a storage of their own the pickle says dtype, shape and the storage's key: that part
is torch's, made once, and stands wherever the tree has the tensor.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from spot_core.snapshot.trees import byte_count, rebuild, tensors_of

_PROTOCOL = 2  # the only one that `weights_only` reads
_PROTO, _STOP = pickle.PROTO + bytes([_PROTOCOL]), pickle.STOP
_PLAIN = {str, int, float, bool, type(None)}
_SEQUENCES: dict[Any, tuple[bytes, bytes]] = {
    list: (pickle.EMPTY_LIST + pickle.MARK, pickle.APPENDS),
    tuple: (pickle.MARK, pickle.TUPLE),
}
_KEY = 2  # where torch puts the storage's key in what stands for a storage
_ANY_KEY = "key of a storage"

Storage = torch.UntypedStorage
KeyOf = Callable[[Storage, torch.dtype], str]


def tensor_parts(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """What stands for each in a pickle if it lies contiguously on the CPU, in a storage with its number for a key."""
    known: dict[tuple[torch.dtype, torch.Size], list[bytes]] = {}
    parts = []
    for number, tensor in enumerate(tensors):
        kind = tensor.dtype, tensor.shape
        if kind not in known:
            alike = torch.empty(tensor.shape, dtype=tensor.dtype)
            known[kind] = _part_with_storages(alike, lambda *_: _ANY_KEY).split(_text(_ANY_KEY))
        before, after = known[kind]
        parts.append(before + _text(str(number)) + after)
    return parts


class TreePickler:
    """Pickles trees with these tensors in the order of `tensors_of`. parts: of `tensor_parts`.

    others: the storages that a tree has beside theirs, in objects that only pickle can look into; their keys are the
    numbers that follow.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], parts: Sequence[bytes]) -> None:
        self._tensors, self._tensor_parts = tensors, parts
        self._keys: dict[tuple[int, torch.dtype], str] | None = None
        self._parts: list[bytes] = []
        self._next = 0
        self.others: list[Storage] = []

    def dump(self, tree: Any) -> bytes:
        self._add(tree)
        if self._next != len(self._tensors):
            raise ValueError(f"{self._next} tensors were pickled, {len(self._tensors)} are stored")
        return b"".join([_PROTO, *self._parts, _STOP])

    def _add(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            self._parts.append(self._tensor_parts[self._next])
            self._next += 1
        elif kind is dict:
            self._parts.append(pickle.EMPTY_DICT + pickle.MARK)
            for key, item in value.items():
                self._add_leaf(key)
                self._add(item)
            self._parts.append(pickle.SETITEMS)
        elif kind in _PLAIN or not (inside := tensors_of(value)):
            self._add_leaf(value)
        elif kind in _SEQUENCES:
            begin, end = _SEQUENCES[kind]
            self._parts.append(begin)
            for item in value:
                self._add(item)
            self._parts.append(end)
        else:  # a container of another type
            self._next += len(inside)
            self._add_leaf(rebuild(value, lambda tensor: tensor.detach().cpu().contiguous()))

    def _add_leaf(self, value: Any) -> None:
        is_plain = type(value) in _PLAIN
        self._parts.append(_inner(pickle.dumps(value, _PROTOCOL)) if is_plain else _part(value, self._key_of))

    def _key_of(self, storage: Storage, dtype: torch.dtype) -> str:
        if self._keys is None:
            alone = ((number, each) for number, each in enumerate(self._tensors) if _is_alone(each))
            self._keys = {(each.data_ptr(), each.dtype): str(number) for number, each in alone}
        place = storage.data_ptr(), dtype  # a record is loaded as one dtype only
        if place not in self._keys:
            self._keys[place] = str(len(self._tensors) + len(self.others))
            self.others.append(storage)
        return self._keys[place]


def _is_alone(tensor: torch.Tensor) -> bool:
    """Whether what is stored of it is what its storage holds."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == byte_count(tensor)


def _part(value: Any, key_of: KeyOf) -> bytes:
    """A value's part of a pickle as torch.save makes it, with these keys for its storages.

    It takes what it memorises from itself only, so that it may stand anywhere.
    """
    try:
        return _inner(_pickled(value, _refuse_storages))
    except _StorageError:
        return _part_with_storages(value, key_of)


def _refuse_storages(value: Any) -> None:
    if torch.is_storage(value):
        raise _StorageError


def _part_with_storages(value: Any, key_of: KeyOf) -> bytes:
    made: list[bytes] = []

    class Recorder:
        """What torch.save derives its pickler from, giving it a `persistent_id` that knows storages."""

        persistent_id: Callable[[Any], tuple[Any, ...] | None]

        def __init__(self, file: BinaryIO, protocol: int) -> None:
            pass

        def dump(self, value: Any) -> None:
            made.append(_pickled(value, self._stands_for))
            raise _PickledError

        def _stands_for(self, value: Any) -> tuple[Any, ...] | None:
            stored = self.persistent_id(value)
            if stored is None:
                return None
            storage, dtype = getattr(value, "_untyped_storage", value), getattr(value, "dtype", torch.uint8)
            return (*stored[:_KEY], key_of(storage, dtype), *stored[_KEY + 1 :])

    module = SimpleNamespace(__name__=__name__, Pickler=Recorder)
    with contextlib.suppress(_PickledError):
        torch.save(value, io.BytesIO(), pickle_module=module, pickle_protocol=_PROTOCOL)
    return _inner(made[0])


class _PickledError(Exception):
    """Ends a torch.save of which only the pickle is wanted."""


class _StorageError(Exception):
    """Only torch.save can pickle this."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: BinaryIO, persistent_id: Callable[[Any], Any]) -> None:
        super().__init__(file, _PROTOCOL)
        self._persistent_id = persistent_id

    def persistent_id(self, value: Any) -> Any:
        return self._persistent_id(value)


def _pickled(value: Any, persistent_id: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, persistent_id).dump(value)
    return buffer.getvalue()


def _inner(pickled: bytes) -> bytes:
    return pickled[len(_PROTO) : -len(_STOP)]


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data
