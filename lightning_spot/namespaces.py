"""Lightning under its two names, `lightning.pytorch` and `pytorch_lightning`: the same code, different classes.

A callback must be an instance of the class that the user's Trainer knows, so ours derives from those that are loaded.
The other is left alone: importing both takes time, and moves the messages of the first to the second's logger.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAMES = ("lightning.pytorch", "pytorch_lightning")


def loaded() -> tuple[ModuleType, ...]:
    """The namespaces that are imported by now."""
    return tuple(sys.modules[name] for name in NAMES if name in sys.modules)


def callback_base() -> Any:
    """A class that is a `Callback` in every namespace that is loaded, or installed if none is loaded yet.

    Raises ImportError if there is none.
    """
    if not loaded():
        for name in NAMES:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                continue
    if not loaded():
        raise ImportError("lightning_spot needs Lightning 2.5 or newer: pip install 'spot-callbacks[lightning]'")
    return type("Callback", tuple(namespace.Callback for namespace in loaded()), {})


def is_a(thing: object, kind: str) -> bool:
    """Whether `thing` is an instance of the class at this path below a namespace, `callbacks.ModelCheckpoint`."""
    return isinstance(thing, _classes(kind, tuple(namespace.__name__ for namespace in loaded())))


@functools.cache
def _classes(kind: str, names: tuple[str, ...]) -> tuple[type, ...]:
    module, _, name = kind.rpartition(".")
    modules = (importlib.import_module(f"{each}.{module}") for each in names)
    return tuple(getattr(each, name) for each in modules if hasattr(each, name))  # older releases lack some


def is_own(code: type | Callable[..., Any]) -> bool:
    """Whether a class or a function was written by Lightning, not by a user or another library."""
    return code.__module__.startswith(tuple(f"{name}." for name in NAMES))
