"""Configuration: one frozen value, checked field by field when it is made.

Precedence of every field: environment (`SPOT_<FIELD>`), then the argument, then the default. `resolve` applies
it, so adapters never read the environment themselves. Secrets are the exception: of storage options the argument
wins over the JSON object in `SPOT_STORAGE_OPTIONS`; signing keys come from `SPOT_SIGNING_KEY` or from a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spot_core.environment import ENV_PREFIX, parse, storage_options_from
from spot_core.errors import ConfigError, check, shown
from spot_core.keys import check_keys, read_keys, signing_keys_from

# Set by no variable of their own name: they hold secrets.
_SECRETS = frozenset({"storage_options", "signing_keys"})

# Of which one at most can be given.
_WAYS_TO_PIN = {"interval_s", "interval_steps"}
# Whose notices can be watched for.
_CLOUDS = ("aws", "gcp", "azure")
# One a second: more is not a rate of losses.
_MOST_PER_HOUR = 3600

# Instance-store mounts of the images people rent, in the order tried.
NVME_MOUNTS = (
    "/opt/dlami/nvme",
    "/mnt/nvme*",
    "/mnt/localssd*",
    "/mnt/disks/local-ssd*",
    "/mnt/local_disk",
    "/local_scratch",
    "/scratch/local",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotConfig:
    """What a session needs to know. Every field can be set by the environment variable `SPOT_<FIELD>`.

    remote: URL (any fsspec scheme, or a path) of the run's folder on storage that outlives the instance; its
        last component names the run.
    local: folder on the fastest disk of this instance, shared by runs. None: chosen by `resolve`.
    interval_s: fixed seconds of useful training time between checkpoints. None: adapted.
    interval_steps: the same in optimizer steps.
    min_interval_s, max_interval_s: bounds of the adapted interval.
    max_overhead: the most of training time that checkpoints may cost, 0 to 1, bound of the adapted interval too.
    prior_per_hour: losses of an instance an hour to expect before any were seen. None: what is usual where this runs.
    fleet: URL of a folder that many runs share, where each leaves what its lives taught. None: this run's own only.
    max_runtime_s: when this process will be ended from outside, in seconds from its start: a checkpoint is durable
        right before. None: unknown.
    keep_local, keep_remote: newest checkpoints kept on each tier.
    keep_every: on the remote, the first checkpoint at or after each multiple of so many steps stays for good,
        besides the newest. None: only the newest stay.
    signals: what announces a preemption, names with commas in between: "SIGTERM,SIGUSR1".
    grace_s: seconds between such a signal and the kill.
    notice: whose metadata service is asked for notices: "auto" for that of the cloud this instance is of, "off", or
        names with commas in between: "aws,gcp,azure".
    notice_lead_s: seconds from a notice that names no time to the end. None: 30 on gcp, else grace_s.
    notice_file: a file that announces a preemption by being there. None: no file does.
    notice_webhook: "127.0.0.1:8099", where the agent takes POST /notice. None: nowhere.
    preempt_exit_code: exit code of a preempted run; never 0 or 137.
    on_preempt: "exit", or "return" for notebooks: training returns to its caller and the process lives on.
    resume: False starts afresh although checkpoints exist.
    start_timeout_s: how long an unreachable remote is tried at start before giving up.
    drain_timeout_s: how long the end of training waits for the remote before it says so and returns.
    trainable_only: leave frozen weights out of the checkpoints, where the trainer's format does not decide (Lightning).
    storage_options: passed to the remote's fsspec filesystem; may hold secrets, never logged or stored. Its
        variable holds a JSON object and counts only where the argument is not given.
    signing_key_file: file of the keys that this run's manifests are signed with, one a line: the first one signs, any
        of them verifies. None: the keys in `SPOT_SIGNING_KEY`, or no signatures.
    signing_keys: the keys themselves, read from that file or by `resolve` from that variable; never logged or stored.
    """

    remote: str
    local: str | None = None
    interval_s: float | None = None
    interval_steps: int | None = None
    min_interval_s: float = 1.0
    max_interval_s: float = 4 * 3600.0
    max_overhead: float = 0.1
    prior_per_hour: float | None = None
    fleet: str | None = None
    max_runtime_s: float | None = None
    keep_local: int = 2
    keep_remote: int = 2
    keep_every: int | None = None
    signals: str = "SIGTERM"
    grace_s: float = 25.0
    notice: str = "auto"
    notice_lead_s: float | None = None
    notice_file: str | None = None
    notice_webhook: str | None = None
    preempt_exit_code: int = 75
    on_preempt: str = "exit"
    resume: bool = True
    start_timeout_s: float = 60.0
    drain_timeout_s: float = 600.0
    trainable_only: bool = True
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    signing_key_file: str | None = None
    signing_keys: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check(isinstance(self.remote, str) and bool(self.remote.strip()), "remote", self.remote, "a URL or a path")
        check(
            self.run not in {"", ".."},
            "remote",
            self.remote,
            "a URL whose last component names the run, s3://bucket/my-run",
        )
        self._check_local()
        seconds = "a number of seconds above 0"
        self._check_interval(seconds)
        for name in ("grace_s", "start_timeout_s", "drain_timeout_s"):
            check(_is_positive(getattr(self, name)), name, getattr(self, name), seconds)
        for name in ("keep_local", "keep_remote"):
            check(_is_whole(getattr(self, name), 1), name, getattr(self, name), "a whole number, 1 or more")
        for name in ("keep_every", "interval_steps"):
            value = getattr(self, name)
            check(value is None or _is_whole(value, 1), name, value, "a whole number of steps, 1 or more, or None")
        check(
            _is_whole(self.preempt_exit_code, 1) and self.preempt_exit_code <= 255 and self.preempt_exit_code != 137,
            "preempt_exit_code",
            self.preempt_exit_code,
            "1 to 255 and not 137: 0 would make a preempted run look finished, 137 like one killed for memory",
        )
        self._check_notice(seconds)
        for name in ("resume", "trainable_only"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        check(_is_plain(self.storage_options), "storage_options", "…", "a mapping of plain (JSON) values for fsspec")
        check_keys(self.signing_keys, "signing_keys", "…")
        if self.signing_key_file is not None and not self.signing_keys:
            object.__setattr__(self, "signing_keys", read_keys(self.signing_key_file))

    def __repr__(self) -> str:
        told = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.repr)
        return shown(f"SpotConfig({', '.join(f'{name}={value!r}' for name, value in told)})")

    def _check_interval(self, seconds: str) -> None:
        for name in ("interval_s", "max_runtime_s"):
            value = getattr(self, name)
            check(value is None or _is_positive(value), name, value, f"{seconds}, or None")
        for name in ("min_interval_s", "max_interval_s"):
            check(_is_positive(getattr(self, name)), name, getattr(self, name), seconds)
        check(
            self.max_interval_s >= self.min_interval_s,
            "max_interval_s",
            self.max_interval_s,
            f"min_interval_s={self.min_interval_s!r} or more",
        )
        check(
            self.interval_s is None or self.interval_steps is None,
            "interval_steps",
            self.interval_steps,
            f"left out, since interval_s={self.interval_s!r} is given too",
        )
        check(
            _is_positive(self.max_overhead) and self.max_overhead <= 1,
            "max_overhead",
            self.max_overhead,
            "a share of the training time above 0, 1 at most",
        )
        check(
            self.prior_per_hour is None
            or (_is_positive(self.prior_per_hour) and self.prior_per_hour <= _MOST_PER_HOUR),
            "prior_per_hour",
            self.prior_per_hour,
            f"losses an hour, above 0 and {_MOST_PER_HOUR} at most, or None",
        )
        check(
            self.fleet is None or (isinstance(self.fleet, str) and bool(run_name(self.fleet))),
            "fleet",
            self.fleet,
            "the URL of a folder, s3://bucket/fleet, or None",
        )

    def _check_notice(self, seconds: str) -> None:
        for signum in _names(self.signals):
            check(
                signum in signal.Signals.__members__ and signum not in {"SIGKILL", "SIGSTOP"},
                "signals",
                self.signals,
                'names of signals that can be caught, with commas in between: "SIGTERM,SIGUSR1"',
            )
        check(
            self.notice in {"auto", "off"} or set(_names(self.notice)) <= set(_CLOUDS),
            "notice",
            self.notice,
            f'"auto", "off", or names out of {", ".join(_CLOUDS)} with commas in between',
        )
        lead_s, file = self.notice_lead_s, self.notice_file
        check(lead_s is None or _is_positive(lead_s), "notice_lead_s", lead_s, f"{seconds}, or None")
        check(
            file is None or (isinstance(file, str) and bool(file)), "notice_file", file, "the path of a file, or None"
        )
        host, _, port = self.notice_webhook.rpartition(":") if isinstance(self.notice_webhook, str) else ("", "", "")
        check(
            self.notice_webhook is None or (bool(host) and port.isdecimal() and 0 < int(port) < 65536),
            "notice_webhook",
            self.notice_webhook,
            "an address and a port, 127.0.0.1:8099, or None",
        )
        check(self.on_preempt in {"exit", "return"}, "on_preempt", self.on_preempt, '"exit" or "return"')

    @property
    def signal_numbers(self) -> tuple[signal.Signals, ...]:
        """The signals that announce a preemption."""
        return tuple(signal.Signals[name] for name in _names(self.signals))

    def _check_local(self) -> None:
        if self.local is None:
            return
        check(isinstance(self.local, (str, Path)) and bool(str(self.local)), "local", self.local, "a folder")
        scheme, separator, path = self.remote.rpartition("://")
        if not separator or scheme in {"file", "local"}:
            check(
                (Path(self.local) / self.run).resolve() != Path(path).resolve(),
                "local",
                self.local,
                f"another folder than the one above the remote {self.remote}: both tiers would be one",
            )

    @property
    def run(self) -> str:
        """Name of the run: the last component of `remote`."""
        return run_name(self.remote)

    @property
    def run_folder(self) -> Path:
        """The run's folder on the local tier."""
        return Path(str(self.local)) / self.run

    @classmethod
    def resolve(
        cls, options: Mapping[str, Any], *, fallback_local: str | Path, environ: Mapping[str, str] | None = None
    ) -> SpotConfig:
        """Merge environment over `options`, choose the local folder, check, and return the configuration.

        fallback_local: used when neither an option, the environment nor a known NVMe mount names one.
        Raises ConfigError naming the field, the value and what is allowed.
        """
        environ = os.environ if environ is None else environ
        unknown = set(options) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown option {', '.join(sorted(unknown))}; known: {', '.join(option_names())}")
        hints = typing.get_type_hints(cls)
        texts = {name: environ.get(ENV_PREFIX + name.upper(), "").strip() for name in option_names()}
        given = {name: parse(name, text, hints[name]) for name, text in texts.items() if text}
        merged = {name: value for name, value in options.items() if value is not None}
        if _WAYS_TO_PIN & given.keys():
            merged = {name: value for name, value in merged.items() if name not in _WAYS_TO_PIN}
        merged |= given
        if "storage_options" not in merged:
            merged["storage_options"] = storage_options_from(environ)
        if "signing_keys" not in merged:
            merged["signing_keys"] = signing_keys_from(environ, merged.get("signing_key_file"))
        if "remote" not in merged:
            raise ConfigError('no remote: pass remote="s3://bucket/my-run" (any fsspec URL or path) or set SPOT_REMOTE')
        for name in ("remote", "fleet"):
            if name in merged:
                merged[name] = absolute_url(str(merged[name]))
        if isinstance(merged.get("notice_file"), str) and merged["notice_file"]:
            merged["notice_file"] = str(Path(merged["notice_file"]).expanduser().absolute())
        merged["local"] = str(Path(merged.get("local") or nvme_mount() or fallback_local).expanduser().absolute())
        return cls(**merged)


