"""Experiment trackers under Lightning: their runs are continued, so that one training's curves stay in one piece.

Lightning starts trackers before the model is whole and the run can be opened, so their ids are asked for separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_spot.namespaces import is_a
from spot_core.agent.client import stored_loggers
from spot_core.config import SpotConfig
from spot_core.report import loggers


def resume(trainer: Any, config: SpotConfig) -> None:
    """Before `fit` starts them: have W&B and MLflow continue the run of the newest checkpoint, unless one is named."""
    waiting = [logger for logger in trainer.loggers if _is_wandb(logger) or _is_mlflow(logger)]
    if not waiting:
        return
    ids = stored_loggers(config)
    loggers.resume(ids)
    for logger in waiting:
        if _is_mlflow(logger) and logger._run_id is None:
            logger._run_id = ids.get("mlflow")


def running(trainer: Any) -> Mapping[str, str]:
    """Ids that are not known to the trackers' own modules: Lightning's MLflow client has no active run."""
    first = next((logger for logger in trainer.loggers if _is_mlflow(logger)), None)
    return {} if first is None else {"mlflow": str(first.run_id)}


def _is_wandb(logger: object) -> bool:
    return is_a(logger, "loggers.WandbLogger")


def _is_mlflow(logger: object) -> bool:
    return is_a(logger, "loggers.MLFlowLogger")
