"""What makes two lives of a Lightning script the same run, and which Trainers cannot be captured."""

from __future__ import annotations

import sys
from typing import Any

from lightning_spot.namespaces import is_a, is_own
from lightning_spot.weights import FrozenBase
from spot_core.handover import refuse
from spot_core.snapshot import fingerprint
from spot_core.store.identity import RunIdentity

FRAMEWORK = "lightning"


def check_supported(trainer: Any) -> None:
    """Refuse at start what could not be resumed exactly. Raises ConfigError."""
    strategy = trainer.strategy
    # Subclasses shard the state or keep it elsewhere: DeepSpeed's derives from DDP's.
    is_known = type(strategy).__name__ in {"SingleDeviceStrategy", "DDPStrategy"} and is_own(type(strategy))
    launcher = type(strategy.launcher).__name__
    refuse(
        {
            f"{type(strategy).__name__}, whose state is not in one place,": not is_known,
            f"{launcher}, which trains in another process,": launcher in {"_MultiProcessingLauncher", "_XLALauncher"},
            "BatchSizeFinder, which changes the data order (search first, then set what it found),": any(
                is_a(callback, "callbacks.BatchSizeFinder") for callback in trainer.callbacks
            ),
            "StochasticWeightAveraging, whose schedule Lightning does not restore (WeightAveraging works),": any(
                is_a(callback, "callbacks.StochasticWeightAveraging") for callback in trainer.callbacks
            ),
            f"devices of type {strategy.root_device.type}": strategy.root_device.type not in {"cpu", "cuda", "mps"},
        }
    )


def run_identity(trainer: Any, base: FrozenBase | None) -> RunIdentity:
    """The run's identity, known before any data is loaded. base: the weights that checkpoints leave out."""
    module = trainer.lightning_module
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    facts: dict[str, str | int] = {
        "model": type(module).__name__,
        "trained tensors": f"{len(trained)} tensors, shapes {fingerprint.of_shapes(trained)[:12]}",
        "gradient accumulation steps": trainer.accumulate_grad_batches,
        "world size": trainer.world_size,
    }
    if base is not None:
        facts["frozen base weights (part of the checkpoints with trainable_only=False)"] = (
            f"fingerprint {base.fingerprint}"
        )
    return RunIdentity(FRAMEWORK, facts)


def versions(trainer: Any) -> dict[str, str]:
    """Library versions that may change the arithmetic or the order of things."""
    found = {"lightning": sys.modules[_namespace_of(trainer)].__version__}
    for name in ("peft", "transformers", "torchdata"):
        if name in sys.modules:
            found[name] = sys.modules[name].__version__
    return found


def _namespace_of(trainer: Any) -> str:
    """The package that defines the Trainer's nearest ancestor of Lightning's own."""
    names = [cls.__module__.split(".")[0] for cls in type(trainer).__mro__]
    return next(name for name in names if name in {"lightning", "pytorch_lightning"})
