"""A training that does next to nothing at an even pace, in the places SPOT_REMOTE and SPOT_LOCAL: steady.py STEPS.

More steps than the last time train a finished run further.
"""

from __future__ import annotations

import sys
import time

import torch

from spot_core.config import SpotConfig
from spot_core.handover import Capture
from spot_core.opening import open_session
from spot_core.snapshot.files import SafetensorsFile
from spot_core.store.identity import RunIdentity

STEP_S = 0.005


def main(steps: int) -> None:
    torch.set_num_threads(1)
    config = SpotConfig.resolve({}, fallback_local=".spot")
    session = open_session(config, RunIdentity("steady", {"batch size": 1}), device=torch.device("cpu"))
    step = session.resume.manifest.step if session.resume is not None else 0
    state = torch.zeros(100_000)

    def capture() -> Capture:
        file = SafetensorsFile(path=f"step-{step}/model.safetensors", tensors={"state": state})
        return Capture(step=step, epoch=float(step), native=f"step-{step}", max_steps=steps, files=[file])

    session.begin()
    try:
        while step < steps:
            time.sleep(STEP_S)
            session.before_optimizer_step()
            state += 1.0
            step += 1
            session.step_completed(step)
            session.at_boundary(capture)
        session.finish(capture)
        session.wait_drained()
    finally:
        session.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
