"""Modules that each hold one kind of state that a resume can lose."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

from tests.lightning.namespace import pl
from tests.lives.data import LENGTH
from tests.lives.job import SeenLog
from tests.lives.llama import llama, with_lora

Batch = dict[str, Any]


def parts(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    """The rows of a batch, or of each loader of a combined one, by its name."""
    if "input_ids" in batch:
        yield "rows", batch["input_ids"]
    else:
        for name, part in batch.items():
            yield name, part["input_ids"]


def features(rows: torch.Tensor) -> torch.Tensor:
    return rows.float() / 60 - 1.4


def network() -> nn.Module:
    """Dropout draws random numbers in every forward, BatchNorm1d changes its running statistics."""
    return nn.Sequential(
        nn.Unflatten(1, (1, LENGTH)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * (LENGTH - 2), 1),
    )


class Plain(pl.LightningModule):
    """Adam with a cosine schedule per step. Extended by the other kinds."""

    lr = 0.01

    def __init__(self, seen: SeenLog | None) -> None:
        super().__init__()
        self.seen = seen
        self.network = network()

    def log_ids(self, batch: Batch) -> None:
        """Every training forward logs the first token of each row, which is its sample's id."""
        named = dict(parts(batch))
        ids = {name: rows[:, 0].tolist() for name, rows in named.items()}
        self.seen.add(self.trainer.global_step, ids, sum(int(rows.sum()) for rows in named.values()))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        target = torch.sin(rows[:, 1:].sum(1, keepdim=True).float())
        return functional.mse_loss(self.network(features(rows)), target)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.log_ids(batch)
        loss = sum(self.loss(rows) for _, rows in parts(batch))
        self.log_loss(loss)
        return loss

    def log_loss(self, loss: torch.Tensor) -> None:
        self.log("train_loss", loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch["input_ids"]), batch_size=len(batch["input_ids"]))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([tensor for tensor in self.parameters() if tensor.requires_grad], lr=self.lr)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        return [optimizer], [{"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, T_max=30), "interval": "step"}]


class Lora(Plain):
    """A frozen Llama with LoRA and an output layer trained in full."""

    rank = 4

    def __init__(self, seen: SeenLog) -> None:
        super().__init__(seen)
        self.network = with_lora(llama(), rank=self.rank, saved=["lm_head"])

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return self.network(input_ids=rows, labels=rows).loss


class LoraWide(Lora):
    """Another rank."""

    rank = 8


class LoraLarge(Lora):
    """Megabytes of adapter, next to which what a checkpoint holds besides is small."""

    def __init__(self, seen: SeenLog) -> None:
        super().__init__(seen)
        self.network = with_lora(llama(width=256), rank=256)


class LoraSgd(Lora):
    """Adam's smallest numbers are zero in half precision."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([tensor for tensor in self.parameters() if tensor.requires_grad], 0.01, momentum=0.9)


class Plateau(Plain):
    """The epoch's mean loss, half of which may come from an earlier life, decides the next learning rate."""

    monitor = "train_loss"

    def __init__(self, seen: SeenLog) -> None:
        super().__init__(seen)
        self.mean = torchmetrics.MeanMetric()

    def log_loss(self, loss: torch.Tensor) -> None:
        self.mean.update(loss)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=4)
        self.log("mean_loss", self.mean, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class PlateauOfValidation(Plateau):
    """The validation loss decides."""

    monitor = "val_loss"


class TwoSchedulers(Plain):
    """One steps every second optimizer step, one at the end of each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        by_step = lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        by_epoch = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return [optimizer], [
            {"scheduler": by_step, "interval": "step", "frequency": 2, "name": "by step"},
            {"scheduler": by_epoch, "interval": "epoch", "name": "by epoch"},
        ]


class Momentum(Plain):
    """A teacher without gradients follows the student after each batch, in the module's own hook."""

    def __init__(self, seen: SeenLog) -> None:
        super().__init__(seen)
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        student = self.network(features(rows))
        return super().loss(rows) + functional.mse_loss(student, self.teacher(features(rows)))

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


class MomentumBehindAutograd(Momentum):
    """Some write through `.data`, which leaves no trace in the tensor's version."""

    follows_from = 0

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.trainer.global_step > self.follows_from:
            for slow, fast in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                slow.data.lerp_(fast.data, 0.1)


class LateMomentumBehindAutograd(MomentumBehindAutograd):
    """The teacher is still for the first steps."""

    follows_from = 6


class Transfer(Plain):
    """A backbone that a callback freezes and unfreezes; only the head is given to the optimizer."""

    def __init__(self, seen: SeenLog) -> None:
        super().__init__(seen)
        self.backbone = nn.Sequential(nn.Linear(LENGTH, 16), nn.ReLU(), nn.Linear(16, LENGTH))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        target = torch.sin(rows[:, 1:].sum(1, keepdim=True).float())
        return functional.mse_loss(self.network(self.backbone(features(rows))), target)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)


class HalfFrozen(Plain):
    """The convolution is frozen."""

    def __init__(self, seen: SeenLog) -> None:
        super().__init__(seen)
        self.network[1].requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A hyper-parameter of no plain type."""

    lr: float
    corpus: Path


class Tuned(Plain):
    """Has hyper-parameters."""

    def __init__(self, seen: SeenLog | None = None, *, settings: Settings = Settings(0.02, Path("a/corpus"))) -> None:
        super().__init__(seen)
        self.save_hyperparameters(ignore=["seen"])
        self.lr = settings.lr


class TunedLora(Lora):
    """Has hyper-parameters, and a base that is not in its checkpoints."""

    def __init__(self, seen: SeenLog | None = None, *, note: str = "none") -> None:
        super().__init__(seen)
        self.save_hyperparameters(ignore=["seen"])


class Adversarial(Plain):
    """Manual optimization: the judge steps at every batch, the forger accumulates gradients over two."""

    def __init__(self, seen: SeenLog) -> None:
        super().__init__(seen)
        self.automatic_optimization = False
        self.forger = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, LENGTH))

    def forged(self, rows: torch.Tensor) -> torch.Tensor:
        return self.forger(torch.randn(len(rows), 6))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_ids(batch)
        rows = batch["input_ids"]
        of_judge, of_forger = self.optimizers()

        self.toggle_optimizer(of_judge)
        real, forged = self.network(features(rows)), self.network(self.forged(rows).detach())
        judge_loss = functional.softplus(-real).mean() + functional.softplus(forged).mean()
        self.manual_backward(judge_loss)
        of_judge.step()
        of_judge.zero_grad()
        self.untoggle_optimizer(of_judge)

        self.toggle_optimizer(of_forger)
        forger_loss = functional.softplus(-self.network(self.forged(rows))).mean()
        self.manual_backward(forger_loss / 2)
        if batch_idx % 2 == 1:
            of_forger.step()
            of_forger.zero_grad()
        self.untoggle_optimizer(of_forger)

        of_schedule = self.lr_schedulers()
        of_schedule.step()
        self.log_dict({"judge_loss": judge_loss, "forger_loss": forger_loss})

    def configure_optimizers(self) -> Any:
        judge = torch.optim.Adam(self.network.parameters(), lr=0.01)
        forger = torch.optim.SGD(self.forger.parameters(), lr=0.05, momentum=0.9)
        return [judge, forger], [lr_scheduler.ExponentialLR(judge, gamma=0.98)]


KINDS: dict[str, Callable[[SeenLog], Plain]] = {
    "plain": Plain,
    "lora": Lora,
    "lora_wide": LoraWide,
    "lora_large": LoraLarge,
    "lora_sgd": LoraSgd,
    "manual": Adversarial,
    "plateau": Plateau,
    "plateau_val": PlateauOfValidation,
    "two_schedulers": TwoSchedulers,
    "momentum": Momentum,
    "momentum_data": MomentumBehindAutograd,
    "momentum_late": LateMomentumBehindAutograd,
    "transfer": Transfer,
    "half_frozen": HalfFrozen,
    "tuned": functools.partial(Tuned, settings=Settings(0.03, Path("another/corpus"))),
    "tuned_lora": functools.partial(TunedLora, note="as given"),
}
