"""One `fit` under protection: tells the session where steps begin and end.

Order of one batch (Lightning 2.5 and 2.6): advance [fetch, on_train_batch_start, forward and backward,
on_before_optimizer_step, optimizer, scheduler, on_train_batch_end], validation, plateau schedulers, log. A checkpoint
is taken right before the next advance, where all of that is done: a resume neither repeats nor skips any of it.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_spot import best_model, trackers, weights
from lightning_spot.metrics import PendingMetrics
from lightning_spot.namespaces import is_own
from lightning_spot.opening import open_fit
from lightning_spot.state import BeforeFetch, LiveState, Position, first_batch, restore_buffers
from lightning_spot.weights import FrozenBase
from spot_core.config import SpotConfig
from spot_core.data.loaders import LoaderPositions
from spot_core.errors import ConfigError, CorruptCheckpointError
from spot_core.handover import Capture, ResumePoint, certain
from spot_core.opening import AnySession
from spot_core.ranks import notes as ranks
from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState

logger = logging.getLogger(__name__)


class ProtectedFit:
    """From `Trainer.fit` called to its return. config: of the run. signals: to watch, with the user's handlers."""

    def __init__(self, trainer: Any, config: SpotConfig, signals: Mapping[signal.Signals, Any]) -> None:
        self._trainer, self._config, self._signals = trainer, config, signals
        self._session: AnySession | None = None
        self._live: LiveState | None = None  # set while training is being checkpointed
        self._base: FrozenBase | None = None
        self._loaders: LoaderPositions | None = None
        self.is_resumed = False
        self._restored: dict[str, Any] | None = None  # until the first batch after a resume
        self._stored_weights: dict[str, torch.Tensor] = {}
        self._pending: PendingMetrics | None = None
        self._step = 0  # optimizer steps at the last batch's end
        self._is_base_verified = False  # after the first step of this life
        self._is_due = False  # a step was made since the last boundary
        self._before_fetch: BeforeFetch | None = None
        self._best_path, self._best_step = "", 0  # the best model so far, and the step it was written at

    # -- start, called by the seams ------------------------------------------------------------------------

    def open(self, *, is_resumed: bool) -> ResumePoint | None:
        """The model is whole: open the session, and return what to resume from."""
        config = self._config if is_resumed else replace(self._config, resume=False)
        self._session, self._base = open_fit(self._trainer, config)
        return self._session.resume

    def restored(self, own: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        """Lightning has read the checkpoint. own: our state beside it; weights: as stored."""
        self._restored, self._stored_weights, self.is_resumed = own, weights, True
        self._best_path, self._best_step = own["best_path"], own["best_step"]

    def loaders_ready(self) -> None:
        """The training loaders exist and are about to be iterated."""
        loop = self._trainer.fit_loop
        combined = loop._combined_loader
        is_sized = all(limit != float("inf") for limit in combined.limits)
        self._loaders = LoaderPositions(
            combined.flattened, cycles=combined._mode == "max_size_cycle", fetches_ahead=not is_sized
        )
        own = self._restored
        if own is None or own["is_end"]:
            return
        self._loaders.resume(own["loaders"])
        for loader in combined.flattened:
            # Lightning does this after workers have begun to fetch.
            for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                set_epoch = getattr(sampler, "set_epoch", None)
                if set_epoch is not None:
                    set_epoch(own["epoch"])

    # -- training, called by the hooks and the seam of the batch -------------------------------------------

    def training_starts(self) -> None:
        """Everything is loaded: check it, put back the rest, begin the session."""
        trainer, session, own = self._trainer, self._session, self._restored
        if session is None or self._loaders is None:
            raise ConfigError("training starts without its data or its checkpoint having been looked for")
        if type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
            raise ConfigError(
                "training_step takes dataloader_iter, so only the module knows how much it has read: SpotCallback "
                "cannot resume it exactly and refuses to start. Take batch and batch_idx."
            )
        live = LiveState(trainer, self._base, own["absent"] if own is not None else ())
        if own is not None:
            self._check_data(own)
            assert session.resume is not None
            if trainer.global_step != session.resume.manifest.step:
                raise CorruptCheckpointError(
                    f"Lightning stands at step {trainer.global_step} after loading the checkpoint of step "
                    f"{session.resume.manifest.step}. Training was not started; nothing was changed. Does a callback "
                    "load another checkpoint when training starts?"
                )
            if not _overrides(trainer.lightning_module, "on_load_checkpoint"):
                live.check_loaded(self._stored_weights)
            self._stored_weights = {}
            self._pending = live.restore(own)
            if own["is_end"] and own["limits"] == self._limits():
                trainer.should_stop = True  # nothing is left to do, although more epochs would fit
                return
        notes = self._notes()
        if own is not None and own["is_end"] and own["is_inside_epoch"]:
            notes += ("training had ended inside an epoch, whose rest is not trained",)
        session.begin(notes=notes, signals=self._signals)
        self._live, self._step = live, trainer.global_step

    def before_batch(self, fetcher: Any) -> None:
        """Between two batches; nothing of the one before is pending."""
        if self._live is None or self._session is None or self._loaders is None:
            return
        if self._restored is not None:
            first_batch(self._trainer, fetcher, self._restored)
            self._restored = None
            self._loaders.settle()
        if self._is_due and not self._is_base_verified:
            self._verify_base(self._session)
        is_boundary = self._is_due and not self._is_too_early()
        if is_boundary:
            self._boundary(self._session)
        if self._loaders.is_stateful_ahead:
            states = self._trainer.fit_loop._combined_loader._state_dicts()
            self._before_fetch = BeforeFetch(states, rng.capture(with_devices=False))
        self._session.step_started()
        if is_boundary and self._trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0:
            self._rest_while_fetching(self._session)

    def _rest_while_fetching(self, session: AnySession) -> None:
        assert self._loaders is not None
        if not self._loaders.fetches_ahead:
            # A loader without workers draws here, in the middle of the rest.
            step = rng.capture(with_devices=False) if self._loaders.fetches_here else None
            session.rests(lambda: self._capture(is_end=False, step=step))

    def batch_fetched(self) -> None:
        """The training step begins."""
        if self._live is not None and self._session is not None:
            self._session.moves()

    def broke_off(self, error: Exception) -> None:
        """Training ended with an error. Raises Preempted if a signal is the cause."""
        if self._session is not None:
            self._session.end_if_signalled(error)

    def _is_too_early(self) -> bool:
        """Whether loaders that keep their own position have given the epoch's first batch, and no state from before."""
        loop = self._trainer.fit_loop.epoch_loop
        is_first = loop.batch_progress.current.ready == 0
        return is_first and self._loaders is not None and self._loaders.is_stateful_ahead

    def weights_may_change(self) -> None:
        """An optimizer is about to step."""
        if self._live is not None and self._session is not None:
            self._session.before_optimizer_step()

    def batch_ends(self) -> None:
        """All but validation and logging is done for a batch; the optimizer stepped, or gradients were accumulated."""
        if self._live is None or self._session is None or self._trainer.global_step == self._step:
            return
        self._step, self._is_due = self._trainer.global_step, True
        self._session.step_completed(self._step)

    def _verify_base(self, session: AnySession) -> None:
        """Not training time: reading a large base takes seconds on a CPU."""
        assert self._live is not None
        session.before_optimizer_step()  # the copying thread looks at the base as well
        session.pause()
        self._live.verify_base()
        self._is_base_verified = True

    def after_batch(self) -> None:
        """The batch's metrics are logged: those of the life before can be added."""
        if self._pending is not None and not self._pending.merge(self._trainer):
            self._pending = None

    def validation_starts(self) -> None:
        """Callbacks may exchange the weights now, and the time is not training time."""
        if self._live is not None and self._session is not None:
            self._session.before_optimizer_step()
            self._session.pause()
            if self._is_due and not self._is_too_early() and weights.rest_in_validation(self._trainer):
                content = certain(lambda: self._capture(is_end=False))
                cut_off = f"the validation of step {content.step} was cut off by a preemption and is not repeated"
                content = replace(content, notes=(*content.notes, cut_off))
                self._session.rests(lambda: content)
            self._live.forget()

    def epoch_ends(self) -> None:
        """The running iteration of the loaders is over."""
        if self._live is not None and self._session is not None and self._loaders is not None:
            self._loaders.epoch_ends()
            self._verify_base(self._session)

    def training_ends(self) -> None:
        """Training is complete, and what other callbacks do at its end is done."""
        if self._live is not None and self._session is not None:
            self._has_new_best()
            self._session.finish(lambda: self._capture(is_end=True))
            self._live = None
            self._session.wait_drained()

    # -- end, called when fit returns ----------------------------------------------------------------------

    def returned(self) -> None:
        """`fit` is over without an error. Lightning skips training that is at its end: then this life only says so."""
        session = self._session
        if session is None or session.has_begun or session.resume is None:
            return
        if self._restored is not None:
            restore_buffers(self._trainer.lightning_module, self._restored)
        manifest = session.resume.manifest
        logger.info("training was complete at step %d already", manifest.step)
        if not session.is_finished(self._limit()):
            # Killed after the last checkpoint and before the record of the end.
            session.begin(signals={})
            session.finish(
                lambda: Capture(
                    step=manifest.step, epoch=manifest.epoch, native=manifest.native, files=[], max_steps=self._limit()
                )
            )
            session.wait_drained()

    @property
    def received_signals(self) -> set[signal.Signals]:
        """What announced a preemption while training lasted."""
        return self._session.signals.received if self._session is not None else set()

    def close(self, error: BaseException | None) -> None:
        """Let go of everything."""
        if self._session is not None:
            self._session.close(error)

    # -- capture -------------------------------------------------------------------------------------------

    def _boundary(self, session: AnySession) -> None:
        self._is_due = False
        # The best model lies in a folder that dies with the instance: commit this very step, whose weights it has.
        is_required = self._has_new_best()
        session.at_boundary(lambda: self._capture(is_end=False), is_required=is_required)
        if not self._is_overlap_safe():
            session.before_optimizer_step()

    def _has_new_best(self) -> bool:
        """Whether ModelCheckpoint has written a better model since it was last asked."""
        best = best_model.best_path(self._trainer)
        is_new = best != self._best_path
        if is_new:
            self._best_path, self._best_step = best, self._step
        # Another rank may see a new best where this one does not: it needs this one's part.
        return is_new or (self._trainer.global_rank > 0 and best_model.was_saved(self._trainer))

    def _is_overlap_safe(self) -> bool:
        """Whether weights change only after `on_before_optimizer_step`."""
        module = self._trainer.lightning_module
        return module.automatic_optimization and not _overrides(module, "optimizer_step")

    def _capture(self, *, is_end: bool, step: RngState | None = None) -> Capture:
        """step: the random state of the boundary, but for devices; None if nothing was drawn since."""
        assert self._live is not None and self._loaders is not None
        trainer = self._trainer
        if is_end:
            self._loaders.epoch_ends()
        batches = 0 if is_end else trainer.fit_loop.epoch_loop.batch_progress.current.ready
        now = rng.capture()
        step = now if step is None else replace(step, devices=now.devices)
        before_fetch = None if is_end else self._before_fetch
        position = Position(batches, is_end, self._loaders.state(batches, step), step, before_fetch)
        native = f"step-{trainer.global_step}.ckpt"
        extra = {
            "facts": self._loaders.facts(),
            "limits": self._limits(),
            "is_inside_epoch": not trainer.fit_loop.epoch_loop._num_ready_batches_reached(),
            "best_path": self._best_path,
            "best_step": self._best_step,
        }
        return Capture(
            step=trainer.global_step,
            epoch=trainer.current_epoch + batches / max(1, trainer.num_training_batches),
            native=native,
            files=self._live.files(native, position, extra),
            max_steps=self._limit(),
            notes=self._notes(),
            loggers=trackers.running(trainer),
            pinned_step=self._best_step if self._best_step not in {0, trainer.global_step} else None,
            is_current=self._live.check(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = list(self._loaders.notes) if self._loaders is not None else []
        notes += ranks.notes(self._trainer.strategy.model, self._trainer.world_size)
        if self._trainer.strategy.root_device.type == "mps":
            notes.append("random numbers drawn on mps are not restored")
        return tuple(notes)

    def _limits(self) -> dict[str, int | None]:
        """What ends training, as configured."""
        loop = self._trainer.fit_loop
        return {"max_epochs": loop.max_epochs, "max_steps": loop.max_steps}

    def _limit(self) -> int | None:
        """Steps that training is to last, if that is known."""
        try:
            steps = self._trainer.estimated_stepping_batches
        except Exception as error:  # Lightning's own class; accumulation that changes with the epoch
            logger.debug("the number of steps is not known: %s", error)
            return None
        return int(steps) if 0 < steps < float("inf") else None

    def _check_data(self, own: dict[str, Any]) -> None:
        """Raise ConfigError if the loaders are not those of the run's earlier lives."""
        assert self._loaders is not None
        now, then = self._loaders.facts(), own["facts"]
        different = [f"{key}: {then.get(key)} then, {now.get(key)} now" for key in now if now[key] != then.get(key)]
        if different:
            raise ConfigError(
                f"the training data is not that of this run's earlier lives: {'; '.join(different)}. The position in "
                "it would mean something else. No checkpoint was written or deleted. Restore the setting, or give "
                "this run its own name: another last component of `remote` (SPOT_REMOTE)."
            )


def _overrides(module: Any, hook: str) -> bool:
    """Whether the module's class has its own version of one of LightningModule's hooks."""
    return not is_own(getattr(type(module), hook))
