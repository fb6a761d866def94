"""Makes `tests/data/v1`. Kept to show how it was made; a released format is never made again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from spot_core.agent.lives import COMPLETED, Life
from spot_core.store import catalog, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.testing.checkpoints import commit_checkpoint

STARTED = 1_700_000_000.0
NAMES = [CheckpointName(1, 100), CheckpointName(1, 200), CheckpointName(2, 300)]


def main(folder: str) -> None:
    tier = PosixTier(folder)
    facts = {"trainable shapes": "b1946ac9", "world_size": 2, "per_device_batch": 4}
    _create(
        tier,
        layout.RUN,
        {"format_version": 1, "run_id": "0" * 32, "framework": "hf", "facts": facts, "created": STARTED},
    )
    for number in (1, 2):
        claim = {"host": "node", "pid": 7, "boot_id": f"boot-{number}", "started": STARTED + number, "token": "0" * 32}
        _create(tier, layout.incarnation(number), {"incarnation": number, **claim})
    life = Life(incarnation=1, host="node", boot_id="boot-1", started=STARTED, heartbeat=STARTED + 60, step=200)
    tier.replace(layout.life(1), life.to_json())
    tier.replace(layout.life(2), replace(life, incarnation=2, outcome=COMPLETED, step=300).to_json())
    for name in NAMES:
        pins = NAMES[0] if name is NAMES[-1] else None
        commit_checkpoint(tier, name, pins=pins, created=STARTED + name.step, more=MORE)
    catalog.mark_complete(tier, NAMES[-1], 300)
    tier.delete([layout.STAGING])  # git keeps no empty folders


MORE: dict[str, Any] = {
    "framework": "hf",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "device": "cpu"},
    "world": {"world_size": 2, "per_device_batch": 4},
    "notes": ("the data is a stream",),
    "loggers": {"wandb": "abc123"},
    "base_fingerprint": "0123456789abcdef",
}


def _create(tier: PosixTier, path: str, body: dict[str, Any]) -> None:
    tier.create(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1])
