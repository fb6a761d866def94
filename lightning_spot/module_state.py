"""A module's `state_dict()` without a walk: of thousands of modules that takes most of what a checkpoint holds up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import nn

# A module that takes these from nn.Module, and has no hooks, has nothing but its parameters, buffers and children in
# its state dict.
_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")

_Part = Callable[[dict[str, Any]], None]  # puts one module's part into a state dict


class ModuleState:
    """Knows where the tensors are that `module.state_dict()` would find, and finds out anew when a module was added,
    removed or exchanged. What makes its part of the state dict itself is asked each time."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._find()

    def state_dict(self) -> dict[str, Any]:
        """Equal to `module.state_dict()`: the same keys in the same order, tensors that share the live memory."""
        if self._sizes != list(map(len, self._containers)) or self._children != self._present_children():
            self._find()
        found: dict[str, Any] = {}
        for add in self._parts:
            add(found)
        return found

    def _find(self) -> None:
        self._parts: list[_Part] = []
        self._containers: list[Mapping[str, Any]] = []
        self._parents: list[Mapping[str, nn.Module | None]] = []
        self._add(self._module, "")
        self._sizes = list(map(len, self._containers))
        self._children = self._present_children()

    def _present_children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._parents)))  # type: ignore[arg-type]

    def _add(self, module: nn.Module, prefix: str) -> None:
        hooks = [getattr(module, name) for name in _HOOKS]
        self._containers += hooks
        if any(hooks) or not _is_plain(module):
            self._parts.append(_asked(module, prefix))
            return
        parameters, buffers, passing = module._parameters, module._buffers, module._non_persistent_buffers_set
        self._containers += [parameters, buffers]
        if parameters or buffers:
            self._parts.append(_read(prefix, parameters, buffers, passing))
        self._parents.append(module._modules)
        for name, child in module._modules.items():
            if child is not None:
                self._add(child, f"{prefix}{name}.")


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    return not any(name in vars(module) or getattr(kind, name) is not getattr(nn.Module, name) for name in _METHODS)


def _read(prefix: str, parameters: Mapping[str, Any], buffers: Mapping[str, Any], passing: set[str]) -> _Part:
    def add(found: dict[str, Any]) -> None:
        for name, parameter in parameters.items():
            if parameter is not None:
                found[prefix + name] = parameter.detach()
        for name, buffer in buffers.items():
            if buffer is not None and name not in passing:
                found[prefix + name] = buffer.detach()

    return add


def _asked(module: nn.Module, prefix: str) -> _Part:
    def add(found: dict[str, Any]) -> None:
        if not prefix:
            found.update(module.state_dict())
            return
        # What a child returns is not looked at.
        destination: OrderedDict[str, Any] = OrderedDict()
        destination._metadata = OrderedDict()  # type: ignore[attr-defined]
        module.state_dict(prefix=prefix, destination=destination)
        found.update(destination)

    return add
