"""Fingerprints: which frozen base a run stands on, and which tensors it trains.

The fingerprint of a tensor covers every bit: its bytes as integers, summed, and the same sum weighted by position
within rows, both exact and independent of the order of addition, so that the device may compute them in parallel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from blake3 import blake3

_BLOCK = 1 << 22
_PERIOD = 8191  # prime, so that exchanged rows of ordinary widths change the weighted sum


def of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of names, shapes, dtypes and every value; 32 hex digits. Draws no random number."""
    digest = blake3()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(repr(_sums(tensor)).encode())
    return str(digest.hexdigest())[:32]


def of_shapes(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of names, shapes and dtypes alone."""
    digest = blake3()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    return str(digest.hexdigest())[:32]


@torch.no_grad()
def _sums(tensor: torch.Tensor) -> tuple[int, int] | None:
    if tensor.is_meta or tensor.numel() == 0:
        return None
    flat = tensor.detach().contiguous().view(-1)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.dtype.itemsize)
    if width is None:
        flat = torch.view_as_real(flat).contiguous().view(-1)
        width = {4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]
    words = flat.view(width)
    weights = torch.arange(_BLOCK, device=words.device).remainder_(_PERIOD).add_(1)
    # Accumulated on the device, where 64-bit sums wrap without loss: one transfer a tensor.
    plain = torch.zeros((), dtype=torch.int64, device=words.device)
    weighted = torch.zeros_like(plain)
    for start in range(0, words.numel(), _BLOCK):
        block = words[start : start + _BLOCK].to(torch.int64)
        plain += block.sum()
        weighted += block.mul_(weights[: block.numel()]).sum()
    return int(plain), int(weighted)
