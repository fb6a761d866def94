"""Nothing in a checkpoint is run, whoever wrote it, also where its manifest vouches for it."""

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

from tests.lightning.job import JobSpec
from tests.lives.hostile import Command, begin, forge, marker, newest_of, stored_file
from tests.lives.lives import live
from tests.trees import tree

__all__ = ["marker"]


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


def checkpoint_with(spec: JobSpec, **parts: Any) -> dict[str, bytes]:
    """The newest checkpoint's native file, with other parts."""
    content = torch.load(stored_file(spec, "native"), weights_only=False)
    return {"native": saved({**content, **parts})}


def script(spec: JobSpec, marker: Path) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return {"native": buffer.getvalue()}


OURS = "spot_state.pt was not written by torch.save"
# What is put into the checkpoint, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[JobSpec, Path], dict[str, bytes]], str]] = {
    "states of callbacks": (lambda spec, marker: checkpoint_with(spec, callbacks={"x": Command(marker)}), "callbacks"),
    "a plain pickle": (lambda spec, marker: {"native": pickle.dumps(Command(marker))}, "was not written by torch.save"),
    "a program": (script, "is a TorchScript archive"),
    "own state": (lambda spec, marker: {"spot_state.pt": saved({"step": Command(marker)})}, OURS),
    "own state, torn": (lambda spec, marker: {"spot_state.pt": saved({"step": 1})[:200]}, OURS),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("which", REFUSED)
def test_what_a_resume_reads_is_refused(spec: JobSpec, marker: Path, which: str) -> None:
    content, reason = REFUSED[which]
    forge(spec, content(spec, marker))
    result = live(spec)
    assert not marker.exists()
    assert result.exit_code == 1
    assert reason in result.log, result.log[-3000:]


def test_what_a_resume_does_not_need_is_left_out(spec: JobSpec, marker: Path) -> None:
    """Hyper-parameters may hold objects of any type, and a resume goes on without them."""
    newest = newest_of(spec)
    forge(spec, {**checkpoint_with(spec, hyper_parameters={"x": Command(marker)}), "more.pt": b"not named"})
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
