"""The training of `stall.py` under Lightning's Trainer: its hooks, ModelCheckpoint, and lightning_spot's callback.

A Trainer has one checkpoint IO. The ordinary one and AsyncCheckpointIO take turns behind the same ModelCheckpoint,
exchanged right before its hook; in all else the two rows are the same code.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from stall_report import Result, result
from stall_savers import CopySaver, Saver, TorchSaver, Training
from stall_spot import SpotHooks, SpotIdle, SpotSaver
from stall_states import SHAPES, make_model
from stall_turns import Turns
from train_lightning import TRAINER, LlamaModule, make_loader, make_trainer, quiet

from lightning_spot import SpotCallback
from spot_core.data.position import DataPosition

_SEAMS = ("before_batch", "weights_may_change", "batch_ends", "after_batch")


class MeasuredSpotCallback(SpotCallback):
    """The product's callback, all that it does between two optimizer steps timed: its hooks, and before each batch."""

    def __init__(self, remote: Path, local: Path, **options: Any) -> None:
        super().__init__(str(remote), local=str(local), **options)
        self.hooks = SpotHooks(remote)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        fit = self.protected
        assert fit is not None and fit._session is not None and fit._loaders is not None
        positions = [each for each in fit._loaders._positions if isinstance(each, DataPosition)]
        self.hooks.training_begins(fit._session._pacer.cadence, positions)
        for name in _SEAMS:
            setattr(fit, name, self.hooks.timed(getattr(fit, name)))


class MeasuredModelCheckpoint(ModelCheckpoint):
    """Due after every step, as far as it is concerned; its hook is let through when told, and timed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(dirpath=folder, every_n_train_steps=1)
        self.is_wanted = False
        self.held_s = 0.0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_wanted:
            return
        self.is_wanted = False
        began = time.perf_counter()
        super().on_train_batch_end(*args, **kwargs)
        self.held_s = time.perf_counter() - began


class ModelCheckpointSaver(Saver):
    """What ModelCheckpoint does when it is due: `trainer.save_checkpoint`, without fsync.

    The file before was deleted by `settle`, so that the time ModelCheckpoint takes for that is not counted.
    """

    name = "ModelCheckpoint"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self._io = self.make_io()
        self._callback: MeasuredModelCheckpoint = training.trainer.checkpoint_callback
        self.folder = Path(str(self._callback.dirpath))

    def make_io(self) -> CheckpointIO:
        return TorchCheckpointIO()

    def start(self) -> None:
        self.training.trainer.strategy.checkpoint_io = self._io
        self._callback.is_wanted = True

    def settle(self) -> None:
        self.elsewhere_s = self._callback.held_s
        self._io.teardown()  # waits for what is still being written, and raises if it failed
        super().settle()


class AsyncModelCheckpointSaver(ModelCheckpointSaver):
    """The same with the plugin that clones every tensor and writes in a thread."""

    name = "ModelCheckpoint, AsyncCheckpointIO"

    def make_io(self) -> CheckpointIO:
        return AsyncCheckpointIO(TorchCheckpointIO())


SAVERS: tuple[type[Saver], ...] = (
    SpotSaver,
    SpotIdle,
    ModelCheckpointSaver,
    AsyncModelCheckpointSaver,
    TorchSaver,
    CopySaver,
)


class Rotation(Callback):
    """Tells the turns where the Trainer's steps begin and end. First among the callbacks, ours is the last."""

    def __init__(self, turns: Turns, hooks: SpotHooks) -> None:
        self._turns, self._hooks = turns, hooks

    def on_train_batch_start(self, *args: Any) -> None:
        self._turns.step_begins()

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._turns.backward_ended()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._turns.step_ended(lambda: self._training(trainer))

    def on_train_end(self, *args: Any) -> None:
        self._turns.training_ended()

    def _training(self, trainer: Trainer) -> Training:
        return Training(
            trainer=trainer,
            model=trainer.lightning_module,
            optimizer=trainer.optimizers[0],
            spot=self._hooks,
            step=lambda: trainer.global_step,
        )


def measure(size: str, folder: Path, *, repeat: int) -> Result:
    """Train one size."""
    quiet()
    shape = SHAPES[size]
    turns = Turns(SAVERS, folder / "others", repeat=repeat)
    spot = MeasuredSpotCallback(folder / "remote" / size, folder / "local")
    callbacks = [Rotation(turns, spot.hooks), MeasuredModelCheckpoint(folder / "model_checkpoint"), spot]
    trainer = make_trainer(folder, steps=turns.steps, callbacks=callbacks)
    trainer.fit(LlamaModule(make_model(shape)), make_loader(shape, steps=turns.steps))
    return result(turns, size=size, trainer=TRAINER, repeat=repeat)
