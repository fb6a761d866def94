"""The writer on a disk that misbehaves: nothing torn is committed, nothing staged is left, and the next one works."""

from __future__ import annotations

import contextlib
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spot_core.errors import FencedError, TierError, is_full
from spot_core.snapshot.capture import Snapshotter
from spot_core.snapshot.files import BytesFile, NativeFile, SafetensorsFile, TorchFile
from spot_core.snapshot.writer import CheckpointWriter, Prepare, Written
from spot_core.store import catalog, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from tests.disk import fill, largest_file, mounted

WEIGHTS = torch.arange(50_000.0)  # 200 kB


class Writer:
    """Writes checkpoints of some 400 kB, one at a time."""

    def __init__(self, tier: PosixTier, prepare: Prepare | None = None) -> None:
        self._snapshotter = Snapshotter(torch.device("cpu"))
        self.writer = CheckpointWriter(tier, self._snapshotter, number=1, prepare=prepare)
        self.between: Callable[[], None] = lambda: None  # runs after the first file was written

    def write(self, step: int) -> Written:
        files: list[NativeFile] = [
            SafetensorsFile(path="native/model.safetensors", tensors={"a": WEIGHTS + step}),
            BytesFile(path="native/note.json", content=self._note),
            TorchFile(path="native/deep/optimizer.pt", tree={"state": {0: WEIGHTS}}),
        ]
        name = CheckpointName(1, step)
        manifest = Manifest(
            run="run", name=name, epoch=0, useful_s=0, created=0, framework="test", native="native", files=()
        )
        done: list[Written] = []
        self.writer.submit(self._snapshotter.take(files), manifest, done.append)
        self.writer.wait()
        self._snapshotter.gate()
        return done[0]

    def _note(self) -> bytes:
        self.between()
        return b"{}"

    def close(self) -> None:
        self.writer.close()
        self._snapshotter.close()


@contextlib.contextmanager
def no_space(folder: Path) -> Iterator[None]:
    fill(folder / "another process's file", leave_bytes=300_000)
    yield
    (folder / "another process's file").unlink()


