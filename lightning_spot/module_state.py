"""A module's `state_dict()` without a walk: of thousands of modules that takes most of what a checkpoint holds up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import getitem, is_, methodcaller
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# A module that takes these from nn.Module, and has no hooks, has nothing but its parameters, buffers and children in
# its state dict.
_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_DETACHED, POINTER = methodcaller("detach"), methodcaller("data_ptr")


class ModuleState:
    """Knows where the tensors are that `module.state_dict()` would find, and finds out anew when a module was added,
    removed or exchanged. What makes its part of the state dict itself is asked each time."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._find()

    def state_dict(self) -> dict[str, Any]:
        """Equal to `module.state_dict()`: the same keys in the same order, tensors that share the live memory."""
        if self._has_new_hooks() or self._has_other_members():
            self._find()
        try:
            return self._read()
        except (KeyError, AttributeError):  # renamed, or set to None
            self._find()
            return self._read()

    @property
    def is_plain(self) -> bool:
        """Whether no module makes its part itself: then unchanged parts are the very tensors of the time before."""
        return all(isinstance(part, _Places) for part in self._parts)

    def _find(self) -> None:
        self._parts: list[_Places | _Asked] = []
        self._hooks: list[Mapping[int, Any]] = []
        self._hooks_ever = RemovableHandle.next_id
        self._containers: list[Mapping[str, Any]] = []
        self._parents: list[Mapping[str, nn.Module | None]] = []
        self._unset: list[tuple[Mapping[str, Any], str]] = []
        self._add(self._module, "")
        for found in (self._containers, self._parents):
            found.sort(key=id)  # as they lie in memory: none of it is in a cache when a checkpoint is due
        self._sizes = list(map(len, self._containers))
        self._children = self._present_children()

    def _has_new_hooks(self) -> bool:
        # Every hook of any module gets the next number: without a new one none of the thousands of dicts is looked at.
        before, self._hooks_ever = self._hooks_ever, RemovableHandle.next_id
        return self._hooks_ever != before and any(self._hooks)

    def _has_other_members(self) -> bool:
        return self._sizes != list(map(len, self._containers)) or self._children != self._present_children()

    def _present_children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._parents)))  # type: ignore[arg-type]

    def _read(self) -> dict[str, Any]:
        if any(container[name] is not None for container, name in self._unset):
            self._find()
        found: dict[str, Any] = {}
        for part in self._parts:
            found.update(part.read())
        return found

    def _add(self, module: nn.Module, prefix: str) -> None:
        hooks = [getattr(module, name) for name in _HOOKS]
        if any(hooks) or not _is_plain(module):
            self._parts.append(_Asked(module, prefix))
            return
        self._hooks += hooks
        self._containers += [module._parameters, module._buffers, module._modules]
        self._add_places(module, prefix)
        if module._modules:
            self._parents.append(module._modules)
        for name, child in module._modules.items():
            if child is not None:
                self._add(child, f"{prefix}{name}.")

    def _add_places(self, module: nn.Module, prefix: str) -> None:
        buffers = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        for container, names in ((module._parameters, module._parameters), (module._buffers, buffers)):
            for name in names:
                if container[name] is None:
                    self._unset.append((container, name))
                    continue
                if not self._parts or not isinstance(self._parts[-1], _Places):
                    self._parts.append(_Places())
                self._parts[-1].add(prefix + name, container, name)  # type: ignore[union-attr]


class _Places:
    """Tensors by the dicts that hold them. They are read without a Python loop, and made anew once they have moved."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._holders: list[Mapping[str, Any]] = []
        self._names: list[str] = []
        self._tensors: list[torch.Tensor] = []
        self._pointers: list[int] = []
        self._detached: dict[str, torch.Tensor] = {}

    def add(self, key: str, holder: Mapping[str, Any], name: str) -> None:
        self._keys.append(key)
        self._holders.append(holder)
        self._names.append(name)

    def read(self) -> dict[str, Any]:
        """Raises KeyError, AttributeError if one is no longer there."""
        tensors = list(map(getitem, self._holders, self._names))
        pointers = list(map(POINTER, tensors))
        if pointers != self._pointers or not all(map(is_, tensors, self._tensors)):
            self._detached = dict(zip(self._keys, map(_DETACHED, tensors), strict=True))
            self._tensors, self._pointers = tensors, pointers
        return self._detached


@dataclass(frozen=True, slots=True)
class _Asked:
    """A module that makes its own part."""

    module: nn.Module
    prefix: str

    def read(self) -> Mapping[str, Any]:
        if not self.prefix:
            return self.module.state_dict()
        # What a child returns is not looked at.
        destination: OrderedDict[str, Any] = OrderedDict()
        destination._metadata = OrderedDict()  # type: ignore[attr-defined]
        self.module.state_dict(prefix=self.prefix, destination=destination)
        return destination


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    return not any(name in vars(module) or getattr(kind, name) is not getattr(nn.Module, name) for name in _METHODS)
