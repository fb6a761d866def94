"""One loader: tracking changes nothing, and a resume goes on with the very next sample and random number."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import (
    DataLoader,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState
from tests.positions.feeds import (
    BATCH,
    BATCHES,
    EPOCHS,
    LOADERS,
    SAMPLES,
    WORKERS,
    Drawing,
    ReshapedBatches,
    drawn,
    plain,
    reads_of,
    seed,
    shuffled,
    through_a_file,
    tracked,
    train,
    weighted,
)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_tracked_loader_yields_and_draws_what_an_untracked_one_does(kind: str, workers: str) -> None:
    def epochs(is_tracked: bool) -> tuple[list[Any], RngState]:
        seed(1)
        loader = LOADERS[kind](**WORKERS[workers])
        positions = tracked(loader) if is_tracked else None
        steps = []
        for _ in range(2):
            steps.append(train(iter(loader)))
            if positions is not None:
                positions.epoch_ends()
        assert len(loader) == BATCHES
        return steps, rng.capture(with_devices=False)

    (ours, our_end), (theirs, their_end) = epochs(True), epochs(False)
    assert ours == theirs
    assert ours[0] != ours[1]
    assert rng.is_same(our_end, their_end)


@pytest.mark.parametrize(
    ("kind", "workers"),
    # What is drawn in a worker that has been through an epoch already does not come back.
    [(kind, workers) for kind in LOADERS for workers in WORKERS if (kind, workers) != ("stream", "persistent")],
)
def test_resumed_after_any_batch_it_goes_on_as_if_never_stopped(kind: str, workers: str) -> None:
    """The second of three epochs is interrupted. What was consumed is not read again, unless there is no way round."""
    seed(2)
    reference = LOADERS[kind](**WORKERS[workers])
    epochs = [train(iter(reference)) for _ in range(EPOCHS)]
    end = rng.capture(with_devices=False)
    for consumed in range(BATCHES + 1) if workers == "here" else (0, 1, 4, BATCHES):
        seed(2)
        loader = LOADERS[kind](**WORKERS[workers])
        positions = tracked(loader)
        assert train(iter(loader)) == epochs[0]
        positions.epoch_ends()
        iterator = iter(loader)
        steps = [(plain(next(iterator)), drawn()) for _ in range(consumed)]
        step = rng.capture(with_devices=False)
        states = through_a_file(positions.state(consumed, step))
        del iterator

        seed(99)  # another process
        loader = LOADERS[kind](**WORKERS[workers])
        positions = tracked(loader)
        positions.resume(states)
        iterator = iter(loader)
        rng.restore(step)  # as trainers do right before the first batch
        positions.settle()
        steps += train(iterator)
        assert steps == epochs[1], f"after {consumed} batches"
        if kind != "stream":
            assert loader.dataset.reads.tolist() == reads_of(epochs[1][consumed:], len(loader.dataset))
        positions.epoch_ends()
        if workers != "persistent":  # those draw once in a process: the trainer knows when
            assert train(iter(loader)) == epochs[2]
            assert rng.is_same(rng.capture(with_devices=False), end)


@pytest.mark.parametrize("kind", ["shuffled", "eager batch sampler", "lazy batch sampler", "unbatched"])
def test_a_trainer_that_fetches_a_batch_ahead_resumes_with_that_batch_as_it_was_drawn(kind: str) -> None:
    """As Lightning does with loaders whose length it does not know."""

    def steps_of(iterator: Iterator[Any], first: Any) -> Iterator[tuple[Any, RngState]]:
        upcoming = first
        while upcoming is not None:
            batch, upcoming = upcoming, next(iterator, None)
            step = (plain(batch), drawn())
            yield step, rng.capture(with_devices=False)

    seed(3)
    reference = iter(LOADERS[kind]())
    expected = [step for step, _ in steps_of(reference, next(reference))]
    for consumed in range(1, BATCHES):
        seed(3)
        loader = LOADERS[kind]()
        positions = tracked(loader, fetches_ahead=True)
        iterator = iter(loader)
        running = steps_of(iterator, next(iterator))
        for number in range(1, consumed + 1):
            ours, step = next(running)
            assert ours == expected[number - 1]
            states = positions.state(number, step)
        seed(99)
        loader = LOADERS[kind]()
        positions = tracked(loader, fetches_ahead=True)
        positions.resume(through_a_file(states))
        iterator = iter(loader)
        first = next(iterator)
        rng.restore(step)
        assert [step for step, _ in steps_of(iterator, first)] == expected[consumed:]
        assert loader.dataset.reads.tolist() == reads_of(expected[consumed:], len(loader.dataset))


def test_a_state_at_the_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    seed(6)
    reference = shuffled()
    epochs = [train(iter(reference)) for _ in range(2)]
    seed(6)
    loader = shuffled()
    positions = tracked(loader)
    train(iter(loader))
    positions.epoch_ends()
    step = rng.capture(with_devices=False)
    states = through_a_file(positions.state(0, step))
    seed(99)
    loader = shuffled()
    positions = tracked(loader)
    positions.resume(states)
    rng.restore(step)
    assert train(iter(loader)) == epochs[1]


def test_a_second_training_over_the_same_loaders_is_tracked_by_its_own_positions() -> None:
    def loaders() -> list[Any]:
        return [LOADERS[kind]() for kind in ("shuffled", "eager batch sampler", "stream")]

    ours, theirs = loaders(), loaders()
    trainings = []
    for _ in range(3):
        trainings.append(tracked(*ours))
        seed(7)
        steps = [train(iter(loader)) for loader in ours]
        seed(7)
        assert steps == [train(iter(loader)) for loader in theirs]
    states = [positions.state(BATCHES, rng.capture()) for positions in trainings]
    assert [[bool(state["epoch_start"]) for state in of_one] for of_one in states] == [[True] * 3] * 3
    trainings[-1].epoch_ends()
    states = [positions.state(0, rng.capture()) for positions in trainings]
    assert [[bool(state["epoch_start"]) for state in of_one] for of_one in states] == [[True] * 3] * 2 + [[False] * 3]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_tracked_loader_can_be_let_go_of(kind: str) -> None:
    """By reference counting: persistent workers that wait for the garbage collector block it for seconds each."""
    loader = LOADERS[kind]()
    positions = tracked(loader)
    train(iter(loader))
    alive = weakref.ref(loader)
    gc.disable()
    try:
        del positions, loader
        assert alive() is None
    finally:
        gc.enable()


def test_the_wrapped_sampler_keeps_its_length_and_attributes() -> None:
    loader = weighted()
    weights = loader.sampler.weights
    tracked(loader)
    sampler = loader.batch_sampler.sampler
    assert len(sampler) == SAMPLES
    assert sampler.weights is weights
    assert sampler.replacement is True
    with pytest.raises(AttributeError):
        _ = sampler.no_such_thing


def test_batches_that_are_drawn_one_by_one_are_announced_as_not_exact() -> None:
    """Nobody can know in advance when a user's own sampler draws."""
    positions = tracked(DataLoader(Drawing(), batch_sampler=ReshapedBatches()))
    assert "exact only if it draws its order when it begins" in " ".join(positions.notes)


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (shuffled, None),
        (LOADERS["unbatched"], None),
        (lambda: StatefulDataLoader(Drawing(), batch_size=BATCH), None),
        (LOADERS["stream"], "read again up to where it was"),
        (lambda: [[1.0], [2.0]], "a list cannot be positioned"),
    ],
)
def test_what_cannot_be_positioned_exactly_is_said(make: Any, note: str | None) -> None:
    loader = make()
    positions = tracked(loader)
    assert len(list(loader)) > 1
    assert len(positions.notes) == (note is not None)
    assert (note or "") in "".join(positions.notes)


@pytest.mark.parametrize("draws_in_workers", [True, False])
def test_data_that_draws_in_workers_is_noticed(draws_in_workers: bool) -> None:
    """Skipping by index draws nothing in a worker, and its generators cannot be set from outside."""
    loader = DataLoader(Drawing(draws_in_workers=draws_in_workers), batch_size=BATCH, shuffle=True, num_workers=2)
    positions = tracked(loader)
    assert positions.notes == ()
    list(loader)
    assert ["draws random numbers in worker" in note for note in positions.notes] == [True] * draws_in_workers
