"""Several ranks under DDP: the same training, bit for bit, however it was interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.hf.job import JobSpec
from tests.lives.lives import assert_same_training, live, live_to_the_end, uninterrupted


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(folder=str(tmp_path / "job"), ranks=2)


def test_killed_ranks_end_bit_equal(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    live_to_the_end(spec, ["step:3", "step:8"])
    assert_same_training(spec, reference)
