"""Metrics in the middle of an epoch, which Lightning does not checkpoint: sums so far, and the values last logged.

Schedulers, early stopping and ModelCheckpoint decide by them, so a resumed epoch must average over all of its batches.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

_SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_SUMS = ("value", "cumulated_batch_size")


def capture(trainer: Any, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Values and references as they are now; copied by whoever takes the snapshot. modules: see `of_module`."""
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    return {
        "shown": {name: dict(getattr(connector, name)) for name in _SHOWN},
        "sums": {
            key: {name: getattr(metric, name) for name in _SUMS if hasattr(metric, name)}
            for key, metric in results.items()
            if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset
        },
        "modules": {
            name: {"count": metric._update_count, "states": {key: getattr(metric, key) for key in metric._defaults}}
            for name, metric in modules.items()
        },
    }


class PendingMetrics:
    """Puts captured metrics back: most at once, the sums when the first batch has logged under the same names."""

    def __init__(self, captured: dict[str, Any]) -> None:
        self._captured = captured
        self._sums: dict[str, dict[str, torch.Tensor]] = dict(captured["sums"])

    def restore(self, trainer: Any, modules: Mapping[str, Any]) -> None:
        """Before the first batch."""
        for name, values in self._captured["shown"].items():
            getattr(trainer._logger_connector, name).update(values)
        for name, metric in modules.items():
            stored = self._captured["modules"].get(name)
            if stored is None:
                continue
            for key, value in stored["states"].items():
                setattr(metric, key, _on(metric.device, value))
            metric._update_count, metric._computed = stored["count"], None

    def merge(self, trainer: Any) -> bool:
        """After a batch; returns whether anything is left to merge."""
        results = trainer.fit_loop.epoch_loop._results
        for key in [key for key in self._sums if key in results]:
            metric, stored = results[key], self._sums.pop(key)
            before = stored["value"].to(metric.value.device)
            if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
                metric.value = metric.meta.reduce_fx(before, metric.value)
            else:
                metric.value = before + metric.value  # the sum so far first, as it would have been added
            if "cumulated_batch_size" in stored:
                count = stored["cumulated_batch_size"].to(metric.value.device)
                metric.cumulated_batch_size = count + metric.cumulated_batch_size
            metric._computed = None
        return bool(self._sums)


def of_module(module: torch.nn.Module) -> dict[str, Any]:
    """The torchmetrics that are part of `module`, by name."""
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None:
        return {}
    # isinstance would ask each subclass of that abstract class about each class of the model, and keep the answers.
    return {name: each for name, each in module.named_modules() if torchmetrics.Metric in type(each).__mro__}


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, list):
        return [_on(device, item) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value
