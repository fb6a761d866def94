"""Fingerprints: which frozen base a run stands on, and which tensors it trains.

The fingerprint of a tensor covers every bit: its bytes as integers, summed, and the same sum weighted by position
within rows, both exact and independent of the order of addition, so that the device may compute them in parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from blake3 import blake3

_BLOCK = 1 << 22
_PERIOD = 8191  # prime, so that exchanged rows of ordinary widths change the weighted sum


def of_tensors(tensors: Iterable[tuple[str, torch.Tensor]], *, device: torch.device | None = None) -> str:
    """Digest of names, shapes, dtypes and every value; 32 hex digits. Draws no random number.

    device: where to compute it, the same digest anywhere; by default where each tensor lies.
    """
    digest = blake3()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(repr(_sums(tensor, device)).encode())
    return str(digest.hexdigest())[:32]


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


@torch.no_grad()
def _sums(tensor: torch.Tensor, device: torch.device | None) -> tuple[int, int] | None:
    if tensor.is_meta or tensor.numel() == 0:
        return None
    flat = tensor.detach().contiguous().view(-1)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.dtype.itemsize)
    if width is None:
        flat = torch.view_as_real(flat).contiguous().view(-1)
        width = {4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]
    words = flat.view(width)
    device = device or words.device
    # Parts that stay in a CPU's cache; on an accelerator each part costs launches.
    part = _BLOCK if device.type != "cpu" else _BLOCK >> 6
    weights = torch.arange(min(_BLOCK, words.numel()), device=device).remainder_(_PERIOD).add_(1)
    # Accumulated on the device, where 64-bit sums wrap without loss: one transfer a tensor.
    plain = torch.zeros((), dtype=torch.int64, device=device)
    weighted = torch.zeros_like(plain)
    for start in range(0, words.numel(), part):
        block = words[start : start + part].to(device).to(torch.int64)
        plain += block.sum()
        weighted += block.mul_(weights[start % _BLOCK :][: block.numel()]).sum()
    return int(plain), int(weighted)
