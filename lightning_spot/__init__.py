"""PyTorch Lightning fine-tunes that survive preemption: add `SpotCallback`, run the same command again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_spot.callback import SpotCallback

__all__ = ["SpotCallback"]


def __getattr__(name: str) -> Any:
    # Late: Lightning imports this package for its entry point whenever a Trainer is made, used or not.
    if name == "SpotCallback":
        from lightning_spot.callback import SpotCallback

        return SpotCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
