"""Where the garbage collector is held back it does nothing, and elsewhere it is as the user has it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from spot_core.collector import without_collection


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that were collected."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def make_objects() -> list[list[int]]:
    return [[number] for number in range(200_000)]


def test_nothing_is_collected_inside(collections: list[int]) -> None:
    assert gc.isenabled()
    with without_collection():
        kept = make_objects()
        assert collections == []
    assert gc.isenabled()
    kept += make_objects()
    assert collections


def test_where_the_user_has_turned_it_off_it_stays_off() -> None:
    gc.disable()
    try:
        with without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_comes_back_after_an_error() -> None:
    with contextlib.suppress(OSError), without_collection():
        raise OSError
    assert gc.isenabled()
