"""The training of `stall.py` under `transformers.Trainer`: its hooks, its own way to save, and hf_spot's callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from stall_report import Result, result
from stall_savers import CopySaver, DcpReusingSaver, DcpSaver, Saver, TorchSaver, Training
from stall_spot import CoreSaver, SpotHooks, SpotIdle, SpotSaver
from stall_states import SHAPES, make_model
from stall_turns import Turns
from train_hf import TRAINER, make_trainer, quiet
from transformers import Trainer, TrainerCallback

from hf_spot import SpotCallback


class MeasuredSpotCallback(SpotCallback):
    """The product's callback, every hook between two optimizer steps timed."""

    def __init__(self, remote: Path, local: Path, **options: Any) -> None:
        super().__init__(str(remote), local=str(local), **options)
        self.hooks = SpotHooks(remote)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        assert self._session is not None
        self.hooks.training_begins(self._session._pacer.cadence, [self._data])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.hooks.timed(super().on_step_begin)(*args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.hooks.timed(super().on_pre_optimizer_step)(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.hooks.timed(super().on_step_end)(*args, **kwargs)


class TrainerSaver(Saver):
    """What the Trainer does at `save_steps`: model, optimizer, scheduler, random state; without fsync."""

    name = "Trainer._save_checkpoint"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.folder = Path(training.trainer.args.output_dir)

    def start(self) -> None:
        self.training.trainer._save_checkpoint(self.training.trainer.model, trial=None)


SAVERS: tuple[type[Saver], ...] = (
    SpotSaver,
    SpotIdle,
    CoreSaver,
    DcpSaver,
    DcpReusingSaver,
    TrainerSaver,
    TorchSaver,
    CopySaver,
)


class Rotation(TrainerCallback):  # type: ignore[misc]
    """Tells the turns where the Trainer's steps begin and end."""

    def __init__(self, turns: Turns, hooks: SpotHooks) -> None:
        self._turns, self._hooks = turns, hooks
        self.trainer: Trainer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.step_begins()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._turns.backward_ended()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turns.step_ended(self._training)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._turns.training_ended()

    def _training(self) -> Training:
        trainer = self.trainer
        assert trainer is not None
        return Training(
            trainer=trainer,
            model=trainer.model,
            optimizer=trainer.optimizer,
            spot=self._hooks,
            step=lambda: trainer.state.global_step,
        )


def measure(size: str, folder: Path, *, repeat: int) -> Result:
    """Train one size, in a process group of one, which DCP needs."""
    quiet()
    folder.mkdir(parents=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        turns = Turns(SAVERS, folder / "others", repeat=repeat)
        spot = MeasuredSpotCallback(folder / "remote" / size, folder / "local")
        rotation = Rotation(turns, spot.hooks)
        model = make_model(SHAPES[size])
        trainer = make_trainer(model, SHAPES[size], folder / "trainer", steps=turns.steps, callbacks=[rotation, spot])
        rotation.trainer = trainer
        trainer.train()
    finally:
        dist.destroy_process_group()
    return result(turns, size=size, trainer=TRAINER, repeat=repeat)
