"""Which parts of a module are torchmetrics."""

from __future__ import annotations

import weakref

import torch
import torchmetrics
from torch import nn

from lightning_spot import metrics


class Largest(torchmetrics.Metric):
    """A user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", default=torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, value: torch.Tensor) -> None:
        self.largest = torch.maximum(self.largest, value)

    def compute(self) -> torch.Tensor:
        return self.largest


def test_metrics_are_found_wherever_they_are() -> None:
    collection = torchmetrics.MetricCollection({"mean": torchmetrics.MeanMetric(), "largest": Largest()})
    module = nn.ModuleDict({"layer": nn.Linear(2, 2), "inner": nn.ModuleDict({"own": Largest()}), "all": collection})
    found = metrics.of_module(module)
    assert found.keys() == {"inner.own", "all.mean", "all.largest"}
    assert found["inner.own"] is module["inner"]["own"]


def test_finding_them_leaves_nothing_behind() -> None:
    """An abstract class keeps its answers for each pair of classes: thousands of objects, a full garbage collection."""

    class Layer(nn.Linear):
        pass

    module = nn.Sequential(Layer(2, 2), torchmetrics.MeanMetric())
    before = weakref.getweakrefcount(Layer)
    assert metrics.of_module(module).keys() == {"1"}
    assert weakref.getweakrefcount(Layer) == before
