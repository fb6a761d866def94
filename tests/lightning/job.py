"""One life of a small Lightning job, run in a process of its own, and the places where it can be made to die.

A `JobSpec` describes the training; `run` is what a user's script would do. Every training forward logs its sample
ids with the step, every metric goes to a file, so that tests can compare what was seen and what was logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.lightning.callbacks import OTHERS
from tests.lightning.data import BATCH, data_of
from tests.lightning.modules import KINDS
from tests.lightning.namespace import MODULES, VARIABLE, pl
from tests.lives.data import SAMPLES, hang_while_reading
from tests.lives.job import LifeSpec, Place, SeenLog, StateLog, die_at_operation, optimizer_tensors

_OLDER = Path(__file__).resolve().parents[2] / ".venv"  # where `make install` puts older releases


@dataclass(frozen=True)
class JobSpec(LifeSpec):
    """What to train. trainer: for the Trainer. early_stopping, checkpoint: for Lightning's own callbacks, if given."""

    kind: str = "plain"  # see `modules.KINDS`
    # map, augmented, stateful, stream, combined, batch_sampler, distributed_sampler, datamodule
    data: str = "map"
    workers: int = 0
    persistent: bool = False
    samples: int = SAMPLES
    batch: int = BATCH
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    early_stopping: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    others: list[str] = dataclasses.field(default_factory=list)  # see `callbacks.OTHERS`
    ckpt_path: str | None = None  # a user's own, for `trainer.fit`
    stop_at: int | None = None  # the user's code asks for the end of training at this step
    handles_sigterm: bool = False  # the user's own handler, see `sigterm_handled`
    tracker: str | None = None  # wandb or mlflow instead of the file
    namespace: str = "lightning"  # or pytorch_lightning
    lightning: str | None = None  # an older release than the installed one: "2.5"

    preloaded: ClassVar[tuple[str, ...]] = ("lightning_spot",)  # and with it the other namespace

    @property
    def environment(self) -> dict[str, str]:
        """Chooses the package that `pl` is and, by a folder that goes before the installed libraries, its release."""
        older = {} if self.lightning is None else {"PYTHONPATH": str(_OLDER / f"lightning-{self.lightning}")}
        return {VARIABLE: self.namespace, **older}


class Killer(pl.Callback):
    """Dies by a real SIGKILL at a chosen place.

    `step:7`: at the end of the batch that made the step. `backward:7`: in the middle of the step that follows it.
    `epoch:2`: at the end of the second epoch. `evaluation:9`: in the first validation from that step on.
    `setup:0`: while the Trainer is being set up. `sanity:0`: in the validation before training.
    `term:7` and `usr1:7` send a signal at the start of the batch that follows step 7; `term_backward:7` and so on
    send it at the other places, `term_after:0` when `fit` has returned.
    """

    signals: ClassVar = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}

    def __init__(self, place: Place) -> None:
        self.place = place

    def _reached(self, moment: str, is_now: bool = True) -> None:
        self.place.die_if(moment, is_now)
        name, _, chosen = self.place.kind.partition("_")
        if is_now and name in self.signals and chosen == moment:
            self.place = Place(None)
            os.kill(os.getpid(), self.signals[name])

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self._reached("setup")

    def on_sanity_check_start(self, trainer: Any, *args: Any) -> None:
        self._reached("sanity")

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._reached("", trainer.global_step == self.place.number)

    def on_after_backward(self, trainer: Any, *args: Any) -> None:
        self._reached("backward", trainer.global_step == self.place.number)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._reached("step", trainer.global_step == self.place.number)

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self._reached("epoch", trainer.current_epoch + 1 == self.place.number)

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        self.place.hang_if("hang_evaluation", not trainer.sanity_checking and trainer.global_step >= self.place.number)
        self._reached("evaluation", not trainer.sanity_checking and trainer.global_step >= self.place.number)


class Recorder(pl.Callback):
    """Writes down the state after every step."""

    def __init__(self, folder: Path) -> None:
        self._log = StateLog(folder)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self._log.add(trainer.global_step, module.state_dict().values(), trainer.optimizers[0])


class StopAt(pl.Callback):
    """A user's own decision to end training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


@contextlib.contextmanager
def sigterm_handled(record: Path) -> Iterator[None]:
    """A handler of the user's own: `record` gets a line when it is called, and one if it is in place at the end."""

    def handler(*args: Any) -> None:
        with open(record, "a") as file:
            file.write("called\n")

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handler:
            with open(record, "a") as file:
                file.write("in place\n")


