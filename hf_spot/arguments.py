"""`SpotArguments`: the callback's options for `HfArgumentParser`, so that one YAML line turns it on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from transformers import TrainerCallback

from hf_spot.callback import SpotCallback


@dataclass
class SpotArguments:
    """Flat, with the names of `SpotCallback` behind `spot_`. Without a remote nothing is added."""

    spot_remote: str | None = field(
        default=None, metadata={"help": "URL of the run's folder, s3://bucket/my-run; turns preemption safety on"}
    )
    spot_local: str | None = field(default=None, metadata={"help": "Folder on the fastest disk of this instance"})
    spot_interval_s: float | None = field(
        default=None, metadata={"help": "Seconds of training between checkpoints; adapted to the preemptions if unset"}
    )
    spot_interval_steps: int | None = field(default=None, metadata={"help": "The same in optimizer steps"})
    spot_min_interval_s: float = field(default=1.0, metadata={"help": "Least seconds of the adapted interval"})
    spot_max_interval_s: float = field(default=14400.0, metadata={"help": "Most seconds of the adapted interval"})
    spot_max_overhead: float = field(
        default=0.1, metadata={"help": "The most of the training time that checkpoints may cost, 0 to 1"}
    )
    spot_prior_per_hour: float | None = field(
        default=None, metadata={"help": "Losses of the instance an hour to expect before any were seen"}
    )
    spot_fleet: str | None = field(
        default=None, metadata={"help": "URL of a folder where many runs pool what their lives taught"}
    )
    spot_max_runtime_s: float | None = field(
        default=None, metadata={"help": "When this process will be ended from outside, in seconds from its start"}
    )
    spot_keep_local: int = field(default=2, metadata={"help": "Checkpoints kept on this instance"})
    spot_keep_remote: int = field(default=2, metadata={"help": "Checkpoints kept on the remote"})
    spot_keep_every: int | None = field(
        default=None, metadata={"help": "Steps; the first checkpoint at or after each multiple stays on the remote"}
    )
    spot_signals: str = field(
        default="SIGTERM", metadata={"help": "What announces a preemption, names with commas: SIGTERM,SIGUSR1"}
    )
    spot_grace_s: float = field(default=25.0, metadata={"help": "Seconds between such a signal and the kill"})
    spot_notice: str = field(
        default="auto", metadata={"help": "Clouds asked for notices: auto for this one, off, or aws,gcp,azure"}
    )
    spot_notice_lead_s: float | None = field(
        default=None, metadata={"help": "Seconds from a notice that names no time to the end"}
    )
    spot_notice_file: str | None = field(
        default=None, metadata={"help": "A file that announces a preemption by being there"}
    )
    spot_notice_webhook: str | None = field(
        default=None, metadata={"help": "Address and port where POST /notice announces one, 127.0.0.1:8099"}
    )
    spot_preempt_exit_code: int = field(default=75, metadata={"help": "Exit code of a preempted run"})
    spot_on_preempt: str = field(default="exit", metadata={"help": "What a preempted run does: exit, or return"})
    spot_signing_key_file: str | None = field(
        default=None, metadata={"help": "File with the keys that sign this run's manifests, one a line, newest first"}
    )

    def callbacks(self) -> list[TrainerCallback]:
        """What to pass as `Trainer(callbacks=…)`: the callback if a remote is set here or in SPOT_REMOTE."""
        if not self.spot_remote and not os.environ.get("SPOT_REMOTE"):
            return []
        return [
            SpotCallback(
                self.spot_remote or None,
                local=self.spot_local,
                interval_s=self.spot_interval_s,
                interval_steps=self.spot_interval_steps,
                min_interval_s=self.spot_min_interval_s,
                max_interval_s=self.spot_max_interval_s,
                max_overhead=self.spot_max_overhead,
                prior_per_hour=self.spot_prior_per_hour,
                fleet=self.spot_fleet,
                max_runtime_s=self.spot_max_runtime_s,
                keep_local=self.spot_keep_local,
                keep_remote=self.spot_keep_remote,
                keep_every=self.spot_keep_every,
                signals=self.spot_signals,
                grace_s=self.spot_grace_s,
                notice=self.spot_notice,
                notice_lead_s=self.spot_notice_lead_s,
                notice_file=self.spot_notice_file,
                notice_webhook=self.spot_notice_webhook,
                preempt_exit_code=self.spot_preempt_exit_code,
                on_preempt=self.spot_on_preempt,
                signing_key_file=self.spot_signing_key_file,
            )
        ]