def option_names() -> list[str]:
    """Fields that an environment variable sets over the argument: all but those that hold secrets."""
    return [f.name for f in dataclasses.fields(SpotConfig) if f.name not in _SECRETS]


def run_name(url: str) -> str:
    """Name of the run at `url`: its last component; empty if there is none but a bucket."""
    _, _, path = url.rpartition("://")
    parts = [part for part in path.split("/") if part and part != "."]
    # The first component of an object store URL is the bucket, never the run.
    is_path = "://" not in url or url.startswith(("file://", "local://"))
    is_bucket_only = not is_path and len(parts) < 2
    return "" if is_bucket_only or not parts else parts[-1]


def absolute_url(url: str) -> str:
    """The URL, with a plain path made absolute: the agent has another working directory."""
    return url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())


def nvme_mount() -> Path | None:
    """The first known instance-store mount that exists and can be written, or None."""
    for pattern in NVME_MOUNTS:
        for path in sorted(Path("/").glob(pattern.lstrip("/"))):
            if path.is_dir() and os.access(path, os.W_OK):
                return path / "spot"
    return None


def _names(text: object) -> list[str]:
    """What stands between commas; one empty name for what is no text, so that it is refused like a wrong name."""
    return [name.strip() for name in text.split(",")] if isinstance(text, str) else [""]


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_plain(options: object) -> bool:
    """Whether the agent, which gets them as JSON, will see the same options."""
    try:
        return isinstance(options, Mapping) and bool(json.loads(json.dumps(dict(options))) == dict(options))
    except (TypeError, ValueError):
        return False
