"""The training that `outage.py` watches: a loop of its own on the core, which writes the time of each step to a file.

    python benchmarks/outage_training.py REMOTE LOCAL STAMPS fixed|cpu STEP_S STATE_BYTES INTERVAL_S

It trains until the file STAMPS.stop appears. `cpu` computes all the time, `fixed` computes a little and then sleeps
until STEP_S seconds have passed, as a thread does that waits for a GPU.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import time

import torch

from spot_core.config import SpotConfig
from spot_core.handover import Capture
from spot_core.opening import open_session
from spot_core.snapshot.files import SafetensorsFile
from spot_core.store.identity import RunIdentity

STAMP = struct.Struct("<dd")  # when a step ended, seconds spent in the session's calls so far
_WIDTH = 384


def main(remote: str, local: str, stamps: str, kind: str, step_s: float, state_bytes: int, interval_s: float) -> None:
    torch.set_num_threads(1)
    logging.getLogger("spot_core").setLevel(logging.ERROR)
    options = {"remote": remote, "local": local, "interval_s": interval_s, "drain_timeout_s": 5.0}
    config = SpotConfig.resolve(options, fallback_local=".spot")
    session = open_session(config, RunIdentity("benchmark", {"batch size": 1}), device=torch.device("cpu"))
    state = torch.randn(state_bytes // 4)
    left, right = torch.randn(_WIDTH, _WIDTH), torch.randn(_WIDTH, _WIDTH)
    rounds = _rounds(left, right, step_s) if kind == "cpu" else 1
    step, held_s = 0, 0.0

    def capture() -> Capture:
        file = SafetensorsFile(path=f"step-{step}/model.safetensors", tensors={"state": state})
        return Capture(step=step, epoch=float(step), native=f"step-{step}", max_steps=None, files=[file])

    session.begin()
    try:
        with open(stamps, "ab", buffering=0) as file:
            while not os.path.exists(f"{stamps}.stop"):
                began = time.monotonic()
                for _ in range(rounds):
                    left @ right
                if kind == "fixed":
                    time.sleep(max(0.0, began + step_s - time.monotonic()))
                entered = time.monotonic()
                session.before_optimizer_step()
                state[step % len(state)] += 1.0
                step += 1
                session.step_completed(step)
                session.at_boundary(capture)
                left_at = time.monotonic()
                held_s += left_at - entered
                file.write(STAMP.pack(left_at, held_s))
    finally:
        session.close()


def _rounds(left: torch.Tensor, right: torch.Tensor, step_s: float) -> int:
    """How many products take `step_s`."""
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 0.5:
        left @ right
        count += 1
    return max(1, round(count * step_s / 0.5))


if __name__ == "__main__":
    main(*sys.argv[1:5], float(sys.argv[5]), int(sys.argv[6]), float(sys.argv[7]))  # type: ignore[misc]
