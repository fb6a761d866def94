"""A process of `relaunch.py`: a training that says when it was called and when its first optimizer step was done.

    python benchmarks/relaunch_training.py '{"trainer": "hf", "size": "lora", "folder": …, "remote": …, "local": …}'

One JSON line on standard output, then it waits to be killed. With `until_durable` it trains until a checkpoint of its
first step is on the remote. Without `remote` there is no callback; `resume` is then what the Trainer itself loads.
"""

from __future__ import annotations

import importlib
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from stall_states import SHAPES, make_model

_STEPS = 1000


class Marks:
    """When the Trainer was called, and when its first step ended; monotonic seconds."""

    def __init__(self, status: Path | None) -> None:
        self._status, self._called = status, 0.0

    def called(self) -> None:
        self._called = time.monotonic()

    def step_ended(self) -> bool:
        """Tells, and does not return, unless a checkpoint is still to become durable."""
        stepped = time.monotonic()
        if self._status is None or _is_durable(self._status):
            print(json.dumps({"called": self._called, "stepped": stepped}), flush=True)
            signal.pause()
        return False


def _is_durable(status: Path) -> bool:
    return status.exists() and json.loads(status.read_text())["newest_durable"] is not None


def main(wanted: dict[str, Any]) -> None:
    logging.getLogger("spot_core").setLevel(logging.INFO)
    under = importlib.import_module(f"train_{wanted['trainer']}")
    under.quiet()
    shape, folder = SHAPES[wanted["size"]], Path(wanted["folder"])
    status = Path(wanted["local"]) / "run" / "journal" / "000001.agent.json" if wanted.get("until_durable") else None
    marks = Marks(status)
    callbacks = [under.AfterStep(marks.step_ended)]
    if wanted.get("remote"):
        package = importlib.import_module("hf_spot" if wanted["trainer"] == "hf" else "lightning_spot")
        pace = {"interval_steps": 1} if wanted.get("until_durable") else {"interval_s": 3600.0}
        callbacks.append(package.SpotCallback(wanted["remote"], local=wanted["local"], **pace))
    model = make_model(shape, is_drawn=False)
    train = under.training(model, shape, folder, steps=_STEPS, callbacks=callbacks)
    marks.called()
    train(wanted.get("resume"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
