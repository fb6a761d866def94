"""Loading `torch.save` files without running anything that they name.

A pickle may call any function. So only tensors, numpy arrays, plain values and what
`torch.serialization.add_safe_globals` allows are made. Where the caller needs no more than that something was there
(hyper-parameters, which a resume does not touch), other objects become `Inert`; elsewhere they are refused.
"""

from __future__ import annotations

import _compat_pickle
import collections
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import _weights_only_unpickler as torch_list

from spot_core.errors import CorruptCheckpointError

_PLAIN = {f"collections.{kind.__name__}": kind for kind in (collections.defaultdict, collections.deque)} | {
    f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set, frozenset, int, float, str)
}
_NUMPY = ("_reconstruct", "scalar")  # functions that rebuild arrays and scalars, in modules that moved in numpy 2


class Inert:
    """Stands where the file holds an object of a type that is not allowed. Takes whatever a pickle puts into it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _take(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return type(self)()

    __setstate__ = __setitem__ = append = extend = add = update = _take


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes protocol 2, with the names of Python 2.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        known = (_PLAIN, torch_list._get_allowed_globals(), torch_list._get_user_allowed_globals())  # type: ignore[no-untyped-call]
        found = next((each[full] for each in known if full in each), None)
        if found is not None:
            return found
        is_numpy = full in {"numpy.ndarray", "numpy.dtype"} or (
            module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name in _NUMPY
        )
        if is_numpy or (module == "numpy.dtypes" and name.endswith("DType")):
            return super().find_class(module, name)
        return type(name, (Inert,), {"__module__": module})


def load_plain(path: Path) -> dict[str, Any]:
    """The file's content, a dictionary of tensors and plain values, on the CPU.

    Raises CorruptCheckpointError, saying what to do, for anything else.
    """
    try:
        return _dictionary(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # Torch and pickle raise anything at what they do not expect.
        raise _unreadable(path, error) from error


def load_inert(path: Path, *, inert_keys: Collection[str]) -> dict[str, Any]:
    """The file's content, a dictionary, on the CPU. inert_keys: where objects of other types are left out.

    Raises CorruptCheckpointError, saying what to do, for such an object anywhere else (naming it and its place), for
    TorchScript, and for what is no zip archive of torch.save with a dictionary in it.
    """
    harmless = SimpleNamespace(__name__=__name__, Unpickler=_Unpickler, UnpicklingError=pickle.UnpicklingError)
    try:
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise TypeError("it is a TorchScript archive, which holds code")
        # Read, not mapped: the optimizer would copy page after page of a mapping in its first step, which takes longer,
        # and its state would keep the space of a pruned checkpoint taken for as long as training lasts.
        tree = _dictionary(torch.load(path, map_location="cpu", weights_only=False, pickle_module=harmless))
    except Exception as error:
        raise _unreadable(path, error) from error
    for key, value in tree.items():
        if key in inert_keys:
            continue
        for place, kind in _inert(value, (key,)):
            raise CorruptCheckpointError(
                f"{path}: {'.'.join(map(str, place))} is of type {kind.__module__}.{kind.__name__}, and loading "
                "it could run code. If you trust it call torch.serialization.add_safe_globals([that type]) before "
                "training; nothing was loaded."
            )
    return tree


def _dictionary(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise TypeError(f"it holds a {type(tree).__name__}, no dictionary")
    return tree


def _unreadable(path: Path, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} was not written by torch.save, changed since, or names what could run code: {error!r:.300}. Nothing "
        "was loaded or deleted. If spot verify finds no damage, whoever wrote it wrote its manifest, too: delete that "
        "manifest on both tiers to resume from the checkpoint before it, and sign manifests from then on (SECURITY.md)."
    )


def _inert(tree: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], type]]:
    kind = tree if isinstance(tree, type) else type(tree)
    if issubclass(kind, Inert):
        yield place, kind
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _inert(value, (*place, key))
    elif isinstance(tree, (list, tuple, set, frozenset)):
        for number, value in enumerate(tree):
            yield from _inert(value, (*place, number))
