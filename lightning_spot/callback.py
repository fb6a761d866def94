"""`SpotCallback`: the options, and Lightning's hooks passed on to the `fit` that is protected.

Holds no policy and no storage, and draws no random number. Outside `fit` nothing is read, written or changed: an agent
that is started early waits to be asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_spot.namespaces import callback_base
from lightning_spot.protected_fit import ProtectedFit
from lightning_spot.resume import install
from spot_core.agent.launch import start_early
from spot_core.config import SpotConfig
from spot_core.errors import ConfigError

_Callback: Any = callback_base()


class SpotCallback(_Callback):  # type: ignore[misc]
    """Makes `trainer.fit()` survive preemption: add it to `callbacks`, run the same command again.

    An explicit `fit(ckpt_path=…)` wins over what is stored. Every option can be set by the environment,
    SPOT_<OPTION>, which wins (but for storage_options). Raises ConfigError on a bad option.

    Args:
        remote: URL of the run's folder on storage that outlives the instance, s3://bucket/my-run (any fsspec URL, or
            a path); the last component names the run. May come from SPOT_REMOTE.
        local: Folder on this instance's fastest disk. Default: SPOT_LOCAL, a known NVMe mount, .spot in
            default_root_dir.
        interval_s: Seconds of training between checkpoints; adapted to cost and observed preemptions if not set.
        interval_steps: The same in optimizer steps.
        min_interval_s: Least seconds of the adapted interval.
        max_interval_s: Most seconds of the adapted interval.
        max_overhead: The most of the training time that checkpoints may cost, 0 to 1.
        prior_per_hour: Losses of the instance an hour to expect before any were seen.
        fleet: URL of a folder where many runs pool what their lives taught.
        max_runtime_s: When this process will be ended from outside, in seconds from its start.
        keep_local: Checkpoints kept on this instance.
        keep_remote: Checkpoints kept on the remote.
        keep_every: Steps; the first checkpoint at or after each multiple stays on the remote for good.
        signals: What announces a preemption, names with commas in between, SIGTERM,SIGUSR1.
        grace_s: Seconds between such a signal and the kill.
        notice: Clouds asked for notices, auto for the one this runs on, off, or names, aws,gcp,azure.
        notice_lead_s: Seconds from a notice that names no time to the end.
        notice_file: A file that announces a preemption by being there.
        notice_webhook: Address and port where POST /notice announces one, 127.0.0.1:8099.
        preempt_exit_code: How a preempted run exits.
        on_preempt: What a preempted run does, exit, or return for notebooks.
        resume: False starts afresh although checkpoints exist.
        start_timeout_s: Seconds for which an unreachable remote is tried at start.
        drain_timeout_s: Seconds for which the end of training waits for the remote.
        storage_options: For the remote's fsspec file system.
        signing_key_file: Keys that sign this run's manifests, one a line; or SPOT_SIGNING_KEY.
        trainable_only: Leave frozen weights out of the checkpoints; the base must be the same at each start.
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
        resume: bool = True,
        start_timeout_s: float = 60.0,
        drain_timeout_s: float = 600.0,
        storage_options: Mapping[str, Any] | None = None,
        signing_key_file: str | None = None,
        trainable_only: bool = True,
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
            "resume": resume,
            "start_timeout_s": start_timeout_s,
            "drain_timeout_s": drain_timeout_s,
            "storage_options": storage_options,
            "signing_key_file": signing_key_file,
            "trainable_only": trainable_only,
        }
        self.is_from_environment = False  # added by the entry point, not by the script
        self.suffix = ""  # of the run's name, where the environment names one run for several Trainers
        self.protected: ProtectedFit | None = None  # while `fit` runs
        self.is_preempted = False  # `fit` was ended by a preemption, and returned since on_preempt is "return"
        install()
        try:
            start_early(self.config("."))  # a bad option is an error here, not hours later
        except ConfigError:
            if not _is_built_by_cli():
                raise

    def config(self, default_root_dir: str) -> SpotConfig:
        """The configuration with the environment applied."""
        config = SpotConfig.resolve(self._options, fallback_local=f"{default_root_dir}/.spot")
        return replace(config, remote=f"{config.remote}{self.suffix}")

    # -- Lightning's hooks ---------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.protected is not None:
            # Callbacks of the module may have been put behind this one.
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.protected is not None:
            self.protected.training_starts()
        elif not trainer.fast_dev_run:
            raise ConfigError(
                "SpotCallback was not told that training starts. Give it to the Trainer, not to configure_callbacks, "
                "and train with trainer.fit()."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.protected is not None:
            self.protected.batch_fetched()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.protected is not None:
            self.protected.weights_may_change()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.protected is not None:
            self.protected.batch_ends()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self.protected is not None:
            self.protected.validation_starts()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.protected is not None:
            self.protected.epoch_ends()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.protected is not None:
            self.protected.training_ends()


def _is_built_by_cli() -> bool:
    """Whether LightningCLI makes the callback. It would bury an error under all options, secrets too; fit raises it."""
    return any(frame.frame.f_globals.get("__name__", "").startswith("jsonargparse.") for frame in inspect.stack(0))
