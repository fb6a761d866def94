"""A run's folder written by format version 1 stays readable by every later release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spot_core.agent import lives
from spot_core.store import catalog, incarnation, layout, resume
from spot_core.store.identity import RunIdentity, check_identity, read_run
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import content_of
from spot_core.testing.invariants import assert_run_invariants

V1 = Path(__file__).parents[1] / "data" / "v1"
NEWEST = CheckpointName(2, 300)
PINNED = CheckpointName(1, 100)


@pytest.fixture
def stored(tmp_path: Path) -> PosixTier:
    """A copy: nothing may write to the original."""
    return PosixTier(shutil.copytree(V1, tmp_path / "stored"))


def test_a_new_instance_restores_from_it(stored: PosixTier, tmp_path: Path) -> None:
    local = PosixTier(tmp_path / "local")
    restored = resume.newest_valid(local, stored, lambda *_: None)
    assert restored is not None and (restored.manifest.name, restored.source) == (NEWEST, "remote")
    for path, content in content_of(NEWEST).items():
        assert local.read(f"{layout.checkpoint(NEWEST)}/{path}") == content
    assert_run_invariants(local, stored)


def test_the_same_instance_restores_from_it(stored: PosixTier, tmp_path: Path) -> None:
    restored = resume.newest_valid(stored, PosixTier(tmp_path / "remote"), lambda *_: None)
    assert restored is not None and (restored.manifest.name, restored.source) == (NEWEST, "local")


def test_its_manifest_means_what_it_meant(stored: PosixTier) -> None:
    manifest = catalog.read_manifest(stored, NEWEST)
    assert manifest.pins == PINNED
    assert (manifest.run, manifest.framework, manifest.native) == ("run", "hf", "checkpoint-300")
    assert (manifest.epoch, manifest.useful_s, manifest.created) == (30.0, 300.0, 1_700_000_300.0)
    assert manifest.world == {"world_size": 2, "per_device_batch": 4}
    assert manifest.notes == ("the data is a stream",)
    assert manifest.base_fingerprint == "0123456789abcdef"
    assert manifest.versions["torch"] == "2.13.0" and manifest.loggers == {"wandb": "abc123"}


def test_the_rest_of_it_is_read(stored: PosixTier) -> None:
    facts = {"trainable shapes": "b1946ac9", "world_size": 2, "per_device_batch": 4}
    check_identity(read_run(stored), RunIdentity("hf", facts), stored.url)
    assert incarnation.newest(stored) == 2
    assert catalog.completions(stored) == {NEWEST: 300}
    found = lives.read_lives(stored)
    assert [(life.incarnation, life.outcome, life.step) for life in found] == [
        (1, lives.RUNNING, 200),
        (2, lives.COMPLETED, 300),
    ]


def test_every_file_of_it_says_its_version_or_belongs_to_one_that_does() -> None:
    """A format without a version cannot be told from the next one."""
    for path in [V1 / "run.json", *(V1 / "manifests").glob("*[0-9].json")]:
        assert json.loads(path.read_bytes())["format_version"] == 1
