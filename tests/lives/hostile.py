"""A stranger who can write to both tiers, and a pickle that runs a command when it is loaded."""

from __future__ import annotations

import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spot_core.store import catalog, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.tier import digest_file
from tests.lives.job import LifeSpec
from tests.lives.lives import live, local_of, remote_of, wait_for


class Command:
    """Creates `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self._marker}'",)


def assert_works(marker: Path) -> None:
    """The attack is a real one: loaded the usual way, it runs."""
    pickle.loads(pickle.dumps(Command(marker)))
    assert marker.exists()
    marker.unlink()


def begin(spec: LifeSpec) -> None:
    """A life that stores something and is killed, and its agent has drained everything.

    On a busy machine a life may die before it has stored anything: then another one begins afresh.
    """
    _, remote = tiers_of(spec)
    for number in range(1, 6):
        assert live(replace(spec, dies="step:12")).exit_code == -signal.SIGKILL
        record = remote.path(layout.life(number))
        wait_for(lambda: '"died"' in record.read_text(), timeout_s=120)  # noqa: B023
        if catalog.names(remote):
            return
    raise AssertionError("none of five lives stored a checkpoint in twelve steps")


def tiers_of(spec: LifeSpec) -> tuple[PosixTier, PosixTier]:
    """As a stranger sees them, who has no key."""
    return local_of(spec), remote_of(spec)


def newest_of(spec: LifeSpec) -> CheckpointName:
    """The newest checkpoint, which is on both tiers."""
    local, remote = tiers_of(spec)
    newest = catalog.names(remote)[0]
    assert newest in catalog.names(local)
    return newest


def stored_file(spec: LifeSpec, path: str) -> Path:
    """A file of the newest checkpoint on the local tier. path: `native/…` is below its native part."""
    local, _ = tiers_of(spec)
    manifest = catalog.read_manifest(local, newest_of(spec))
    return local.path(f"{layout.checkpoint(manifest.name)}/{_path(manifest.native, path)}")


def forge(spec: LifeSpec, files: dict[str, bytes], *, with_manifest: bool = True, **fields: Any) -> None:
    """Put these files into the newest checkpoint of both tiers. with_manifest: and make it vouch for them.

    fields: what else the manifest is to say.
    """
    name = newest_of(spec)
    for tier in tiers_of(spec):
        manifest = catalog.read_manifest(tier, name)
        records = {file.path: file for file in manifest.files}
        for path, content in files.items():
            path = _path(manifest.native, path)
            target = tier.path(f"{layout.checkpoint(name)}/{path}")
            target.unlink(missing_ok=True)  # it may share its bytes with another folder's by a hard link
            target.write_bytes(content)
            records[path] = replace(digest_file(target), path=path)
        if with_manifest:
            forged = replace(manifest, files=tuple(records.values()), **fields)
            tier.replace(layout.manifest(name), forged.to_json())
            resume.verify(tier, catalog.read_manifest(tier, name))


def _path(native: str, path: str) -> str:
    return f"{native}{path.removeprefix('native')}" if path.startswith("native") else path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    marker = tmp_path / "somebody was here"
    assert_works(marker)
    return marker
