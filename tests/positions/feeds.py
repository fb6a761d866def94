"""Loaders of every kind whose samples say which random numbers they drew, and a training that reads them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from spot_core.data.loaders import LoaderPositions

SAMPLES, BATCH = 11, 2
BATCHES = 6
EPOCHS = 3


def drawn() -> list[float]:
    """What each global generator gives next."""
    return [torch.rand(1).item(), float(np.random.rand()), random.random()]


class Drawing(Dataset):
    """Sample i is its index and what the generators gave when it was read. reads: how often each was, by any worker.

    draws_in_workers: if not, it draws in this process only, because what workers draw is not resumed.
    """

    def __init__(self, count: int = SAMPLES, *, draws_in_workers: bool = False) -> None:
        self.count, self.draws_in_workers = count, draws_in_workers
        self.reads = torch.zeros(count, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[float]:
        self.reads[index] += 1
        return [float(index), *(drawn() if self.draws_in_workers or get_worker_info() is None else [])]


class DrawingStream(IterableDataset):
    """The same in a fixed order, split among the workers."""

    def __init__(self) -> None:
        self.inner = Drawing(draws_in_workers=True)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[list[float]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.inner[index] for index in range(first, len(self.inner), stride))


class EagerBatches:
    """Draws the order as soon as it is asked for an iterator."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES).tolist()
        return (order[start : start + BATCH] for start in range(0, SAMPLES, BATCH))

    def __len__(self) -> int:
        return BATCHES


class LazyBatches(EagerBatches):
    """Draws the order when it is asked for the first batch."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from super().__iter__()


class BatchesOfNoKnownNumber:
    """Has no length."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(EagerBatches())


class ReshapedBatches:
    """Draws anew, for each batch, which samples are in it."""

    def __iter__(self) -> Iterator[list[int]]:
        return (torch.randint(SAMPLES, (BATCH,)).tolist() for _ in range(BATCHES))

    def __len__(self) -> int:
        return BATCHES


def shuffled(**workers: Any) -> DataLoader[Any]:
    return DataLoader(Drawing(), batch_size=BATCH, shuffle=True, **workers)


def weighted(**workers: Any) -> DataLoader[Any]:
    sampler = WeightedRandomSampler(torch.arange(1.0, SAMPLES + 1), SAMPLES)
    return DataLoader(Drawing(), batch_size=BATCH, sampler=sampler, **workers)


def with_its_own_generator(**workers: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(Drawing(), batch_size=BATCH, shuffle=True, generator=generator, **workers)


def with_a_sampler_with_a_generator(**workers: Any) -> DataLoader[Any]:
    dataset = Drawing()
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(5))
    return DataLoader(dataset, batch_size=BATCH, sampler=sampler, **workers)


LOADERS: dict[str, Any] = {
    "in order": lambda **workers: DataLoader(Drawing(), batch_size=BATCH, **workers),
    "shuffled": shuffled,
    "shuffled, short batch dropped": lambda **workers: DataLoader(
        Drawing(SAMPLES + 1 + BATCH // 2), batch_size=BATCH, shuffle=True, drop_last=True, **workers
    ),
    "weighted": weighted,
    "its own generator": with_its_own_generator,
    "sampler with a generator": with_a_sampler_with_a_generator,
    "eager batch sampler": lambda **workers: DataLoader(Drawing(), batch_sampler=EagerBatches(), **workers),
    "lazy batch sampler": lambda **workers: DataLoader(Drawing(), batch_sampler=LazyBatches(), **workers),
    "unbatched": lambda **workers: DataLoader(Drawing(BATCHES), batch_size=None, shuffle=True, **workers),
    "stream": lambda **workers: DataLoader(DrawingStream(), batch_size=BATCH, **workers),
}
WORKERS: dict[str, dict[str, Any]] = {
    "here": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def plain(batch: Any) -> Any:
    return [column.tolist() if isinstance(column, torch.Tensor) else column for column in batch]


def train(iterator: Iterator[Any]) -> list[Any]:
    """Steps to the end of the epoch: what each was fed, and what it drew."""
    return [(plain(batch), drawn()) for batch in iterator]


def reads_of(steps: list[Any], samples: int) -> list[int]:
    """How often each sample is read if no other steps are made than these."""
    fed = [round(index) for batch, _ in steps for index in np.ravel(batch[0])]
    return np.bincount(fed, minlength=samples).tolist()


def tracked(*loaders: Any, cycles: bool = False, fetches_ahead: bool = False) -> LoaderPositions:
    return LoaderPositions(loaders, cycles=cycles, fetches_ahead=fetches_ahead)


def through_a_file(states: Any) -> Any:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
