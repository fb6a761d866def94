"""The ways in which a Lightning user feeds a training, each with an order of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.lightning.namespace import pl
from tests.lives.data import SAMPLES, Stream, Tokens

BATCH = 4
COMBINED = pl.utilities.CombinedLoader


class ShuffledBatches:
    """Batches of shuffled indices by torch's global generator, with no sampler to ask."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count).tolist()
        return (order[start : start + BATCH] for start in range(0, self.count, BATCH))

    def __len__(self) -> int:
        return -(-self.count // BATCH)


class CountingStream(Stream):
    """A stream that knows how far it was read, and draws random numbers."""

    def __init__(self, count: int, *, is_augmented: bool) -> None:
        self.inner = Tokens(count, is_augmented=is_augmented)
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        while self.read < len(self.inner):
            self.read += 1
            yield self.inner[self.read - 1]
        self.read = 0

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


class Counting(pl.LightningDataModule):
    """Counts the training batches that it served and writes the count into each."""

    def __init__(self, train: Any, validation: Any) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.served = 0

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return self.validation

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            self.served += 1
            batch["input_ids"][:, 1] = 50 + self.served
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.served = state_dict["served"]


def training_loader(data: str, of_workers: dict[str, Any], *, samples: int, batch: int) -> Any:
    rows: Dataset = Tokens(samples, is_augmented=data == "augmented")
    if data == "stateful":
        return StatefulDataLoader(rows, batch_size=BATCH, shuffle=True, **of_workers)
    if data == "stateful_stream":
        return StatefulDataLoader(CountingStream(SAMPLES, is_augmented=True), batch_size=BATCH, **of_workers)
    if data == "stream":
        return DataLoader(Stream(SAMPLES), batch_size=BATCH, **of_workers)
    if data == "batch_sampler":
        return DataLoader(rows, batch_sampler=ShuffledBatches(SAMPLES), **of_workers)
    if data == "distributed_sampler":
        sampler = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=True)
        return DataLoader(rows, batch_size=BATCH, sampler=sampler, **of_workers)
    shuffled = DataLoader(rows, batch_size=batch, shuffle=True, **of_workers)
    if data == "combined":
        shorter = DataLoader(Tokens(15), batch_size=BATCH, shuffle=True, **of_workers)
        return COMBINED({"long": shuffled, "short": shorter}, "max_size_cycle")
    return shuffled


def data_of(data: str, of_workers: dict[str, Any], *, samples: int = SAMPLES, batch: int = BATCH) -> dict[str, Any]:
    """Keyword arguments for `trainer.fit`. of_workers: those of every loader. samples, batch: for training."""
    train = training_loader(data, of_workers, samples=samples, batch=batch)
    validation = DataLoader(Tokens(9), batch_size=BATCH, **of_workers)
    if data == "datamodule":
        return {"datamodule": Counting(train, validation)}
    return {"train_dataloaders": train, "val_dataloaders": validation}
