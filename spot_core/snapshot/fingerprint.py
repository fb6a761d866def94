"""Fingerprints: which frozen base a run stands on, and which tensors it trains.

The fingerprint of a tensor covers every bit: its bytes as integers, summed, and the same sum weighted by position
within rows, both exact and independent of the order of addition, so that the device may compute them in parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
from blake3 import blake3

_PERIOD = 8191  # prime, so that exchanged rows of ordinary widths change the weighted sum
_BLOCK = 1 << 22  # after which the weights begin again: part of the definition, which stored runs rely on
_ROWS = 32


def of_tensors(tensors: Iterable[tuple[str, torch.Tensor]], *, device: torch.device | None = None) -> str:
    """Digest of names, shapes, dtypes and every value; 32 hex digits. Draws no random number.

    device: where to compute it, the same digest anywhere; by default where each tensor lies.
    """
    named = list(tensors)
    digest = blake3()
    for (name, tensor), sums in zip(named, _sums_of_each([tensor for _, tensor in named], device), strict=True):
        digest.update(_described(name, tensor, sums))
    return str(digest.hexdigest())[:32]


def of_each(tensors: Mapping[str, torch.Tensor], *, device: torch.device | None = None) -> dict[str, str]:
    """What `of_tensors` returns for each of them alone."""
    each = zip(tensors.items(), _sums_of_each(list(tensors.values()), device), strict=True)
    return {name: str(blake3(_described(name, tensor, sums)).hexdigest())[:32] for (name, tensor), sums in each}


def of_shapes(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of names, shapes and dtypes alone."""
    digest = blake3()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    return str(digest.hexdigest())[:32]


def of_digests(digests: Mapping[str, str]) -> str:
    """Digest of digests by name; 32 hex digits."""
    digest = blake3()
    for name, value in digests.items():
        digest.update(f"{name}|{value}|".encode())
    return str(digest.hexdigest())[:32]


_Sums = tuple[int, int] | None


def _described(name: str, tensor: torch.Tensor, sums: _Sums) -> bytes:
    return f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{sums!r}".encode()


def _sums_of_each(tensors: Sequence[torch.Tensor], device: torch.device | None) -> list[_Sums]:
    """On a CPU with one tensor for each thread.

    torch would share out every one of thousands of sums: while another process has a core, all wait for it at each.
    """
    threads = torch.get_num_threads()
    if any((device or tensor.device).type != "cpu" for tensor in tensors):
        return [_sums(tensor, device) for tensor in tensors]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(_sums, tensors, repeat(device)))
        finally:
            torch.set_num_threads(threads)  # what later threads of this process begin with


@torch.no_grad()
def _sums(tensor: torch.Tensor, device: torch.device | None) -> _Sums:
    if tensor.is_meta or tensor.numel() == 0:
        return None
    flat = tensor.detach().contiguous().view(-1)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.dtype.itemsize)
    if width is None:
        flat = torch.view_as_real(flat).contiguous().view(-1)
        width = {4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]
    words = flat.view(width)
    device = device or words.device
    # One sum for each weight, so that no element is widened to 64 bits and multiplied by itself. On the device, where
    # they wrap without loss: one transfer a tensor. Parts that stay in a CPU's cache; elsewhere each costs launches.
    part = _PERIOD * (_ROWS if device.type == "cpu" else _BLOCK)
    # Of short words a block's sums, of some 500 rows, fit into half the width, which takes two thirds of the time.
    wide = torch.int64 if words.dtype.itemsize > 2 else torch.int32
    columns = torch.zeros(min(_PERIOD, words.numel()), dtype=torch.int64, device=device)
    for start in range(0, words.numel(), _BLOCK):
        block = words[start : start + _BLOCK]
        whole = block.numel() - block.numel() % _PERIOD
        for first in range(0, whole, part):
            rows = block[first : min(first + part, whole)].to(device).view(-1, _PERIOD)
            columns += rows.sum(0, dtype=wide)
        columns[: block.numel() - whole] += block[whole:].to(device)
    weights = torch.arange(1, columns.numel() + 1, device=device)
    return int(columns.sum()), int(columns.mul_(weights).sum())