class FileLogger(pl.loggers.logger.Logger):
    """Appends metrics to a file, as loggers do, across lives."""

    name = "file"
    version = 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = open(path, "a", buffering=1)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def by_step(self) -> list[dict[str, Any]]:
        """Everything logged, one entry a step; what was logged again counts as last logged."""
        entries: dict[int, dict[str, Any]] = {}
        for line in self._path.read_text().splitlines():
            entry = json.loads(line)
            entries.setdefault(entry["step"], {}).update(entry)
        return [entries[step] for step in sorted(entries)]


def callbacks_of(spec: JobSpec) -> list[Any]:
    callbacks: list[Any] = [Killer(Place(spec.dies))]
    if spec.early_stopping is not None:
        callbacks.append(pl.callbacks.EarlyStopping(**spec.early_stopping))
    if spec.checkpoint is not None:
        callbacks.append(pl.callbacks.ModelCheckpoint(**spec.checkpoint))
    if spec.stop_at is not None:
        callbacks.append(StopAt(spec.stop_at))
    if spec.has_digests:
        callbacks.append(Recorder(Path(spec.folder)))
    callbacks += [OTHERS[name]() for name in spec.others]
    if spec.has_callback:
        from lightning_spot import SpotCallback

        options = spec.spot_options
        callbacks.append(SpotCallback(options.pop("remote"), **options))
    return callbacks


def logger_of(spec: JobSpec) -> Any:
    if spec.tracker == "wandb":
        os.environ["WANDB_SILENT"] = "true"
        return pl.loggers.WandbLogger(save_dir=spec.folder, offline=True)
    if spec.tracker == "mlflow":
        return pl.loggers.MLFlowLogger(tracking_uri=f"file:{spec.folder}/mlruns")
    return FileLogger(spec.own_folder / "metrics.jsonl")


def trainer_of(spec: JobSpec) -> Any:
    arguments = {
        "accelerator": "cpu",
        "devices": spec.ranks,
        **({"strategy": "ddp"} if spec.ranks > 1 else {}),
        "max_epochs": 3,
        "limit_val_batches": 0,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": spec.checkpoint is not None,
        "default_root_dir": f"{spec.folder}/out",
        "logger": logger_of(spec),
        "callbacks": callbacks_of(spec),
        **spec.trainer,
    }
    return pl.Trainer(**arguments)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Its numbers, those in tensors too."""
    numbers = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    return {key: value for key, value in numbers.items() if isinstance(value, bool | int | float | list)}


def extra_of(trainer: Any) -> dict[str, Any]:
    """What the Trainer's own parts decided by."""
    return {
        "epoch": trainer.current_epoch,
        "schedulers": [_plain(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "early stopping": [_plain(callback.state_dict()) for callback in trainer.early_stopping_callbacks],
        "checkpoint": [_plain(vars(callback)).get("best_model_score") for callback in trainer.checkpoint_callbacks],
    }


def run(spec: JobSpec) -> None:
    """The user's script: build, train, save."""
    assert pl.__name__ == MODULES[spec.namespace]
    assert spec.lightning is None or pl.__version__.startswith(f"{spec.lightning}."), pl.__version__
    folder = spec.own_folder
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(spec.seed, verbose=False)
    module = KINDS[spec.kind](SeenLog(folder))
    of_workers = {"num_workers": spec.workers, "persistent_workers": spec.persistent}
    data = data_of(spec.data, of_workers, samples=spec.samples, batch=spec.batch)
    trainer = trainer_of(spec)
    place = Place(spec.dies)
    if place.kind == "hang_reading":
        hang_while_reading(data["train_dataloaders"].dataset, place, lambda: trainer.global_step)
    if place.kind == "operation":
        die_at_operation(place.number, folder / "operations.txt")
    with sigterm_handled(folder / "handler.txt") if spec.handles_sigterm else contextlib.nullcontext():
        trainer.fit(module, **data, ckpt_path=spec.ckpt_path)
    if place.kind == "term_after":
        os.kill(os.getpid(), signal.SIGTERM)
    tensors = dict(module.state_dict())
    for number, optimizer in enumerate(trainer.optimizers):
        tensors |= optimizer_tensors(optimizer, f"optimizer.{number}")
    final = {
        "tensors": tensors,
        "log": FileLogger(folder / "metrics.jsonl").by_step(),
        "extra": extra_of(trainer),
        "step": trainer.global_step,
        "best_model_path": trainer.checkpoint_callback and trainer.checkpoint_callback.best_model_path,
    }
    torch.save(final, folder / "final.pt")
