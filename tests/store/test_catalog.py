"""What a tier holds, where it holds more than one answer of a store can name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spot_core.store import catalog, layout, resume
from spot_core.store.catalog import Recent
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint
from spot_core.testing.faults import FaultPlan, FaultyTier

NAMES = [CheckpointName(life, step) for life in (1, 2) for step in (10, 20, 30)]
NEWEST = NAMES[-1]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "PAGE_NAMES", 4)


@pytest.fixture
def full(remote: PosixTier) -> PosixTier:
    for name in NAMES:
        commit_checkpoint(remote, name)
    return remote


def no_guess() -> CheckpointName | None:
    raise AssertionError("one answer is enough: nothing need be guessed")


def damage(tier: PosixTier, *names: CheckpointName) -> None:
    for name in names:
        tier.replace(layout.manifest(name), b"{")


def test_where_one_answer_is_enough_nothing_is_guessed(remote: PosixTier) -> None:
    assert catalog.recent(remote, no_guess) == Recent([])
    for name in NAMES[:3]:
        commit_checkpoint(remote, name)
    assert catalog.recent(remote, no_guess) == Recent(NAMES[2::-1])


@pytest.mark.parametrize("guess", NAMES)
def test_all_from_the_guess_on_is_found(full: PosixTier, guess: CheckpointName) -> None:
    found = catalog.recent(full, lambda: guess)
    assert found == Recent([name for name in reversed(NAMES) if name >= guess], guess)


@pytest.mark.parametrize("guess", [None, CheckpointName(2, 31), CheckpointName(7, 1)], ids=str)
def test_a_guess_beyond_all_finds_all(full: PosixTier, guess: CheckpointName | None) -> None:
    assert catalog.recent(full, lambda: guess) == Recent(NAMES[::-1])


def test_a_guess_that_is_not_stored_is_as_good(full: PosixTier) -> None:
    guess = CheckpointName(2, 5)
    assert catalog.recent(full, lambda: guess) == Recent(NAMES[:2:-1], guess)


def test_the_end_of_training_is_no_checkpoint_of_its_own(full: PosixTier) -> None:
    catalog.mark_complete(full, NEWEST, 30)
    assert catalog.recent(full, lambda: NEWEST) == Recent([NEWEST], NEWEST)
    assert not catalog.has_newer(full, NEWEST)
    assert catalog.completion(full, NEWEST) == catalog.Completion(30)
    assert catalog.completion(full, NAMES[0]) is None


def test_newer_means_of_a_later_step_or_life(full: PosixTier) -> None:
    assert [catalog.has_newer(full, name) for name in NAMES] == [True] * 5 + [False]
    assert catalog.has_newer(full, None) and not catalog.has_newer(PosixTier(f"{full.root}-empty"), None)


def test_one_checkpoint_is_looked_up_by_its_name(full: PosixTier) -> None:
    catalog.mark_complete(full, NEWEST, None)
    assert all(catalog.has(full, name) for name in NAMES)
    assert not any(catalog.has(full, CheckpointName(life, 15)) for life in (1, 2, 3))


# -- choosing among them ---------------------------------------------------------------------------------------


def choose(local: PosixTier, remote: PosixTier, guess: CheckpointName) -> CheckpointName:
    recent = catalog.recent(remote, lambda: guess)
    restored = resume.newest_valid(local, remote, lambda *_: None, recent=recent)
    assert restored is not None
    return restored.manifest.name


def test_the_newest_needs_no_list_of_all(local: PosixTier, full: PosixTier) -> None:
    plan = FaultPlan()
    tier = FaultyTier(full, plan)
    recent = catalog.recent(tier, lambda: NEWEST)
    restored = resume.newest_valid(local, tier, lambda *_: None, recent=recent)
    assert restored is not None and restored.manifest.name == NEWEST
    assert [line for line in plan.operations if ".list" in line] == [f"remote.list {layout.MANIFESTS}"] * 2


def test_where_the_newest_are_damaged_the_older_ones_are_listed_after_all(local: PosixTier, full: PosixTier) -> None:
    damage(full, *NAMES[3:])
    assert choose(local, full, NAMES[4]) == NAMES[2]


@pytest.mark.parametrize("keep", [commit_checkpoint, lambda *_: None], ids=["also local", "only remote"])
def test_an_older_local_one_does_not_come_before_what_was_not_listed(
    local: PosixTier, full: PosixTier, keep: Callable[[PosixTier, CheckpointName], object]
) -> None:
    keep(local, NAMES[0])
    damage(full, *NAMES[4:])
    assert choose(local, full, NAMES[4]) == NAMES[3]


def test_a_newer_local_one_wins(local: PosixTier, full: PosixTier) -> None:
    newer = CheckpointName(3, 5)
    commit_checkpoint(local, newer)
    assert choose(local, full, NAMES[4]) == newer
