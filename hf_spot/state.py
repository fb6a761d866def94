"""The Trainer's state as native checkpoint files, and what a resume puts back beyond what the Trainer does.

A checkpoint's folder holds `checkpoint-N`, which stock `Trainer.train(resume_from_checkpoint=…)` loads, and beside
it `spot_state.pt`: data position, random state at each moment that matters, running losses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_spot.weights import LiveWeights, live_weights, static_files
from spot_core.data.position import DataState
from spot_core.errors import CorruptCheckpointError
from spot_core.ranks.team import named
from spot_core.snapshot.files import BytesFile, NativeFile, SafetensorsFile, TorchFile, everything, torch_bytes
from spot_core.snapshot.loading import load_plain
from spot_core.snapshot.rng import RngState
from spot_core.snapshot.trees import same_bits

SPOT_STATE = "spot_state.pt"
RNG_STATE = "rng_state.pth"
TRAINER_STATE = "trainer_state.json"


class LiveState:
    """References to everything a checkpoint holds. Made when training begins, after the Trainer's own loading."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._weights: LiveWeights = live_weights(trainer.model)
        self._static = static_files(trainer.model, trainer.processing_class)

    def files(self, state: TrainerState, native: str, data: DataState, *, stream_passes: int) -> list[NativeFile]:
        """The checkpoint's files for this boundary. Cheap: large tensors are named, small ones cloned."""
        trainer = self._trainer
        files: list[NativeFile] = [
            SafetensorsFile(path=f"{native}/{path}", tensors=tensors, volatile=self._weights.volatile_keys(path))
            for path, tensors in self._weights.files.items()
        ]
        optimizer = trainer.optimizer.state_dict()
        files.append(TorchFile(path=f"{native}/optimizer.pt", tree=optimizer, stable_keys=frozenset({"state"})))
        schedule = trainer.lr_scheduler.state_dict()
        files.append(TorchFile(path=f"{native}/scheduler.pt", tree=schedule, is_volatile=everything))
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            files.append(BytesFile(path=f"{native}/scaler.pt", content=_scaler_bytes(scaler)))
        record = self._trainer_record(state)
        own = {
            "format": 1,
            "stream_passes": stream_passes,
            "buffers": {name: buffer.detach().clone() for name, buffer in self._weights.buffers.items()},
            "tr_loss": trainer._tr_loss.detach().clone(),
            "globalstep_last_logged": trainer._globalstep_last_logged,
        }
        files += [
            BytesFile(path=f"{native}/{TRAINER_STATE}", content=lambda: _json_bytes(record)),
            BytesFile(path=f"{native}/{RNG_STATE}", content=lambda: torch_bytes(_native_rng(data.step)), is_part=True),
            BytesFile(path=SPOT_STATE, content=lambda: torch_bytes({**own, "data": data.to_portable()}), is_part=True),
        ]
        files += [BytesFile(path=f"{native}/{path}", content=_constant(data)) for path, data in self._static.items()]
        return files

    def _trainer_record(self, state: TrainerState) -> dict[str, Any]:
        """What `TrainerState.save_to_json` writes, copied shallowly: the log's entries never change."""
        record = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        record["log_history"] = list(state.log_history)
        record["total_flos"] = state.total_flos + self._trainer.current_flos
        exported: dict[str, Any] = {}
        for callback in [*self._trainer.callback_handler.callbacks, self._trainer.control]:
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        record["stateful_callbacks"] = {k: v[0] if len(v) == 1 else v for k, v in exported.items()}
        return record

    def check_loaded(self, folder: Path) -> None:
        """Compare every live tensor with the checkpoint it was loaded from, bit for bit.

        Raises CorruptCheckpointError naming what differs: an adapter wrapped twice or not loaded at all would train
        on, silently, from fresh weights.
        """
        for path, tensors in self._weights.files.items():
            with safe_open(folder / path, framework="pt") as stored:
                keys = set(stored.keys())
                wrong = sorted(keys ^ tensors.keys())
                wrong += [k for k in tensors if k in keys and not same_bits(stored.get_tensor(k), tensors[k])]
            if wrong:
                raise CorruptCheckpointError(
                    f"after loading {path}, {len(wrong)} tensors of the model are not those of the checkpoint: "
                    f"{', '.join(wrong[:5])}. Training was not started; nothing was changed. Is the adapter applied "
                    "twice, or the model built differently from the last run?"
                )

    def restore(self, own: dict[str, Any], callbacks: dict[str, Any]) -> None:
        """Put back what the Trainer does not: buffers, running losses, other callbacks' counters."""
        trainer = self._trainer
        for name, buffer in self._weights.buffers.items():
            buffer.copy_(own["buffers"][name])
        trainer._tr_loss = own["tr_loss"].to(trainer._tr_loss.device)
        # The summary's train_loss is this life's: what the last life lost since its last log is not counted twice.
        trainer._total_loss_scalar = -own["tr_loss"].item()
        trainer._globalstep_last_logged = own["globalstep_last_logged"]
        for callback in trainer.callback_handler.callbacks:
            if not isinstance(callback, ExportableState) or isinstance(callback, TrainerControl):
                continue
            stored = callbacks.get(type(callback).__name__, [])
            stored = stored if isinstance(stored, list) else [stored]
            if stored:
                for attribute, value in stored.pop(0).get("attributes", {}).items():
                    setattr(callback, attribute, value)


def read_own_state(folder: Path, args: TrainingArguments) -> dict[str, Any]:
    """The content of this rank's `spot_state.pt`; its data position under `data` as a DataState."""
    own = load_plain(folder / named(SPOT_STATE, args.process_index, size=args.world_size))
    own["data"] = DataState.from_portable(own["data"])
    return own


def _scaler_bytes(scaler: Any) -> Callable[[], bytes]:
    """The gradient scaler's state without waiting for the device: its values are read by the writer."""
    scale, tracker = getattr(scaler, "_scale", None), getattr(scaler, "_growth_tracker", None)
    if not isinstance(scale, torch.Tensor) or not isinstance(tracker, torch.Tensor):
        settled = scaler.state_dict()
        return lambda: torch_bytes(settled)
    rest = {
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
    }
    scale, tracker = scale.clone(), tracker.clone()
    return lambda: torch_bytes({"scale": scale.item(), **rest, "_growth_tracker": int(tracker.item())})


def _native_rng(state: RngState) -> dict[str, Any]:
    native: dict[str, Any] = {"python": state.python, "numpy": state.numpy, "cpu": state.torch_cpu}
    if "cuda" in state.devices:
        native["cuda"] = state.devices["cuda"][torch.cuda.current_device()]
    return native


def _json_bytes(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data
