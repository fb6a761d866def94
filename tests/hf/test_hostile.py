"""Nothing in a checkpoint is run, whoever wrote it: with a manifest that vouches for it, and without."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.job import JobSpec
from tests.lives.hostile import Command, begin, forge, marker, newest_of, tiers_of
from tests.lives.lives import live
from tests.trees import tree

__all__ = ["marker"]
KEY = "key of this run 0"


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    spec = JobSpec(folder=str(tmp_path_factory.mktemp("begun") / "job"))
    begin(spec)
    return spec


@pytest.fixture
def spec(begun: JobSpec, tmp_path: Path) -> JobSpec:
    """A copy of a run that was interrupted."""
    folder = shutil.copytree(begun.folder, tmp_path / "job")
    return dataclasses.replace(begun, folder=str(folder))


OURS = "spot_state.pt was not written by torch.save"
# Each is read by a resume, of the Trainer or of ours, and what the refusal says.
READ: dict[str, tuple[Callable[[Path], dict[str, bytes]], str]] = {
    "optimizer": (
        lambda marker: {"native/optimizer.pt": saved({"state": Command(marker), "param_groups": []})},
        "weights_only",
    ),
    "schedule": (lambda marker: {"native/scheduler.pt": pickle.dumps(Command(marker))}, "weights_only"),
    "more weights": (lambda marker: {"native/pytorch_model.bin": pickle.dumps(Command(marker))}, "weights_only"),
    "own state": (
        lambda marker: {"spot_state.pt": saved({"format": 1, "stream_passes": 0, "data": Command(marker)})},
        OURS,
    ),
    "own state, torn": (lambda marker: {"spot_state.pt": saved({"format": 1})[:200]}, OURS),
}


@pytest.mark.parametrize("which", READ)
def test_what_a_resume_reads_is_refused(spec: JobSpec, marker: Path, which: str) -> None:
    content, reason = READ[which]
    forge(spec, content(marker))
    result = live(spec)
    assert not marker.exists()
    assert result.exit_code == 1
    assert reason in result.log, result.log[-3000:]


def test_what_a_resume_does_not_need_is_not_read(spec: JobSpec, marker: Path) -> None:
    newest = newest_of(spec)
    names = ("rng_state.pth", "training_args.bin", "adapter_model.bin")
    forge(spec, {f"native/{name}": pickle.dumps(Command(marker)) for name in names})
    result = live(spec)
    assert not marker.exists()
    assert result.exit_code == 0, result.log[-3000:]
    assert f"checkpoint {newest}, as incarnation 2" in result.log


def test_a_checkpoint_of_another_base_is_refused_at_start(spec: JobSpec) -> None:
    """Although run.json names the base of this model."""
    forge(spec, {}, base_fingerprint="0123456789abcdef")
    before = tree(Path(spec.folder, "remote/job/manifests"))
    result = live(spec)
    assert result.exit_code == 1
    assert "was trained on another frozen base: fingerprint 0123456789abcdef there" in result.log, result.log[-3000:]
    assert tree(Path(spec.folder, "remote/job/manifests")) == before


def test_a_checkpoint_that_names_no_base_is_resumed_from(spec: JobSpec) -> None:
    newest = newest_of(spec)
    forge(spec, {}, base_fingerprint=None)
    result = live(spec)
    assert result.exit_code == 0, result.log[-3000:]
    assert f"checkpoint {newest}, as incarnation 2" in result.log


def test_without_a_manifest_that_vouches_for_it_the_next_older_checkpoint_is_used(spec: JobSpec, marker: Path) -> None:
    bad = newest_of(spec)
    forge(spec, READ["optimizer"][0](marker), with_manifest=False)
    result = live(spec)
    assert not marker.exists()
    assert result.exit_code == 0, result.log[-3000:]
    assert f"checkpoint {bad} is damaged, trying the next older one" in result.log


def test_with_a_key_no_manifest_of_a_stranger_vouches_for_anything(tmp_path: Path, marker: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    options = {"signing_key_file": str(key_file)}
    spec = JobSpec(folder=str(tmp_path / "job"), options=options)
    begin(spec)
    bad = newest_of(spec)
    forge(spec, READ["optimizer"][0](marker))
    result = live(spec)
    assert not marker.exists()
    assert result.exit_code == 0, result.log[-3000:]
    assert f"checkpoint {bad} is damaged" in result.log and "is not signed with this run's key" in result.log
    for tier in tiers_of(spec):
        assert not [path for path in tier.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
