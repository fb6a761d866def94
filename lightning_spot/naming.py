"""Which tensors a checkpoint names. Finding out reads thousands of objects that a second of arithmetic has driven out
of the caches, most of what a checkpoint would hold training up; and hardly ever is it other than the time before.

So what was found last is named again, and looked at while training goes on, before the copy: if it is no longer so
(a callback has frozen a layer, exchanged a module, moved a weight), that one checkpoint is not written, and from then
on it is found out first each time. Where a trainer's callbacks usually do such things nothing is taken from before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from operator import is_
from typing import Any

import torch

from lightning_spot.module_state import POINTER, ModuleState
from lightning_spot.weights import IS_TRAINED, FrozenBase
from spot_core.handover import assured


@dataclass(frozen=True, slots=True)
class Names:
    """live: the module's state dict. frozen: those of its keys that hold the frozen base. trained: parameters by name.

    stable: data pointers of the weights that only the optimizer step changes. volatile: keys of what is none of them.
    """

    live: dict[str, Any]
    frozen: set[str]
    trained: list[str]
    stable: frozenset[int]
    volatile: set[str]

    def is_same(self, other: Names) -> bool:
        """Whether both name the same tensors, in the same memory, and say the same of them."""
        return (
            (self.frozen, self.trained, self.stable) == (other.frozen, other.trained, other.stable)
            and self.live.keys() == other.live.keys()
            and self._holds(other.live)
        )

    def only_stable(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether a state dict holds nothing but stable tensors of this one."""
        return self.volatile.isdisjoint(state_dict) and self._holds(state_dict)

    def _holds(self, state_dict: Mapping[str, Any]) -> bool:
        return all(map(is_, state_dict.values(), map(self.live.get, state_dict)))


class Naming:
    """Names what belongs to the checkpoints of one `fit`. parameters: of the module, by name."""

    def __init__(self, trainer: Any, base: FrozenBase | None, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._trainer, self._base, self._parameters = trainer, base, parameters
        self._module = ModuleState(trainer.lightning_module)
        self._last: Names | None = None
        self._may_assume = True
        self.is_assumed = False  # whether what was named last was not looked at

    def state_dict(self) -> dict[str, Any]:
        """Equal to the module's `state_dict()` of this moment."""
        return self._module.state_dict()

    def trained(self) -> list[str]:
        """The parameters that are trained, by name."""
        return list(compress(self._parameters, map(IS_TRAINED, self._parameters.values())))

    def names(self) -> Names:
        """Those of the time before if nothing speaks against it: then `is_assumed`, and `check` has work to do."""
        self.is_assumed = self._may_assume and self._module.is_plain and self._last is not None
        if self._last is None or not self.is_assumed:
            self._last = self._find()
        return self._last

    def check(self) -> Callable[[], bool]:
        """What tells whether the names given last are what would be found. Any thread, before an optimizer steps."""
        return partial(self._are_current, self._last) if self.is_assumed and self._last is not None else assured

    def forget(self) -> None:
        """Find out anew at the next checkpoint: an epoch has ended, or a validation."""
        self._last = None

    def _are_current(self, names: Names) -> bool:
        self._may_assume = False  # nor where looking fails, since forward exchanges parts at this moment
        self._may_assume = self._find().is_same(names)
        return self._may_assume

    def _find(self) -> Names:
        live = self._module.state_dict()
        frozen = self._base.keys(live) if self._base is not None else set()
        groups = (group for optimizer in self._trainer.optimizers for group in optimizer.param_groups)
        stable = frozenset(map(POINTER, chain.from_iterable(group["params"] for group in groups))) - {0}
        other = (key for key in live.keys() - frozen if not _lies_in(stable, live[key]))
        return Names(live, frozen, self.trained(), stable, set(other))


def _lies_in(places: frozenset[int], value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.data_ptr() in places
