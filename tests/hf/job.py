"""One life of a small Trainer job, run in a process of its own, and the places where it can be made to die.

A `JobSpec` describes the training; `run` is what a user's script would do. Every training forward logs its sample
ids (the first token of each row) with the step, so that tests can compare what was seen.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_spot import SpotCallback

SAMPLES = 37  # no multiple of any batch size used: the last batch of an epoch is short
LENGTH = 12


@dataclass(frozen=True)
class JobSpec:
    """What to train. folder: output, tiers and logs go there. arguments: for TrainingArguments."""

    folder: str
    kind: str = "lora"  # lora, lora_wide, full, sft, batchnorm
    data: str = "map"  # map, augmented, stream
    has_callback: bool = True
    interval_s: float | None = 0.001  # a checkpoint at every boundary where the writer is free
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    dies: str | None = None  # see `Killer`
    resume: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 7
    stop_at: int | None = None  # a user's own early stop
    tracks: bool = False  # let Weights & Biases write below the folder


class Tokens(Dataset):
    """Row i starts with token i; the rest is fixed, or drawn anew at each read."""

    def __init__(self, count: int, *, is_augmented: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(50, 120, (count, LENGTH), generator=generator)
        self.rows[:, 0] = torch.arange(count)
        self.is_augmented = is_augmented

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index].clone()
        if self.is_augmented:
            row[1:] = torch.where(torch.rand(LENGTH - 1) < 0.3, 121, row[1:])
            row[1 + np.random.randint(LENGTH - 1)] = 122
        row = row[: 4 + index % (LENGTH - 4)] if self.is_augmented is None else row
        return {"input_ids": row, "labels": row.clone()}


class Ragged(Tokens):
    """Rows of different lengths, for length-grouped sampling."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index][: 4 + index % (LENGTH - 4)]
        return {"input_ids": row, "labels": row.clone()}


class Stream(IterableDataset):
    """The same rows as a stream of fixed order."""

    def __init__(self, count: int) -> None:
        self.inner = Tokens(count, is_augmented=False)

    def __iter__(self) -> Any:
        return (self.inner[i] for i in range(len(self.inner)))


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    filled = torch.full((len(rows), longest), 123)
    for i, row in enumerate(rows):
        filled[i, : len(row["input_ids"])] = row["input_ids"]
    return {"input_ids": filled, "labels": filled.clone()}


class Killer(TrainerCallback):
    """Dies by a real SIGKILL at a chosen place: `step:7`, `epoch:1`, `evaluation:2`, `operation:31` (see below)."""

    def __init__(self, where: str | None) -> None:
        self.kind, _, number = (where or "never:0").partition(":")
        self.number = int(number)
        self.evaluations = 0

    def _die(self, is_now: bool) -> None:
        if is_now:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kind == "term" and state.global_step == self.number:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die(self.kind == "step" and state.global_step == self.number)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die(self.kind == "epoch" and round(state.epoch) == self.number)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die(self.kind == "evaluation" and state.global_step >= self.number)


class StopAt(TrainerCallback):
    """A user's early stop, decided when a step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True


def die_at_operation(number: int, record: Path) -> None:
    """From now on count what the process does to files; at the given one, die before it happens.

    The count at each link, which is where a manifest appears, goes to `record`.
    """
    count = 0

    def counted(original: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "link":
                with open(record, "a") as file:
                    file.write(f"{count}\n")
            return original(*args, **kwargs)

        return call

    for name in ("write", "fsync", "replace", "link", "mkdir", "unlink"):
        setattr(os, name, counted(getattr(os, name), name))


def model_of(kind: str) -> torch.nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=128,
        attention_dropout=0.1 if kind == "full" else 0.0,
        tie_word_embeddings=kind == "full",
    )
    model = LlamaForCausalLM(config)
    if kind == "full":
        return model
    if kind == "batchnorm":
        model.model.norm = NormWithStatistics(32)
    saved = ["lm_head"] if kind == "lora" else None
    rank = 8 if kind == "lora_wide" else 4
    return get_peft_model(
        model, LoraConfig(r=rank, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    )


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
        **spec.arguments,
    }


def trainer_of(spec: JobSpec) -> Trainer:
    set_seed(spec.seed)
    arguments = arguments_of(spec)
    callbacks: list[Any] = [Killer(spec.dies)]
    if spec.stop_at is not None:
        callbacks.append(StopAt(spec.stop_at))
    if spec.has_callback:
        options = {"local": f"{spec.folder}/local", "interval_s": spec.interval_s, "keep_remote": 3, **spec.options}
        callbacks.append(SpotCallback(options.pop("remote", f"{spec.folder}/remote/job"), **options))
    if spec.kind == "sft":
        return _sft_trainer(arguments, callbacks)
    grouped = arguments.get("train_sampling_strategy") == "group_by_length"
    train: Any = (
        Ragged(SAMPLES, is_augmented=False) if grouped else Tokens(SAMPLES, is_augmented=spec.data == "augmented")
    )
    if spec.data == "stream":
        train = Stream(SAMPLES)
    return Trainer(
        model=model_of(spec.kind),
        args=TrainingArguments(**arguments),
        train_dataset=train,
        eval_dataset=Tokens(9, is_augmented=False),
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
    rows = Tokens(SAMPLES, is_augmented=False).rows
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
    folder = Path(spec.folder)
    if spec.tracks:
        os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DIR=spec.folder)
    trainer = trainer_of(spec)
    seen = open(folder / "seen.jsonl", "a", buffering=1)

    def log_ids(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and "input_ids" in kwargs:
            time.sleep(0.02)  # slow enough for commits to land between kills
            ids = kwargs["input_ids"]
            seen.write(json.dumps([os.getpid(), trainer.state.global_step, ids[:, 0].tolist(), int(ids.sum())]) + "\n")

    trainer.model.register_forward_pre_hook(log_ids, with_kwargs=True)
    if spec.dies is not None and spec.dies.startswith("operation:"):
        die_at_operation(int(spec.dies.partition(":")[2]), folder / "operations.txt")
    kwargs = {} if spec.resume is None else {"resume_from_checkpoint": spec.resume}
    trainer.train(**kwargs)
    final = dict(trainer.model.state_dict())
    final |= {
        f"optimizer.{i}.{key}": value
        for i, state in trainer.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    torch.save(
        {"tensors": final, "log": trainer.state.log_history, "step": trainer.state.global_step}, folder / "final.pt"
    )


def main(spec: dict[str, Any], log_path: str) -> None:
    """Entry point of the process: output goes to a file that tests read."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    run(JobSpec(**spec))
