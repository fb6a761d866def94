"""Random number generators of every library and device: capture, restore, and a form that loads weights-only.

Capturing and restoring draw nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class RngState:
    """One moment of all generators. Tensors are uint8, on the CPU.

    devices: device type -> one tensor per device, in index order; empty where only CPU generators were captured.
    own: of generators that belong to somebody, in the order in which the owner names them.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch_cpu: torch.Tensor
    devices: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    own: tuple[torch.Tensor, ...] = ()


def capture(*, with_devices: bool = True, own: Sequence[torch.Generator] = ()) -> RngState:
    """The current state. with_devices=False skips the accelerators: enough for what data loading draws."""
    devices: dict[str, list[torch.Tensor]] = {}
    if with_devices and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices["cuda"] = list(torch.cuda.get_rng_state_all())
    numpy: Any = np.random.get_state(legacy=True)
    states = tuple(generator.get_state() for generator in own)
    return RngState(random.getstate(), numpy, torch.get_rng_state(), devices, states)


def restore(state: RngState, *, own: Sequence[torch.Generator] = ()) -> None:
    """Set every generator that `state` holds."""
    for generator, theirs in zip(own, state.own, strict=False):
        generator.set_state(theirs)
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch_cpu)
    if "cuda" in state.devices:
        if not torch.cuda.is_available() or torch.cuda.device_count() < len(state.devices["cuda"]):
            raise ValueError("the state holds more CUDA generators than this machine has devices")
        torch.cuda.set_rng_state_all(state.devices["cuda"])


def is_same(a: RngState, b: RngState) -> bool:
    """Whether the CPU generators are in the same state."""
    return (
        a.python == b.python
        and torch.equal(a.torch_cpu, b.torch_cpu)
        and a.numpy[2:] == b.numpy[2:]
        and bool(np.array_equal(a.numpy[1], b.numpy[1]))
        and all(torch.equal(x, y) for x, y in zip(a.own, b.own, strict=True))
    )


def to_portable(state: RngState) -> dict[str, Any]:
    """Tensors and primitives only, so that `torch.load(weights_only=True)` reads it."""
    version, words, gauss = state.python
    name, keys, position, has_gauss, cached = state.numpy
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch_cpu": state.torch_cpu,
        "devices": state.devices,
        "own": list(state.own),
    }


def from_portable(body: dict[str, Any]) -> RngState:
    version, words, gauss = body["python"]
    name, keys, position, has_gauss, cached = body["numpy"]
    return RngState(
        python=(version, tuple(words.tolist()), gauss),
        numpy=(name, keys.numpy().astype(np.uint32), position, has_gauss, cached),
        torch_cpu=body["torch_cpu"],
        devices=dict(body["devices"]),
        own=tuple(body.get("own", ())),
    )
