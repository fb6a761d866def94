"""What a job has stored, and the proof that it is complete."""

from __future__ import annotations

from pathlib import Path

import torch

from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from tests.lightning.job import JobSpec
from tests.lives.lives import (
    final,
    live,
    local_of,
    remote_of,
    seen,
)

# Never better than at first: stops at the validation that follows `patience` others.
NEVER_BETTER = {"monitor": "val_loss", "patience": 3, "min_delta": 100.0}


def ends_of(spec: JobSpec) -> list[set[CheckpointName]]:
    """The checkpoints that each tier records as the end of training."""
    tiers = (local_of(spec), remote_of(spec))
    return [set(filter(None, map(layout.completed, tier.list(layout.MANIFESTS)))) for tier in tiers]


def forget_seen(spec: JobSpec) -> None:
    Path(spec.folder, "seen.jsonl").unlink()


def assert_trains_nothing_more(spec: JobSpec) -> None:
    """One more life of a run that is complete ends well, with the final state, without a batch."""
    trained = final(spec)
    forget_seen(spec)
    again = live(spec)
    assert again.exit_code == 0, again.log[-3000:]
    assert seen(spec) == {}
    assert f"training was complete at step {trained['step']} already" in again.log
    assert final(spec)["step"] == trained["step"]
    assert all(torch.equal(tensor, final(spec)["tensors"][name]) for name, tensor in trained["tensors"].items())


def forget_end(spec: JobSpec) -> None:
    """As if killed when the last checkpoint was committed and its record was not."""
    for tier, ends in zip((local_of(spec), remote_of(spec)), ends_of(spec), strict=True):
        assert len(ends) == 1
        (tier.root / layout.completion(*ends)).unlink()
