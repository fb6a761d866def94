"""Configuration: one frozen value, checked field by field when it is made.

Precedence of every field: environment (`SPOT_<FIELD>`), then the argument, then the default. `resolve` applies
it, so adapters never read the environment themselves. Secrets are the exception: of storage options the argument
wins over the JSON object in `SPOT_STORAGE_OPTIONS`; signing keys come from `SPOT_SIGNING_KEY` or from a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spot_core.errors import ConfigError

ENV_PREFIX = "SPOT_"
STORAGE_OPTIONS = "SPOT_STORAGE_OPTIONS"
SIGNING_KEY = "SPOT_SIGNING_KEY"
# Set by no variable of their own name: they hold secrets.
_SECRETS = frozenset({"storage_options", "signing_keys"})

_SHORTEST_KEY_BYTES = 16
_LONGEST_KEY_FILE_BYTES = 64 << 10

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
    keep_local, keep_remote: newest checkpoints kept on each tier.
    keep_every: on the remote, the first checkpoint at or after each multiple of so many steps stays for good,
        besides the newest. None: only the newest stay.
    grace_s: seconds between the termination signal and the kill.
    preempt_exit_code: exit code of a preempted run; never 0 or 137.
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
    keep_local: int = 2
    keep_remote: int = 2
    keep_every: int | None = None
    grace_s: float = 25.0
    preempt_exit_code: int = 75
    resume: bool = True
    start_timeout_s: float = 60.0
    drain_timeout_s: float = 600.0
    trainable_only: bool = True
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    signing_key_file: str | None = None
    signing_keys: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _check(isinstance(self.remote, str) and bool(self.remote.strip()), "remote", self.remote, "a URL or a path")
        _check(
            self.run not in {"", ".."},
            "remote",
            self.remote,
            "a URL whose last component names the run, s3://bucket/my-run",
        )
        self._check_local()
        seconds = "a number of seconds above 0"
        _check(
            self.interval_s is None or _is_positive(self.interval_s),
            "interval_s",
            self.interval_s,
            f"{seconds}, or None",
        )
        for name in ("grace_s", "start_timeout_s", "drain_timeout_s"):
            _check(_is_positive(getattr(self, name)), name, getattr(self, name), seconds)
        for name in ("keep_local", "keep_remote"):
            _check(_is_whole(getattr(self, name), 1), name, getattr(self, name), "a whole number, 1 or more")
        _check(
            self.keep_every is None or _is_whole(self.keep_every, 1),
            "keep_every",
            self.keep_every,
            "a whole number of steps, 1 or more, or None",
        )
        _check(
            _is_whole(self.preempt_exit_code, 1) and self.preempt_exit_code <= 255 and self.preempt_exit_code != 137,
            "preempt_exit_code",
            self.preempt_exit_code,
            "1 to 255 and not 137: 0 would make a preempted run look finished, 137 like one killed for memory",
        )
        for name in ("resume", "trainable_only"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        _check(_is_plain(self.storage_options), "storage_options", "…", "a mapping of plain (JSON) values for fsspec")
        _check_keys(self.signing_keys, "signing_keys", "…")
        if self.signing_key_file is not None and not self.signing_keys:
            object.__setattr__(self, "signing_keys", _read_keys(self.signing_key_file))

    def __repr__(self) -> str:
        told = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.repr)
        return shown(f"SpotConfig({', '.join(f'{name}={value!r}' for name, value in told)})")

    def _check_local(self) -> None:
        if self.local is None:
            return
        _check(isinstance(self.local, (str, Path)) and bool(str(self.local)), "local", self.local, "a folder")
        scheme, separator, path = self.remote.rpartition("://")
        if not separator or scheme in {"file", "local"}:
            _check(
                (Path(self.local) / self.run).resolve() != Path(path).resolve(),
                "local",
                self.local,
                f"another folder than the one above the remote {self.remote}: both tiers would be one",
            )

    @property
    def run(self) -> str:
        """Name of the run: the last component of `remote`."""
        return run_name(self.remote)

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
        merged = {name: value for name, value in options.items() if value is not None}
        hints = typing.get_type_hints(cls)
        for name in option_names():
            text = environ.get(ENV_PREFIX + name.upper(), "").strip()
            if text:
                merged[name] = _parse(name, text, hints[name])
        if "storage_options" not in merged:
            merged["storage_options"] = storage_options_from(environ)
        if "signing_keys" not in merged:
            merged["signing_keys"] = signing_keys_from(environ, merged.get("signing_key_file"))
        if "remote" not in merged:
            raise ConfigError('no remote: pass remote="s3://bucket/my-run" (any fsspec URL or path) or set SPOT_REMOTE')
        merged["remote"] = absolute_url(str(merged["remote"]))
        merged["local"] = str(Path(merged.get("local") or nvme_mount() or fallback_local).expanduser().absolute())
        return cls(**merged)


def option_names() -> list[str]:
    """Fields that an environment variable sets over the argument: all but those that hold secrets."""
    return [f.name for f in dataclasses.fields(SpotConfig) if f.name not in _SECRETS]


def storage_options_from(environ: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object in `SPOT_STORAGE_OPTIONS`, empty if it is not set.

    Raises ConfigError, which never repeats the value: it may hold secrets.
    """
    text = environ.get(STORAGE_OPTIONS, "").strip()
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(
            f'{STORAGE_OPTIONS} is not valid: it must be a JSON object, such as {{"key": "…", "secret": "…"}}'
        )
    return options


