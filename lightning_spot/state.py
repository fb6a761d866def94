"""The Trainer's state as a native `.ckpt`, and what a resume puts back beyond what Lightning does.

A checkpoint's folder holds `step-N.ckpt`, which stock `Trainer.fit(ckpt_path=…)` loads, and beside it
`spot_state.pt`: positions of the loaders, random state, metrics of the running epoch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_spot import metrics, weights
from lightning_spot.naming import Naming
from lightning_spot.weights import FrozenBase
from spot_core.errors import ConfigError, CorruptCheckpointError
from spot_core.ranks.team import named
from spot_core.snapshot import rng
from spot_core.snapshot.files import NativeFile, TorchFile, everything
from spot_core.snapshot.loading import load_inert, load_plain
from spot_core.snapshot.rng import RngState
from spot_core.snapshot.trees import same_bits

logger = logging.getLogger(__name__)

SPOT_STATE = "spot_state.pt"
# Parts of a `.ckpt` that may hold objects of any type, and that only `load_from_checkpoint` reads.
HYPER_PARAMETERS = frozenset(
    f"{owner}{part}" for owner in ("", "datamodule_") for part in ("hyper_parameters", "hparams_name", "hparams_type")
)
# Of `spot_state.pt`: made for this checkpoint, or anew where it changes.
_NEVER_CHANGED = frozenset({"absent", "ahead", "loaders", "step", "trained"})
# Of a `.ckpt`: what Lightning decides by, beside weights and optimizer.
_OF_RANK = ("callbacks", "lr_schedulers", "loops")
_NOT_RESUMABLE = "You're resuming from a checkpoint that ended before the epoch ended"


@dataclass(frozen=True, slots=True)
class BeforeFetch:
    """Before the fetch of the batch that is ready: states of the loaders that keep their own, and random state."""

    states: list[Any]
    random: RngState


@dataclass(frozen=True, slots=True)
class Position:
    """Where a checkpoint lies. batches: consumed in this epoch; is_end: all of training is over.

    loaders: their positions. step: random state. before_fetch: where a batch was fetched ahead of it.
    """

    batches: int
    is_end: bool
    loaders: list[dict[str, Any] | None]
    step: RngState
    before_fetch: BeforeFetch | None


class LiveState:
    """What a checkpoint holds and a resume restores. Made when training begins, after Lightning's own loading.

    absent: what the checkpoint that was loaded had been stored without.
    """

    def __init__(self, trainer: Any, base: FrozenBase | None, absent: Collection[str] = ()) -> None:
        self._trainer, self._base = trainer, base
        # Walks over thousands of modules, taken once: they would be most of the time that a checkpoint holds up.
        self._parameters = dict(trainer.lightning_module.named_parameters())
        self._naming = Naming(trainer, base, self._parameters)
        self._metrics = metrics.of_module(trainer.lightning_module)
        self._absent: tuple[set[str], list[str]] = (set(), [])
        if base is not None:
            base.training_starts(loaded=absent)

    def files(self, native: str, position: Position, extra: Mapping[str, Any]) -> list[NativeFile]:
        """The checkpoint's files for this moment between two steps. Cheap: large tensors are named, small ones cloned.

        They may name too much or too little, as the function `check` says. Raises ConfigError if the module leaves
        trained tensors out of its checkpoints.
        """
        trainer, names = self._trainer, self._naming.names()
        live = names.live
        checkpoint = self._dump(live)
        weights.trim(checkpoint, names.frozen)
        if position.before_fetch is not None:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = position.before_fetch.states
        absent = self._checked(live.keys() - checkpoint[weights.WEIGHTS[0]].keys())
        own = {
            "format": 1,
            "batches": position.batches,
            "is_end": position.is_end,
            "loaders": position.loaders,
            "step": rng.to_portable(position.step),
            "ahead": rng.to_portable(position.before_fetch.random) if position.before_fetch is not None else None,
            "absent": absent,
            "epoch": trainer.fit_loop.epoch_progress.current.processed,
            "accumulate": trainer.accumulate_grad_batches,
            "should_stop": trainer.should_stop and not position.is_end,
            "metrics": metrics.capture(trainer, self._metrics),
            "gradients": self._gradients(),
            "trained": names.trained,
            **(self._of_rank(checkpoint) if trainer.global_rank else {}),
            **extra,
        }
        places = {place for place in weights.WEIGHTS if place in checkpoint and names.only_stable(checkpoint[place])}
        return [
            TorchFile(
                path=native,
                tree=checkpoint,
                is_volatile=lambda tensor: tensor.data_ptr() not in names.stable,
                stable_keys=frozenset({"optimizer_states", *places}),
                inert_keys=HYPER_PARAMETERS,
            ),
            TorchFile(path=SPOT_STATE, tree=own, is_volatile=everything, stable_keys=_NEVER_CHANGED, is_part=True),
        ]

    def check(self) -> Callable[[], bool]:
        """What tells whether the files named last hold what they should. Any thread, before an optimizer steps."""
        return self._naming.check()

    def forget(self) -> None:
        """Callbacks may have changed, frozen or exchanged anything: an epoch has ended, or a validation begins."""
        self._naming.forget()

    def _of_rank(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """What another rank has beside the first one's `.ckpt`: metrics need not be the same on all of them."""
        module = self._trainer.lightning_module
        return {
            "trainer": {key: checkpoint[key] for key in _OF_RANK if key in checkpoint},
            "buffers": dict(module.named_buffers()),
        }

    def verify_base(self) -> None:
        """Read the frozen base again: what training changes after all belongs to the checkpoints."""
        if self._base is not None:
            self._base.verify()
        self.forget()

    def _dump(self, live: dict[str, Any]) -> dict[str, Any]:
        """Lightning's checkpoint, of a module whose state dict is known already."""
        connector = self._trainer._checkpoint_connector
        connector._get_lightning_module_state_dict = lambda: dict(live)
        try:
            checkpoint: dict[str, Any] = connector.dump_checkpoint(False)
        finally:
            del connector._get_lightning_module_state_dict
        return checkpoint

    def _checked(self, absent: set[str]) -> list[str]:
        """The names in order. Raises ConfigError if one of them is trained."""
        known, names = self._absent
        if absent == known:
            return names
        names = sorted(absent)
        trained = set(self._naming.trained())
        lost = [name for name in names if name in trained]
        if lost:
            raise ConfigError(
                f"{len(lost)} trained tensors are not part of the checkpoint: {', '.join(lost[:5])}. A resume would "
                "lose them. Does on_save_checkpoint remove them?"
            )
        self._absent = absent, names
        return names

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Gradients that live across steps: under manual optimization one optimizer may be in mid-accumulation."""
        if self._trainer.lightning_module.automatic_optimization:
            return {}
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}

    def check_loaded(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Compare live weights with those of the checkpoint, bit for bit. Raises CorruptCheckpointError naming them."""
        live = self._naming.state_dict()
        wrong = [key for key, tensor in stored.items() if key not in live or not _is_same(live[key], tensor)]
        if wrong:
            raise CorruptCheckpointError(
                f"after loading, {len(wrong)} tensors of the model are not those of the checkpoint: "
                f"{', '.join(wrong[:5])}. Training was not started; nothing was changed. Does a hook or a callback "
                "change the weights when training starts?"
            )

    def restore(self, own: Mapping[str, Any]) -> metrics.PendingMetrics:
        """Put back, when training starts, what Lightning does not; the returned metrics need the first batches."""
        trainer = self._trainer
        trainer.accumulate_grad_batches = own["accumulate"]
        trainer.should_stop = own["should_stop"]  # asked for, and refused until min_steps
        pending = metrics.PendingMetrics(own["metrics"])
        pending.restore(trainer, self._metrics)
        trained = set(own["trained"])
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in trained)  # a callback may have unfrozen it in the middle of training
            if name in own["gradients"]:
                parameter.grad = own["gradients"][name].to(parameter.device)
        restore_buffers(trainer.lightning_module, own)
        loop = trainer.fit_loop
        if loop._combined_loader_states_to_load and loop._combined_loader is not None:
            # Lightning loads them when it sets the data up, which `estimated_stepping_batches` had it do too early.
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)
        warnings.filterwarnings("ignore", message=_NOT_RESUMABLE)  # it is resumable now
        return pending


