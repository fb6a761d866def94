"""Rows of tokens that say which row they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from tests.lives.job import Place

SAMPLES = 37  # no multiple of any batch size used: the last batch of an epoch is short
LENGTH = 12


def _nothing() -> None:
    pass


class Tokens(Dataset):
    """Row i starts with token i; the rest is fixed, or drawn anew at each read."""

    def __init__(self, count: int, *, is_augmented: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(50, 120, (count, LENGTH), generator=generator)
        self.rows[:, 0] = torch.arange(count)
        self.is_augmented = is_augmented
        self.before_read: Callable[[], None] = _nothing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.before_read()
        row = self.rows[index].clone()
        if self.is_augmented:
            row[1:] = torch.where(torch.rand(LENGTH - 1) < 0.3, 121, row[1:])
            row[1 + np.random.randint(LENGTH - 1)] = 122
            row[random.randrange(1, LENGTH)] = 120
        return {"input_ids": row, "labels": row.clone()}


def hang_while_reading(data: Tokens, place: Place, step: Callable[[], int]) -> None:
    """In the middle of a batch, after others of it were read. step: how many were made."""
    reads = 0

    def before_read() -> None:
        nonlocal reads
        reads += step() == place.number
        place.hang_if("hang_reading", reads == 3)

    data.before_read = before_read


class Stream(IterableDataset):
    """The same rows as a stream of fixed order."""

    def __init__(self, count: int) -> None:
        self.inner = Tokens(count)

    def __iter__(self) -> Any:
        return (self.inner[i] for i in range(len(self.inner)))
