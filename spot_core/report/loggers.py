"""Experiment trackers: the ids of their runs travel with the checkpoints, so that a resumed life continues them.

Without it each preemption starts a new run, and one training's curves lie in pieces. Imports no tracker.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

logger = logging.getLogger(__name__)


def running() -> dict[str, str]:
    """Ids of the runs that are active in this process, by tracker: `wandb`, `mlflow`."""
    found = {}
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        found["wandb"] = str(run.id)
    active = getattr(sys.modules.get("mlflow"), "active_run", lambda: None)()
    if active is not None:
        found["mlflow"] = str(active.info.run_id)
    return found


def preempting() -> None:
    """Tell trackers that this process is preempted, not finished: W&B may requeue, MLflow shows KILLED."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    mlflow = sys.modules.get("mlflow")
    try:
        if run is not None:
            run.mark_preempting()
        if mlflow is not None and mlflow.active_run() is not None:
            mlflow.end_run("KILLED")
    except Exception as error:  # somebody else's code, over the network: no tracker may cost the checkpoint
        logger.warning("a tracker could not be told of the preemption: %.300r", error)


def resume(ids: Mapping[str, str]) -> None:
    """Make trackers that start from here on continue these runs, unless the environment names others."""
    if "wandb" in ids and "WANDB_RUN_ID" not in os.environ:
        os.environ["WANDB_RUN_ID"] = ids["wandb"]
        os.environ.setdefault("WANDB_RESUME", "allow")
    if "mlflow" in ids:
        os.environ.setdefault("MLFLOW_RUN_ID", ids["mlflow"])
