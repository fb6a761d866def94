"""Random number generators of every library and device: capture, restore, and a form that loads weights-only.

Capturing and restoring draw nothing.
"""

from __future__ import annotations

import ctypes
import functools
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from spot_core.errors import ConfigError


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
    """The current state. Raises ConfigError if numpy's is of a kind that is not stored.

    with_devices=False skips the accelerators: enough for what data loading draws.
    """
    devices: dict[str, list[torch.Tensor]] = {}
    if with_devices and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices["cuda"] = list(torch.cuda.get_rng_state_all())
    return RngState(_python.state(), _numpy.state(), torch.get_rng_state(), devices, of_own(own))


def of_own(own: Sequence[torch.Generator]) -> tuple[torch.Tensor, ...]:
    """The states of generators that belong to somebody."""
    return tuple(generator.get_state() for generator in own)


def restore(state: RngState, *, own: Sequence[torch.Generator] = ()) -> None:
    """Set every generator that `state` holds."""
    for generator, theirs in zip(own, state.own, strict=False):
        generator.set_state(theirs)
    random.setstate(state.python)
    _numpy.restore(state.numpy)
    torch.set_rng_state(state.torch_cpu)
    if "cuda" in state.devices:
        if not torch.cuda.is_available() or torch.cuda.device_count() < len(state.devices["cuda"]):
            raise ValueError("the state holds more CUDA generators than this machine has devices")
        torch.cuda.set_rng_state_all(state.devices["cuda"])


class _GlobalPython:
    """Python's global generator. Its state is read before every batch, which takes Python 10 us: what was read last is
    kept, and read again once the bytes behind it have changed."""

    _WORDS = struct.Struct("i624I")  # of a Mersenne twister in CPython: the position in its words, and they
    _OFFSET = object.__basicsize__

    def __init__(self) -> None:
        self._read: tuple[bytes, float | None, tuple[Any, ...]] | None = None
        self._generator: Any = getattr(random.getstate, "__self__", None)
        self._is_known = self._lies_there()

    def state(self) -> tuple[Any, ...]:
        if not self._is_known:
            return random.getstate()
        words, leftover = self._words(), self._generator.gauss_next
        if self._read is None or self._read[:2] != (words, leftover):
            self._read = (words, leftover, random.getstate())
        return self._read[2]

    def _words(self) -> bytes:
        return ctypes.string_at(id(self._generator) + self._OFFSET, self._WORDS.size)

    def _lies_there(self) -> bool:
        """Whether this interpreter keeps the words right behind an object's head. Nothing promises that."""
        kind = type(self._generator).__base__
        if kind is None or kind.__basicsize__ < self._OFFSET + self._WORDS.size:
            return False
        _, words, _ = random.getstate()
        return self._WORDS.unpack(self._words()) == (words[-1], *words[:-1])


class _GlobalNumpy:
    """numpy's, likewise: reading it takes numpy 35 us."""

    _BYTES = 624 * 4 + 4  # the words, and the position in them

    def __init__(self) -> None:
        self._read: tuple[Any, bytes, tuple[Any, ...]] | None = None

    def state(self) -> tuple[Any, ...]:
        generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(generator, np.random.MT19937):
            raise ConfigError(
                f"numpy's global generator is a {type(generator).__name__}, and only its usual MT19937 can be stored. "
                "Leave that in place (np.random.set_bit_generator), and give code that wants another its own Generator."
            )
        words = ctypes.string_at(generator.ctypes.state_address, self._BYTES)
        if self._read is not None and self._read[0] is generator and self._read[1] == words:
            return self._read[2]
        state: tuple[Any, ...] = tuple(np.random.get_state(legacy=True))
        # Every second normal number is a leftover that changes no word when it is drawn: then nothing is kept.
        has_leftover = bool(state[3])
        self._read = None if has_leftover else (generator, words, state)
        return state

    def restore(self, state: tuple[Any, ...]) -> None:
        self._read = None  # the same words with a leftover are another state
        np.random.set_state(state)


_python, _numpy = _GlobalPython(), _GlobalNumpy()


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
        "python": [version, _tensor_of(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch_cpu": state.torch_cpu,
        "devices": state.devices,
        "own": list(state.own),
    }


@functools.lru_cache(maxsize=8)
def _tensor_of(words: tuple[int, ...]) -> torch.Tensor:
    """Shared by the states of one moment, and by those of many where nothing draws from Python's generator."""
    return torch.tensor(words, dtype=torch.int64)


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
