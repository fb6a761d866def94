"""Lightning's own callbacks that change weights, or what is trained, while training runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.lightning.namespace import pl


class MovingWeights(pl.Callback):
    """Gives every weight other memory, as tools that flatten or offload weights do; where it was is used otherwise."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 7:
            for parameter in module.parameters():
                before = parameter.data
                parameter.data = before.clone()
                before.fill_(-1.0)


class Patient(pl.Callback):
    """Has each checkpoint written before the optimizer steps again, so that every boundary finds the writer free."""

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        for protected in filter(None, (getattr(each, "protected", None) for each in trainer.callbacks)):
            protected._session._checkpoints.wait()


OTHERS: dict[str, Callable[[], Any]] = {
    "moving weights": MovingWeights,
    "patient": Patient,
    "unfreezing": lambda: pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "average": lambda: pl.callbacks.WeightAveraging(),
    "moving average": lambda: pl.callbacks.EMAWeightAveraging(decay=0.9),
    "stochastic average": lambda: pl.callbacks.StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=2),
    "batch size finder": lambda: pl.callbacks.BatchSizeFinder(),
    "learning rate finder": lambda: pl.callbacks.LearningRateFinder(num_training_steps=20, early_stop_threshold=None),
}
