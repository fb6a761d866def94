"""The frozen base: weights that training does not change and that checkpoints therefore leave out.

Frozen means: `requires_grad` is False, and the values are those of the start. A teacher that follows its student is
not frozen, although no gradient reaches it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, MutableMapping
from operator import attrgetter, is_
from typing import Any

import torch

from lightning_spot.module_state import POINTER
from lightning_spot.namespaces import is_a, is_own
from spot_core.errors import ConfigError
from spot_core.snapshot import fingerprint

logger = logging.getLogger(__name__)

# Where a checkpoint may hold the module's weights. The second is WeightAveraging's, whose average is in the first.
WEIGHTS = ("state_dict", "current_model_state")

IS_TRAINED, _VERSION = attrgetter("requires_grad"), attrgetter("_version")


class FrozenBase:
    """The parameters that were frozen when the model was whole, before a checkpoint was loaded.

    device: where training will take place; fingerprints are computed there.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._parameters = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._digests = self._present_digests(self._parameters)
        self._marks = self._present_marks()
        self.fingerprint = fingerprint.of_digests(self._digests)
        self._owners: dict[str, str] = {}  # key of the state dict -> the parameter it holds, or a part of
        self._known: frozenset[str] = frozenset()  # keys that were looked at
        self._held: tuple[list[Any], set[str]] = ([], set())  # what was under the owners' keys, and which keys hold it
        self._verified = 0

    @classmethod
    def of(cls, module: torch.nn.Module, device: torch.device) -> FrozenBase | None:
        """None if every parameter is trained."""
        base = cls(module, device)
        return base if base._digests else None

    def training_starts(self, loaded: Collection[str] = ()) -> None:
        """Take note of where the base lies by now: it was moved to the device, and perhaps to another precision.

        loaded: those into which a resume has put the values that they had, see `complete`. Written to once, in the same
        place, they need not be read again: the base is read after the first step anyway.
        """
        present = self._present_marks()
        for name in self._parameters.keys() & loaded:
            pointer, version = self._marks[name]
            if present[name] == (pointer, version + 1):
                self._marks[name] = present[name]
        moved = {name: p for name, p in self._parameters.items() if present[name] != self._marks[name]}
        self._digests |= self._present_digests(moved)
        self._marks = present

    def verify(self) -> None:
        """Read every weight again and let go of those that changed, however they were changed."""
        present = self._present_digests(self._parameters)
        moved = [name for name, digest in present.items() if self._digests[name] != digest]
        for name in moved:
            self._let_go_of(name)
        self._held = [], set()
        self._verified += 1
        if not moved:
            return
        logger.log(
            logging.INFO if self._verified == 1 else logging.WARNING,
            "%d tensors without gradient are changed by training and are part of the checkpoints from here on: %s",
            len(moved),
            ", ".join(moved[:5]),
        )

    def keys(self, state_dict: Mapping[str, Any]) -> set[str]:
        """The keys of `state_dict` that hold nothing but the frozen base.

        Quantized layers store a weight's parts below the weight's own key.
        """
        if state_dict.keys() != self._known:
            self._owners, self._known = self._find_owners(state_dict), frozenset(state_dict)
        changed = self._let_go_of_changed()
        values = list(map(state_dict.__getitem__, self._owners))
        seen, held = self._held
        if changed or len(values) != len(seen) or not all(map(is_, values, seen)):
            held = {key for key, name in self._owners.items() if self._is_held(state_dict[key], key, name)}
            self._held = values, held
        return held

    def _let_go_of_changed(self) -> bool:
        """Forget what was unfrozen or written to in place; returns whether there was any."""
        present = self._present_marks()
        if present == self._marks and not any(map(IS_TRAINED, self._parameters.values())):
            return False
        for name, parameter in list(self._parameters.items()):
            if parameter.requires_grad or present[name] != self._marks[name]:
                self._let_go_of(name)
        return True

    def _let_go_of(self, name: str) -> None:
        del self._parameters[name], self._marks[name]

    def _present_marks(self) -> dict[str, tuple[int, int]]:
        """Of each parameter, what changes when it is written to in place, or given other memory."""
        parameters = self._parameters.values()
        marks = zip(map(POINTER, parameters), map(_VERSION, parameters), strict=True)
        return dict(zip(self._parameters, marks, strict=True))

    def _find_owners(self, state_dict: Mapping[str, Any]) -> dict[str, str]:
        by_pointer = {p.data_ptr(): name for name, p in self._parameters.items() if p.data_ptr()}
        owners = {}
        for key, value in state_dict.items():
            parts = key.split(".")
            parents = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            owner = next((name for name in parents if name in self._parameters), None)
            if owner is None and isinstance(value, torch.Tensor):
                owner = by_pointer.get(value.data_ptr())  # tied under another name
            if owner is not None:
                owners[key] = owner
        return owners

    def _is_held(self, value: Any, key: str, name: str) -> bool:
        parameter = self._parameters.get(name)
        # The module may have been given another parameter under the same name.
        return parameter is not None and (key != name or value.data_ptr() == parameter.data_ptr())

    def _present_digests(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, str]:
        return fingerprint.of_each(parameters, device=self._device)


def trim(checkpoint: MutableMapping[str, Any], frozen: set[str]) -> None:
    """Take the frozen base out of a checkpoint, wherever it holds the module's weights."""
    for place in WEIGHTS:
        if place in checkpoint:
            checkpoint[place] = {key: value for key, value in checkpoint[place].items() if key not in frozen}


def complete(checkpoint: MutableMapping[str, Any], live: Mapping[str, Any], absent: set[str]) -> None:
    """Put live weights in the places of those that a checkpoint was stored without, so that it loads strictly.

    Raises ConfigError, naming them, unless the keys that are missing are exactly those that were left out.
    """
    for place in WEIGHTS:
        stored = checkpoint.get(place)
        if stored is None:
            continue
        wrong = sorted((live.keys() - stored.keys()) ^ absent) + sorted(stored.keys() - live.keys())
        if wrong:
            raise ConfigError(
                f"the checkpoint does not fit this model: {len(wrong)} tensors of one have no counterpart in the "
                f"other, although they should: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}. Training was "
                "not started; nothing was changed. Build and freeze the model as in the run's earlier lives."
            )
        checkpoint[place] = {**stored, **{key: live[key] for key in absent}}


def rest_in_validation(trainer: Any) -> bool:
    """Whether the module's weights are those of training while it validates: averages take their place for the time.

    Callbacks that are not Lightning's, or the module's own hooks, may do the same.
    """
    for owner in (trainer.lightning_module, *trainer.callbacks):
        if is_a(owner, "callbacks.WeightAveraging") or is_a(owner, "callbacks.StochasticWeightAveraging"):
            return False
        for hook in ("on_validation_start", "on_validation_epoch_start"):
            if not is_own(getattr(type(owner), hook)) and not type(owner).__module__.startswith("lightning_spot"):
                return False
    return True