def restore_buffers(module: torch.nn.Module, own: Mapping[str, Any]) -> None:
    """Put back what another rank than the first has in its buffers: DDP gives it the first one's."""
    for name, buffer in module.named_buffers():
        if name in own.get("buffers", ()):
            buffer.copy_(own["buffers"][name])


def begin_epoch(checkpoint: dict[str, Any]) -> None:
    """Training that had ended goes on with a whole epoch, also where it had ended inside one.

    Lightning would begin at the old place in an epoch of another order.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False


def first_batch(trainer: Any, fetcher: Any, own: Mapping[str, Any]) -> None:
    """Right before the first batch after a resume: from here on Lightning goes on as if it had never stopped.

    Its loops take a restart for the moment of a save of their own, and would skip the next validation, the plateau
    schedulers of this epoch, or count a step twice. This checkpoint was taken where nothing is pending.
    """
    step = rng.from_portable(own["step"])
    if own["is_end"]:
        # The next epoch's iterator was made too early: its draw belongs to the stream of random numbers.
        rng.restore(step)
        iter(fetcher)
    else:
        _start_validation_workers(trainer)
        if own["ahead"] is not None:
            _fetch_again(trainer, fetcher, own)
        rng.restore(step)
    loop = trainer.fit_loop
    for each in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        each._restarting = False


def _fetch_again(trainer: Any, fetcher: Any, own: Mapping[str, Any]) -> None:
    """The batch that was ready. Lightning fetched it in the random state that making an iterator left."""
    combined = trainer.fit_loop._combined_loader
    combined._load_state_dicts(own["loader_states"])
    fetcher.iterator = iter(combined)
    rng.restore(rng.from_portable(own["ahead"]))
    fetcher.batches = [next(fetcher.iterator)]


def _start_validation_workers(trainer: Any) -> None:
    """Persistent workers draw their seed once, in an uninterrupted run before this point: by the sanity check."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    if combined is None or not trainer.num_sanity_val_steps:
        return
    for loader in combined.flattened:
        if getattr(loader, "persistent_workers", False):
            iter(loader)


def read_native(path: Path) -> dict[str, Any]:
    """The content of a `.ckpt`, without running anything that it names: hyper-parameters of other types are left out.

    Lightning would unpickle it or refuse them, depending on its version.
    """
    return load_inert(path, inert_keys=HYPER_PARAMETERS)


def read_own_state(folder: Path, trainer: Any) -> dict[str, Any]:
    """The content of this rank's `spot_state.pt`."""
    return load_plain(folder / named(SPOT_STATE, trainer.global_rank, size=trainer.world_size))


def _is_same(live: Any, stored: Any) -> bool:
    if not isinstance(live, torch.Tensor) or not isinstance(stored, torch.Tensor):
        return True  # extra state of a module, which is its own affair
    return same_bits(live, stored)
