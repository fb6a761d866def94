"""Loaders of different lengths that feed one training resume together."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import (
    DataLoader,
)

from spot_core.errors import ConfigError
from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState
from tests.positions.feeds import (
    BATCH,
    BATCHES,
    LOADERS,
    SAMPLES,
    WORKERS,
    BatchesOfNoKnownNumber,
    Drawing,
    drawn,
    plain,
    seed,
    shuffled,
    through_a_file,
    tracked,
)


def loaders_of_different_lengths(**workers: Any) -> list[Any]:
    """6, 2 and 1 batches."""
    return [
        shuffled(**workers),
        DataLoader(Drawing(3), batch_size=2, shuffle=True, **workers),
        DataLoader(Drawing(2), batch_size=2, shuffle=True, **workers),
    ]


def train_on_all(loaders: list[Any], steps: int, *, begin: RngState | None = None) -> list[Any]:
    """Steps on a batch of each loader; those that are exhausted begin again. begin: random state of the first step."""
    iterators = [iter(loader) for loader in loaders]
    if begin is not None:
        rng.restore(begin)
    made = []
    for _ in range(steps):
        batches = []
        for number, loader in enumerate(loaders):
            batch = next(iterators[number], None)
            if batch is None:
                iterators[number] = iter(loader)
                batch = next(iterators[number])
            batches.append(plain(batch))
        made.append((batches, drawn()))
    return made


@pytest.mark.parametrize("workers", ["here", "workers"])
def test_loaders_that_begin_again_within_an_epoch_resume_together(workers: str) -> None:
    of_workers = WORKERS[workers]
    seed(4)
    expected = train_on_all(loaders_of_different_lengths(**of_workers), BATCHES)
    for consumed in range(1, BATCHES):
        seed(4)
        loaders = loaders_of_different_lengths(**of_workers)
        positions = tracked(*loaders, cycles=True)
        steps = train_on_all(loaders, consumed)
        step = rng.capture(with_devices=False)
        states = through_a_file(positions.state(consumed, step))
        assert [state["batches"] for state in states] == [consumed, (consumed - 1) % 2 + 1, 1]
        seed(99)
        loaders = loaders_of_different_lengths(**of_workers)
        positions = tracked(*loaders, cycles=True)
        positions.resume(states)
        steps += train_on_all(loaders, BATCHES - consumed, begin=step)
        assert steps == expected, f"after {consumed} batches"


def test_a_short_loader_that_does_not_begin_again_stays_at_its_end() -> None:
    loaders = loaders_of_different_lengths()
    positions = tracked(*loaders, cycles=False)
    iterators = [iter(loader) for loader in loaders]
    for number in range(1, BATCHES + 1):
        for iterator in iterators:
            next(iterator, None)
        states = positions.state(number, rng.capture())
        assert [state and state["batches"] for state in states] == [number, min(number, 2), 1]
    again = loaders_of_different_lengths()
    tracked(*again, cycles=False).resume(states)
    assert [len(list(loader)) for loader in again] == [0, 0, 0]


def test_facts_tell_geometries_apart() -> None:
    facts = tracked(shuffled()).facts()
    assert facts == {"batch size": "2", "training samples": SAMPLES, "batches per epoch": BATCHES}
    assert tracked(DataLoader(Drawing(), batch_size=3)).facts() != facts
    assert tracked(DataLoader(Drawing(SAMPLES - 1), batch_size=BATCH)).facts() != facts
    assert tracked(DataLoader(Drawing(), batch_sampler=BatchesOfNoKnownNumber())).facts() == {
        "batch size": "None",
        "training samples": SAMPLES,
        "batches per epoch": "unknown",
    }
    two = tracked(shuffled(), LOADERS["stream"]()).facts()
    assert two["training samples of loader 1"] == SAMPLES
    assert len(two) == 6


def test_another_number_of_loaders_is_refused() -> None:
    step = rng.capture()
    states = tracked(shuffled(), shuffled()).state(0, step)
    with pytest.raises(ConfigError, match="positions of 2 training loaders, now there are 1"):
        tracked(shuffled()).resume(states)
