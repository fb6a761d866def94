"""The training of the benchmarks under Lightning's Trainer: module, data and arguments, the same for all of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from stall_states import LEARNING_RATE, RandomTokens, Shape
from torch.utils.data import DataLoader

VERSIONS = {"lightning": lightning.__version__, "transformers": transformers.__version__}
TRAINER = "lightning.pytorch.Trainer"


def quiet() -> None:
    """Keep the Trainer's remarks out of the table."""
    for namespace in ("lightning.pytorch", "pytorch_lightning"):  # both log to the one imported last
        logging.getLogger(namespace).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning", message=".*num_workers")


class LlamaModule(LightningModule):
    """A network with AdamW on what is trained."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.network(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=LEARNING_RATE)


def make_trainer(folder: Path, *, steps: int, callbacks: Sequence[Callback], **more: Any) -> Trainer:
    """A Trainer for `steps` steps, without logs. more: of its arguments."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


def make_loader(shape: Shape, *, steps: int) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches for `steps` steps of one epoch."""
    return DataLoader(RandomTokens(shape, steps=steps), batch_size=shape.batch, shuffle=True)


class AfterStep(Callback):
    """Calls back when an optimizer step is done; training ends once the call returns True."""

    def __init__(self, call: Callable[[], bool]) -> None:
        self._call = call

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._call():
            trainer.should_stop = True


def training(
    model: torch.nn.Module, shape: Shape, folder: Path, *, steps: int, callbacks: Sequence[Callback]
) -> Callable[[str | None], None]:
    """What trains when it is called, with the path of a native checkpoint to load or None."""
    trainer = make_trainer(folder, steps=steps, callbacks=callbacks)
    module = LlamaModule(model)
    module.strict_loading = False  # a checkpoint of adapters has no base in it
    loader = make_loader(shape, steps=steps)
    return lambda path: trainer.fit(module, loader, ckpt_path=path)
