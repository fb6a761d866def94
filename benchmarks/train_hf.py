"""The training of the benchmarks under `transformers.Trainer`: its arguments, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from stall_states import LEARNING_RATE, RandomTokens, Shape
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

VERSIONS = {"transformers": transformers.__version__}
TRAINER = "transformers.Trainer"


def quiet() -> None:
    """Keep the Trainer's remarks out of the table."""
    transformers.logging.set_verbosity_error()


def make_trainer(
    model: torch.nn.Module, shape: Shape, folder: Path, *, steps: int, callbacks: Sequence[TrainerCallback]
) -> Trainer:
    """A Trainer for `steps` steps of one epoch; it neither logs nor saves by itself."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=shape.batch,
        learning_rate=LEARNING_RATE,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=RandomTokens(shape, steps=steps), callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Calls back when an optimizer step is done; training ends once the call returns True."""

    def __init__(self, call: Callable[[], bool]) -> None:
        self._call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._call():
            control.should_training_stop = True


def training(
    model: torch.nn.Module, shape: Shape, folder: Path, *, steps: int, callbacks: Sequence[TrainerCallback]
) -> Callable[[str | None], None]:
    """What trains when it is called, with the path of a native checkpoint to load or None."""
    trainer = make_trainer(model, shape, folder, steps=steps, callbacks=callbacks)
    return lambda path: trainer.train(resume_from_checkpoint=path)
