"""What makes two lives of a Trainer script the same run, and which Trainers cannot be captured."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from accelerate.utils import DistributedType
from transformers import Trainer

from hf_spot.weights import is_peft
from spot_core.handover import refuse
from spot_core.snapshot import fingerprint
from spot_core.store.identity import RunIdentity

FRAMEWORK = "transformers"
_DDP = {DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}


def check_supported(trainer: Trainer) -> None:
    """Refuse at start what could not be resumed exactly. Raises ConfigError."""
    args, kind = trainer.args, trainer.accelerator.distributed_type
    refuse(
        {
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "FSDP": trainer.is_fsdp_enabled,
            # Under DDP each rank has the whole state; others split it.
            f"{kind.value} in {args.world_size} processes": args.world_size > 1 and kind not in _DDP,
            "a parallelism_config": args.world_size > 1 and trainer.accelerator.parallelism_config is not None,
            "auto_find_batch_size=True, which changes the data order,": args.auto_find_batch_size,
            "enable_jit_checkpoint=True, which saves on SIGTERM too,": args.enable_jit_checkpoint,
        }
    )


def run_identity(trainer: Trainer) -> tuple[RunIdentity, str | None]:
    """The run's identity, and the fingerprint of its frozen base if it has one."""
    args, model = trainer.args, trainer.model
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    base = fingerprint.of_tensors(frozen) if frozen and is_peft(model) else None
    facts: dict[str, str | int] = {
        "model": type(model.get_base_model() if is_peft(model) else model).__name__,
        "trained tensors": f"{len(trained)} tensors, shapes {fingerprint.of_shapes(trained)[:12]}",
        "batch size per device": args.per_device_train_batch_size,
        "gradient accumulation steps": args.gradient_accumulation_steps,
        "world size": args.world_size,
        "training samples": _samples(trainer.train_dataset),
        "data seed": args.seed if args.data_seed is None else args.data_seed,
        "sampling strategy": str(args.train_sampling_strategy),
    }
    if base is not None:
        facts["frozen base weights"] = f"fingerprint {base}"
    return RunIdentity(FRAMEWORK, facts), base


def _samples(dataset: Any) -> int | str:
    try:
        return len(dataset)
    except TypeError:
        return "a stream"


def versions() -> dict[str, str]:
    """Library versions that may change the arithmetic."""
    return {"transformers": transformers.__version__, "peft": peft.__version__}


def device_of(trainer: Trainer) -> torch.device:
    return torch.device(trainer.args.device)
