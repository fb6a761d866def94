"""Small committed checkpoints, made without a trainer: real files, real manifests, through the real commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier, write_durably
from spot_core.store.tier import digest_file

RUN = "run"
FRAMEWORK = "testing"


def content_of(name: CheckpointName) -> dict[str, bytes]:
    """Files of a small checkpoint, a function of its name: some bytes, a nested folder, an empty file."""
    seed = hashlib.sha256(str(name).encode()).digest()
    native = f"checkpoint-{name.step}"
    return {f"{native}/model.bin": seed * 40, f"{native}/state/rng.bin": seed[::-1], f"{native}/empty": b""}


def commit_checkpoint(
    tier: PosixTier,
    name: CheckpointName,
    *,
    files: Mapping[str, bytes] | None = None,
    pins: CheckpointName | None = None,
    created: float = 1.0,
    more: Mapping[str, Any] | None = None,
) -> Manifest:
    """Stage and commit a checkpoint as the writer does.

    files: path -> content, `content_of(name)` by default. more: further fields of the manifest.
    """
    staged = tier.stage(name)
    records = []
    for path, content in (content_of(name) if files is None else files).items():
        target = staged / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, content)
        records.append(replace(digest_file(target), path=path))
    manifest = Manifest(
        run=RUN,
        name=name,
        epoch=name.step / 10,
        useful_s=float(name.step),
        created=created,
        framework=FRAMEWORK,
        native=f"checkpoint-{name.step}",
        files=tuple(records),
        pins=pins,
    )
    manifest = replace(manifest, **(more or {}))
    tier.commit(staged, manifest)
    return manifest


def path_in_checkpoint(name: CheckpointName, path: str) -> str:
    """Where a file of a checkpoint lies in a tier."""
    return f"{layout.checkpoint(name)}/{path}"