def signing_keys_from(environ: Mapping[str, str], file: str | None) -> tuple[str, ...]:
    """The keys of a file or of `SPOT_SIGNING_KEY`, one a line; empty if neither is given.

    Raises ConfigError, which never repeats a key: both are given, the variable is empty, a key is too short.
    """
    text = environ.get(SIGNING_KEY)
    if text is None:
        return _read_keys(file) if file is not None else ()
    if file is not None:
        raise ConfigError(
            f"{SIGNING_KEY} and signing_key_file={file!r} are both given: which of them signs? Keep one. To change "
            "the key write the new one and the old one to one file, the new one first"
        )
    keys = _lines(text)
    # An empty one is a secret that did not arrive, and must not turn signatures off.
    _check_keys(keys, SIGNING_KEY, "…", least=1)
    return keys


def describe_key_file(file: str | None) -> str | None:
    """What a user should know about who can read the key file, None if nothing."""
    try:
        mode = Path(file).expanduser().stat().st_mode if file is not None else 0
    except OSError:
        return None
    if not mode & (stat.S_IRGRP | stat.S_IROTH):
        return None
    return (
        f"the signing key file {file} can be read by other users of this machine (mode {stat.S_IMODE(mode):04o}): "
        "who reads it can sign. chmod 600 it"
    )


def run_name(url: str) -> str:
    """Name of the run at `url`: its last component; empty if there is none but a bucket."""
    _, _, path = url.rpartition("://")
    parts = [part for part in path.split("/") if part and part != "."]
    # The first component of an object store URL is the bucket, never the run.
    is_path = "://" not in url or url.startswith(("file://", "local://"))
    is_bucket_only = not is_path and len(parts) < 2
    return "" if is_bucket_only or not parts else parts[-1]


def shown(text: str) -> str:
    """A URL, or a text with URLs, without the passwords in them: for logs, errors and records."""
    return _PASSWORD.sub("://…@", text)


# `user:password@` before the host. `container@account` of Azure has no colon, and stays.
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s]*@")


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


def _read_keys(file: object) -> tuple[str, ...]:
    allowed = f"a readable file with one key of {_SHORTEST_KEY_BYTES} bytes or more a line"
    _check(isinstance(file, (str, Path)) and bool(str(file)), "signing_key_file", file, allowed)
    try:
        with open(Path(str(file)).expanduser(), "rb") as opened:
            data = opened.read(_LONGEST_KEY_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"signing_key_file={file!r} is not valid: it must be {allowed} ({reason})") from None
    _check(len(data) <= _LONGEST_KEY_FILE_BYTES, "signing_key_file", file, f"{allowed}, and below 64 KiB")
    keys = _lines(text)
    _check_keys(keys, "signing_key_file", file, least=1)
    return keys


def _lines(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.splitlines())))


def _check_keys(keys: object, name: str, value: object, *, least: int = 0) -> None:
    allowed = f"keys of {_SHORTEST_KEY_BYTES} bytes or more, one a line, such as openssl rand -hex 32 prints"
    is_plain = isinstance(keys, tuple) and all(isinstance(key, str) for key in keys)
    _check(is_plain and all(len(key.encode()) >= _SHORTEST_KEY_BYTES for key in keys), name, value, allowed)  # type: ignore[attr-defined]
    _check(len(keys) >= least, name, value, f"{allowed}: there is none")  # type: ignore[arg-type]


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(shown(f"{name}={value!r} is not valid: it must be {allowed}"))


def _parse(name: str, text: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    variable = ENV_PREFIX + name.upper()
    if bool in kinds:
        lowered = text.strip().lower()
        if lowered not in {"1", "true", "yes", "on", "0", "false", "no", "off"}:
            raise ConfigError(f"{variable}={text!r} is not valid: it must be true or false")
        return lowered in {"1", "true", "yes", "on"}
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise ConfigError(f"{variable}={text!r} is not valid: it must be {_words(kind)}") from None
    return text


def _words(kind: type) -> str:
    return "a whole number" if kind is int else "a number"
