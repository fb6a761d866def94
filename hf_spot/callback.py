"""`SpotCallback`: tells the session where the Trainer's steps begin and end. Holds no policy and no storage.

Order inside a step (transformers 5): fetch every micro-batch, on_step_begin, forward and backward,
on_pre_optimizer_step, optimizer, scheduler, global_step + 1, on_step_end, log, evaluate, save. A checkpoint is taken
in on_step_end. Where the step has yet to be logged or evaluated, or ends its epoch, it is deferred until that is
done, so that a resume neither repeats nor skips it.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_spot import resume
from hf_spot.state import LiveState
from spot_core.agent.launch import start_early
from spot_core.config import SpotConfig
from spot_core.data import workers
from spot_core.data.position import DataPosition
from spot_core.data.workers import WorkerDraws
from spot_core.errors import ConfigError
from spot_core.handover import Capture
from spot_core.opening import AnySession
from spot_core.ranks import notes as ranks
from spot_core.snapshot import rng

logger = logging.getLogger(__name__)

_CUT_OFF = "the evaluation of step {} was cut off by a preemption and is not repeated"


class SpotCallback(TrainerCallback):  # type: ignore[misc]
    """Makes `trainer.train()` survive preemption: add it to `callbacks`, run the same command again.

    remote: URL of the run's folder on storage that outlives the instance, `s3://bucket/my-run` (any fsspec URL, or
        a path); the last component names the run. May come from SPOT_REMOTE.
    local: folder on this instance's fastest disk. Default: SPOT_LOCAL, a known NVMe mount, `.spot` in output_dir.
    interval_s, or interval_steps: training between checkpoints; adapted to cost and observed preemptions if None.
    min_interval_s, max_interval_s, max_overhead: bounds of what is adapted; the last is a share of the training time.
    prior_per_hour: losses of the instance an hour to expect before any were seen. fleet: folder where many runs pool
        what their lives taught. max_runtime_s: when this process will be ended from outside, if that is known.
    keep_local, keep_remote: newest checkpoints kept on each tier. keep_every: on the remote, the first one at or
        after each multiple of so many steps stays for good.
    signals: what announces a preemption, "SIGTERM,SIGUSR1". grace_s: seconds from there to the kill.
    notice: clouds asked for notices, "auto" for this one, "off", or "aws,gcp,azure". notice_lead_s: seconds from a
        notice that names no time to the end. notice_file: a file that announces by being there. notice_webhook:
        "127.0.0.1:8099", where POST /notice does.
    preempt_exit_code: how a preempted run exits. on_preempt: "exit", or "return" for notebooks.
    storage_options: for the remote's fsspec file system. signing_key_file: keys that sign this run's manifests, one a
        line; or SPOT_SIGNING_KEY.

    `train(resume_from_checkpoint=False)` starts afresh, an explicit path wins over what is stored.
    Every option can be set by the environment, SPOT_<OPTION>, which wins. Raises ConfigError on a bad option.
    """

    def __init__(
        self,
        remote: str | None = None,
        *,
        local: str | None = None,
        interval_s: float | None = None,
        interval_steps: int | None = None,
        min_interval_s: float = 1.0,
        max_interval_s: float = 14400.0,
        max_overhead: float = 0.1,
        prior_per_hour: float | None = None,
        fleet: str | None = None,
        max_runtime_s: float | None = None,
        keep_local: int = 2,
        keep_remote: int = 2,
        keep_every: int | None = None,
        signals: str = "SIGTERM",
        grace_s: float = 25.0,
        notice: str = "auto",
        notice_lead_s: float | None = None,
        notice_file: str | None = None,
        notice_webhook: str | None = None,
        preempt_exit_code: int = 75,
        on_preempt: str = "exit",
        start_timeout_s: float = 60.0,
        drain_timeout_s: float = 600.0,
        storage_options: Mapping[str, Any] | None = None,
        signing_key_file: str | None = None,
    ) -> None:
        self._options = {
            "remote": remote,
            "local": local,
            "interval_s": interval_s,
            "interval_steps": interval_steps,
            "min_interval_s": min_interval_s,
            "max_interval_s": max_interval_s,
            "max_overhead": max_overhead,
            "prior_per_hour": prior_per_hour,
            "fleet": fleet,
            "max_runtime_s": max_runtime_s,
            "keep_local": keep_local,
            "keep_remote": keep_remote,
            "keep_every": keep_every,
            "signals": signals,
            "grace_s": grace_s,
            "notice": notice,
            "notice_lead_s": notice_lead_s,
            "notice_file": notice_file,
            "notice_webhook": notice_webhook,
            "preempt_exit_code": preempt_exit_code,
            "on_preempt": on_preempt,
            "start_timeout_s": start_timeout_s,
            "drain_timeout_s": drain_timeout_s,
            "storage_options": storage_options,
            "signing_key_file": signing_key_file,
        }
        start_early(self.config(output_dir="."))  # a bad option is an error here, not hours later
        self.is_preempted = False  # `train()` was ended by a preemption, and returned since on_preempt is "return"
        self._session: AnySession | None = None
        self._trainer: Trainer | None = None
        self._live: LiveState | None = None  # set while training is being checkpointed
        self._restored: resume.Restored | None = None
        self._consumed = 0  # micro-batches of this epoch
        resume.install()

    def config(self, output_dir: str) -> SpotConfig:
        """The configuration with the environment applied."""
        return SpotConfig.resolve(self._options, fallback_local=f"{output_dir}/.spot")

    # -- called by the wrapped Trainer.train ---------------------------------------------------------------

    def attach(
        self,
        trainer: Trainer,
        session: AnySession,
        restored: resume.Restored | None,
        signals: Mapping[signal.Signals, Any],
    ) -> None:
        """A `train()` call begins. restored: what the Trainer is about to load, if it is one of ours. signals: to
        watch, with the user's handlers."""
        self._trainer, self._session, self._restored, self._signals = trainer, session, restored, signals
        self._live, self._consumed = None, 0
        self._data, self._draws = DataPosition(), WorkerDraws()
        # Passes over a stream before this one; the Trainer takes a stream for one endless epoch.
        self._passes = restored.own["stream_passes"] - 1 if restored else -1
        self._is_deferred = False
        self._has_new_best = False
        self._is_finished = False

    def broke_off(self, error: Exception) -> None:
        """Training ended with an error. Raises Preempted if a signal is the cause."""
        if self._session is not None:
            self._session.end_if_signalled(error)

    def detach(self) -> None:
        """The `train()` call is over."""
        self._session, self._trainer, self._live = None, None, None

    # -- the Trainer's hooks -------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        session, trainer = self._session, self._trainer
        if session is None or trainer is None:
            if state.is_hyper_param_search:
                return  # trials are short and many: they are not runs
            raise ConfigError(
                "SpotCallback was not told that training starts: this Trainer's train() does not call "
                "transformers.Trainer.train. Call that, or remove the callback."
            )
        live = LiveState(trainer)
        restored = self._restored
        if restored is not None:
            live.check_loaded(restored.view)
            live.restore(restored.own, dict(state.stateful_callbacks))
            restored.discard_view()
        self._is_finished = session.is_finished(state.max_steps)
        if self._is_finished:
            if state.global_step < state.max_steps:
                raise resume.AlreadyFinished  # stopped early, on purpose: the Trainer would train on
            return
        self._data.track(kwargs.get("train_dataloader"))
        self._draws.watch(kwargs.get("train_dataloader"))
        session.begin(notes=self._notes(args), signals=self._signals)
        self._live = live

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._live is None:
            return
        data = self._restored.own["data"] if self._restored is not None else None
        self._consumed = 0
        self._passes += 0 if self._data.is_tracking else 1
        if data is not None and (data.batches == 0 or args.ignore_data_skip):
            rng.restore(data.step)  # before the iterator is made: its own draw belongs to the stream
        if self._is_deferred:
            self._boundary(state)
        self._data.epoch_begins(is_first=int(state.epoch or 0) == 0)
        if data is not None and data.batches > 0 and not args.ignore_data_skip:
            self._consumed = data.batches
            self._data.resume(data, skips_here=False)  # the Trainer drops what was consumed, by index
        self._restored = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._live is None or self._session is None:
            return
        self._session.moves()
        self._data.settle()
        self._session.step_started()
        if self._is_deferred:
            self._boundary(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._consumed += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._live is not None and self._session is not None:
            self._session.before_optimizer_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._live is None or self._session is None:
            return
        self._consumed += 1
        self._data.mark_boundary(self._consumed)
        self._session.step_completed(state.global_step)
        is_last_of_epoch = float(state.epoch or 0.0).is_integer()
        ends = is_last_of_epoch or control.should_epoch_stop or control.should_training_stop
        if control.should_evaluate or control.should_save:
            self._session.pause()
        self._is_deferred = control.should_log or control.should_evaluate or control.should_save or ends
        if not self._is_deferred:
            self._boundary(state)
        if control.should_evaluate:
            self._rest_in_evaluation(state)
        elif not control.should_save and not ends:
            self._session.rests(lambda: self._capture(state))  # while the next step's batches are fetched

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._live is not None and control.should_evaluate:
            self._rest_in_evaluation(state)

    def _rest_in_evaluation(self, state: TrainerState) -> None:
        assert self._session is not None
        content = self._capture(state)
        content = replace(content, notes=(*content.notes, _CUT_OFF.format(state.global_step)))
        self._session.rests(lambda: content)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The best model lives in output_dir, which dies with the instance: commit this very step.
        self._has_new_best = args.load_best_model_at_end and state.best_global_step == state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer's last log comes after the last step and before the best model replaces the final one: the
        # only hook there is in between.
        if self._live is not None and self._session is not None and "train_runtime" in (kwargs.get("logs") or {}):
            self._session.finish(lambda: self._capture(state))
            self._live = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None and not self._is_finished:
            self._session.wait_drained()

    # -- capture -------------------------------------------------------------------------------------------

    def _boundary(self, state: TrainerState) -> None:
        assert self._session is not None
        self._is_deferred = False
        is_required, self._has_new_best = self._has_new_best, False
        self._session.at_boundary(lambda: self._capture(state), is_required=is_required)

    def _capture(self, state: TrainerState) -> Capture:
        assert self._live is not None and self._trainer is not None
        native = f"checkpoint-{state.global_step}"
        is_epoch_boundary = float(state.epoch or 0.0).is_integer()
        if is_epoch_boundary:
            self._data.epoch_ends()
        data = self._data.state(0 if is_epoch_boundary else self._consumed, rng.capture())
        best = state.best_global_step if self._trainer.args.load_best_model_at_end else None
        return Capture(
            step=state.global_step,
            epoch=float(state.epoch or 0.0),
            native=native,
            files=self._live.files(state, native, data, stream_passes=max(0, self._passes)),
            max_steps=state.max_steps,
            notes=self._notes(self._trainer.args),
            pinned_step=best if state.best_model_checkpoint else None,
        )

    def _notes(self, args: TrainingArguments) -> tuple[str, ...]:
        assert self._trainer is not None
        notes = []
        if self._passes >= 0 and self._live is None:
            notes.append("the stream was in a later pass, which the Trainer cannot skip into: it starts over")
        elif args.ignore_data_skip:
            notes.append("ignore_data_skip=True restarts the epoch's data")
        if not self._data.is_tracking:
            notes.append("the data is a stream or has its own batch sampler: exact only if its order is fixed")
        if self._draws.is_seen:
            notes.append(workers.NOTE)
        return (*notes, *ranks.notes(self._trainer.model_wrapped, args.world_size))
