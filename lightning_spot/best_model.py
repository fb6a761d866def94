"""ModelCheckpoint's files: where they are after a resume, on this machine or on a new one.

Lightning forgets the best models when the folder's path has changed, which the default logger does at each start. On
a new machine the files are gone. The best one is then written again, from the checkpoint of ours that was taken at the
same step and kept for this.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_spot import weights
from lightning_spot.namespaces import is_a
from lightning_spot.state import HYPER_PARAMETERS, read_native, read_own_state
from spot_core.handover import ResumePoint

logger = logging.getLogger(__name__)


def best_path(trainer: Any) -> str:
    """Path of the best model so far, by the first ModelCheckpoint that monitors something; empty if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if is_a(callback, "callbacks.ModelCheckpoint") and callback.monitor is not None:
            return str(callback.best_model_path)
    return ""


def was_saved(trainer: Any) -> bool:
    """Whether a ModelCheckpoint that monitors something has written at this very step, on all ranks alike."""
    return any(
        is_a(callback, "callbacks.ModelCheckpoint")
        and callback.monitor is not None
        and callback._last_global_step_saved == trainer.global_step
        for callback in trainer.checkpoint_callbacks
    )


def adopt(trainer: Any, checkpoint: dict[str, Any], own: Mapping[str, Any], point: ResumePoint) -> None:
    """Make the stored state of each ModelCheckpoint one of this machine, before Lightning loads it."""
    for callback in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state is not None and is_a(callback, "callbacks.ModelCheckpoint"):
            _adopt(callback, state, lambda path: _write_best(trainer, path, own, point), own["best_path"])


def _adopt(callback: Any, state: dict[str, Any], write: Any, protected: str) -> None:
    old_folder, state["dirpath"] = state["dirpath"], callback.dirpath
    exists = callback._fs.exists
    best = state["best_model_path"]
    if best and not exists(best):
        moved = os.path.join(callback.dirpath, os.path.relpath(best, old_folder))
        is_written = best == protected and write(moved)
        scores = state["best_k_models"]
        if best in scores and is_written:
            scores[moved] = scores[best]
        state["best_model_path"] = moved if is_written else ""
    kept = {path: score for path, score in state["best_k_models"].items() if exists(path)}
    if kept.keys() != state["best_k_models"].keys():
        logger.info("%d model files of ModelCheckpoint are gone", len(state["best_k_models"]) - len(kept))
    state["best_k_models"] = kept
    if state["kth_best_model_path"] not in kept:
        worst = (max if callback.mode == "min" else min)(kept, key=lambda path: kept[path], default="")
        state["kth_best_model_path"] = worst
        state["kth_value"] = kept[worst] if worst else callback.kth_value
    if state["last_model_path"] and not exists(state["last_model_path"]):
        state["last_model_path"] = ""


def _write_best(trainer: Any, best: str, own: Mapping[str, Any], point: ResumePoint) -> bool:
    """Write the best model's checkpoint, with the frozen base in it as ModelCheckpoint writes it."""
    if "://" in best:
        return False  # it lies on storage that outlives the instance: if it is gone, somebody removed it
    folder = point.folder if own["best_step"] == point.manifest.step else point.pinned
    stored = folder / f"step-{own['best_step']}.ckpt" if folder is not None else None
    if stored is None or not stored.is_file():
        return False
    logger.info("restoring the best model to %s", best)
    path = Path(best)
    checkpoint = read_native(stored)
    live = trainer._checkpoint_connector.dump_checkpoint(True)
    checkpoint.update({key: live[key] for key in HYPER_PARAMETERS & live.keys()})
    absent = set(read_own_state(stored.parent, trainer)["absent"])
    weights.complete(checkpoint, trainer.strategy.lightning_module_state_dict(), absent)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)
    return True
