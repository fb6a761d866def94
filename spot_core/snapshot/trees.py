"""Nested dicts, lists and tuples with tensors in them: what `torch.save` files hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

_IMMUTABLE = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)


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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors, wherever they are, have the same dtype, shape and bytes: NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat_bytes(a), flat_bytes(b))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in order as bytes on the host, shared where it lies like that."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def byte_count(tensor: torch.Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.dtype.itemsize
