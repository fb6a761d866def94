"""One life of a small Trainer job, run in a process of its own, and the places where it can be made to die.

A `JobSpec` describes the training; `run` is what a user's script would do. Every training forward logs its sample
ids (the first token of each row) with the step, so that tests can compare what was seen.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_spot import SpotCallback
from tests.lives.data import LENGTH, SAMPLES, Stream, Tokens, hang_while_reading
from tests.lives.job import LifeSpec, Place, SeenLog, StateLog, die_at_operation, optimizer_tensors
from tests.lives.llama import llama, with_lora


@dataclass(frozen=True)
class JobSpec(LifeSpec):
    """What to train. arguments: for TrainingArguments."""

    kind: str = "lora"  # lora, lora_wide, full, sft, batchnorm
    data: str = "map"  # map, augmented, stream
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    resume: Any = None
    stop_at: int | None = None  # a user's own early stop
    tracks: bool = False  # let Weights & Biases write below the folder
    has_overflow: bool = True  # whether there is memory for what the local disk cannot hold

    preloaded: ClassVar[tuple[str, ...]] = ("datasets", "trl")


class Ragged(Tokens):
    """Rows of different lengths, for length-grouped sampling."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index][: 4 + index % (LENGTH - 4)]
        return {"input_ids": row, "labels": row.clone()}


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    filled = torch.full((len(rows), longest), 123)
    for i, row in enumerate(rows):
        filled[i, : len(row["input_ids"])] = row["input_ids"]
    return {"input_ids": filled, "labels": filled.clone()}


class Killer(TrainerCallback):
    """Dies by a real SIGKILL at a chosen place: `step:7`, `epoch:1`, `evaluation:2`; `term:7` sends itself SIGTERM.

    `operation:40` and `term_operation:40` are about what the process does to files, see `die_at_operation`.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.place.kind == "term" and state.global_step == self.place.number:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.place.die_if("step", state.global_step == self.place.number)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.place.die_if("epoch", round(state.epoch) == self.place.number)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.place.die_if("evaluation", state.global_step >= self.place.number)
        self.place.hang_if("hang_evaluation", state.global_step >= self.place.number)


class Recorder(TrainerCallback):
    """Writes down the state after every step."""

    def __init__(self, folder: Path) -> None:
        self._log = StateLog(folder)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        self._log.add(state.global_step, trained, kwargs["optimizer"])


class StopAt(TrainerCallback):
    """A user's early stop, decided when a step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True


def model_of(kind: str) -> torch.nn.Module:
    if kind == "full":
        return llama(dropout=0.1, is_tied=True)
    model = llama()
    if kind == "batchnorm":
        model.model.norm = NormWithStatistics(32)
    return with_lora(model, rank=8 if kind == "lora_wide" else 4, saved=["lm_head"] if kind == "lora" else None)


class NormWithStatistics(torch.nn.BatchNorm1d):
    """A frozen layer whose running statistics change in every forward."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


def arguments_of(spec: JobSpec) -> dict[str, Any]:
    return {
        "output_dir": f"{spec.folder}/out",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": spec.seed,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if spec.ranks > 1 else None,
        **spec.arguments,
    }


def trainer_of(spec: JobSpec) -> Trainer:
    set_seed(spec.seed)
    arguments = arguments_of(spec)
    callbacks: list[Any] = [Killer(Place(spec.dies))]
    if spec.stop_at is not None:
        callbacks.append(StopAt(spec.stop_at))
    if spec.has_digests:
        callbacks.append(Recorder(Path(spec.folder)))
    if spec.has_callback:
        options = spec.spot_options
        callbacks.append(SpotCallback(options.pop("remote"), **options))
    if spec.kind == "sft":
        return _sft_trainer(arguments, callbacks)
    grouped = arguments.get("train_sampling_strategy") == "group_by_length"
    train: Any = Ragged(SAMPLES) if grouped else Tokens(SAMPLES, is_augmented=spec.data == "augmented")
    if spec.data == "stream":
        train = Stream(SAMPLES)
    return Trainer(
        model=model_of(spec.kind),
        args=TrainingArguments(**arguments),
        train_dataset=train,
        eval_dataset=Tokens(9),
        data_collator=pad,
        callbacks=callbacks,
    )


def _sft_trainer(arguments: dict[str, Any], callbacks: list[Any]) -> Trainer:
    from datasets import Dataset as HubDataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{i}": i for i in range(124)} | {"<pad>": 124, "<eos>": 125, "<unk>": 126}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    rows = Tokens(SAMPLES).rows
    texts = [" ".join(f"w{token}" for token in row.tolist()) for row in rows]
    return SFTTrainer(
        model=model_of("sft"),
        args=SFTConfig(**arguments, max_length=LENGTH, packing=False, dataset_num_proc=None),
        train_dataset=HubDataset.from_dict({"text": texts}),
        processing_class=fast,
        callbacks=callbacks,
    )


def run(spec: JobSpec) -> None:
    """The user's script: build, train, save."""
    folder = spec.own_folder
    if not spec.has_overflow:
        os.environ["SPOT_OVERFLOW"] = ""
    if spec.tracks:
        os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DIR=spec.folder)
    trainer = trainer_of(spec)
    seen = SeenLog(folder)

    def log_ids(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and "input_ids" in kwargs:
            ids = kwargs["input_ids"]
            seen.add(trainer.state.global_step, ids[:, 0].tolist(), int(ids.sum()))

    trainer.model.register_forward_pre_hook(log_ids, with_kwargs=True)
    place = Place(spec.dies)
    if place.kind == "hang_reading":
        hang_while_reading(trainer.train_dataset, place, lambda: trainer.state.global_step)
    if place.kind in {"operation", "term_operation"}:
        signum = signal.SIGKILL if place.kind == "operation" else signal.SIGTERM
        die_at_operation(place.number, folder / "operations.txt", signum)
    kwargs = {} if spec.resume is None else {"resume_from_checkpoint": spec.resume}
    trainer.train(**kwargs)
    history = trainer.state.log_history
    final = {
        "tensors": dict(trainer.model.state_dict()) | optimizer_tensors(trainer.optimizer),
        "log": [_numbers(entry) for entry in history if "train_runtime" not in entry],
        "summaries": [entry for entry in history if "train_runtime" in entry],  # each counts one life's steps only
        "step": trainer.state.global_step,
    }
    torch.save(final, folder / "final.pt")


# SFTTrainer averages these in private counters, which it does not checkpoint either.
_UNSAVED = {"entropy", "mean_token_accuracy", "num_tokens"}


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """A logged entry without wall-clock figures."""
    return {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k and k not in _UNSAVED}