@pytest.mark.parametrize("kind", ["disk", "quota"])
def test_full_in_mid_write_leaves_nothing_and_the_next_one_works(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "disk":
            tmp_path = stack.enter_context(mounted(tmp_path / "small", "size=2m"))
        tier = PosixTier(tmp_path / "run")
        writer = Writer(tier)
        assert writer.write(1).error is None
        with no_space(tmp_path) if kind == "disk" else largest_file(100_000):
            refused = [writer.write(step) for step in (2, 3)]
        errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert all(isinstance(written.error, OSError) for written in refused)
        assert writer.writer.failures == 2
        assert len(errors) == 1, "two failures of one cause"
        assert "checkpoint of step 2 not written (OSError" in errors[0].message
        assert "training goes on, nothing that was committed was touched" in errors[0].message
        assert "Free space there" in errors[0].message
        assert tier.list("staging") == [] and tier.list("checkpoints") == [str(CheckpointName(1, 1))]
        with caplog.at_level(logging.INFO):
            assert writer.write(4).error is None
        assert "checkpoints are written again, after 2 that were not" in caplog.text
        for name in catalog.names(tier):
            resume.verify(tier, catalog.read_manifest(tier, name))
        assert catalog.names(tier) == [CheckpointName(1, 4), CheckpointName(1, 1)]
        writer.close()


def test_a_checkpoint_that_would_not_fit_is_not_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = []

    def prepare(manifest: Manifest, expected_bytes: int, failure: OSError | None) -> PosixTier:
        expected.append(expected_bytes)
        if manifest.step == 2:
            raise TierError(28, "no room in /there: 0.4 MB needed, 0.1 MB free")
        return tier

    tier = PosixTier(tmp_path)
    writer = Writer(tier, prepare)
    written = [writer.write(step) for step in (1, 2, 3)]
    assert [each.error is None for each in written] == [True, False, True]
    assert written[1].failure == "checkpoint of step 2 not written (no room in /there: 0.4 MB needed, 0.1 MB free)"
    assert caplog.text.count("not written") == 1
    assert expected[0] == 2 * WEIGHTS.nbytes, "what the tensors need"
    assert expected[1:] == [written[0].manifest.total_bytes] * 2, "what the last one took"
    writer.close()


def test_a_folder_removed_under_the_write_costs_a_second_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Above all the files before it was removed must not be missing from what is committed."""
    tier = PosixTier(tmp_path / "run")
    writer = Writer(tier)
    attempts = []

    def remove() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            shutil.rmtree(tier.root)

    writer.between = remove
    written = writer.write(1)
    assert written.error is None and len(attempts) == 2
    resume.verify(tier, catalog.read_manifest(tier, CheckpointName(1, 1)))
    assert not caplog.records
    writer.between = lambda: shutil.rmtree(tier.root)
    assert isinstance(writer.write(2).error, FileNotFoundError)
    assert catalog.names(tier) == []
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    writer.close()


def test_a_file_removed_after_it_was_written_is_not_committed_over(tmp_path: Path) -> None:
    tier = PosixTier(tmp_path)
    writer = Writer(tier)
    staged = tier.path(f"staging/{CheckpointName(1, 1)}/native/model.safetensors")
    removed: list[bool] = []

    def remove() -> None:
        if not removed:
            staged.unlink()
            removed.append(True)

    assert writer.write(0).error is None  # the first of a life is loaded back, which would notice
    writer.between = remove
    assert writer.write(1).error is None
    resume.verify(tier, catalog.read_manifest(tier, CheckpointName(1, 1)))
    writer.close()


@pytest.mark.parametrize("kind", ["disk", "quota"])
def test_full_in_mid_write_goes_where_there_is_room(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = PosixTier(tmp_path / "elsewhere")
    failures: list[OSError] = []

    def prepare(manifest: Manifest, expected_bytes: int, failure: OSError | None) -> PosixTier:
        if failure is None:
            return tier
        failures.append(failure)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # this disk has no quota
        return elsewhere

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with contextlib.ExitStack() as stack:
        full = tmp_path
        if kind == "disk":
            full = stack.enter_context(mounted(tmp_path / "small", "size=2m"))
        tier = PosixTier(full / "run")
        writer = Writer(tier, prepare)
        assert writer.write(1).error is None
        with no_space(full) if kind == "disk" else largest_file(100_000):
            assert writer.write(2).error is None
        writer.close()
        assert catalog.names(tier) == [CheckpointName(1, 1)]
        assert tier.list("staging") == [] and tier.list("checkpoints") == [str(CheckpointName(1, 1))]
    assert [is_full(failure) for failure in failures] == [True]
    resume.verify(elsewhere, catalog.read_manifest(elsewhere, CheckpointName(1, 2)))
    assert not caplog.records


def test_a_refusal_that_nowhere_is_room_for_ends_the_checkpoint_and_not_the_writer(tmp_path: Path) -> None:
    """The second attempt ends with the error of the first, which by then is both cause and context of another."""
    found: list[bool] = []

    def prepare(manifest: Manifest, expected_bytes: int, failure: OSError | None) -> PosixTier:
        try:
            if failure is not None:
                raise failure
        except OSError as error:
            found.append(is_full(error))
            raise
        return tier

    def obstruct() -> None:
        [staged] = (tier.root / "staging").iterdir()
        (staged / "native" / "deep").write_text("in the way")

    tier = PosixTier(tmp_path / "run")
    writer = Writer(tier, prepare)
    writer.between = obstruct
    assert isinstance(writer.write(1).error, FileExistsError) and found == [False]
    writer.between = lambda: None
    assert writer.write(2).error is None
    writer.close()


def test_a_newer_life_on_the_local_folder_fences_what_is_written_elsewhere(tmp_path: Path) -> None:
    tier, elsewhere = PosixTier(tmp_path / "run"), PosixTier(tmp_path / "elsewhere")
    writer = Writer(tier, lambda *_: elsewhere)
    assert writer.write(1).error is None
    tier.create(layout.incarnation(2), b"{}")
    assert isinstance(writer.write(2).error, FencedError)
    assert catalog.names(elsewhere) == [CheckpointName(1, 1)]
    writer.close()
