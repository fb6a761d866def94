"""The trainer's side of the agent: start it, wait until the run is open, restart it if it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from spot_core import errors
from spot_core.agent.lives import Life
from spot_core.cadence.hazard import Evidence
from spot_core.cadence.record import evidence_from_json
from spot_core.config import SpotConfig
from spot_core.environment import STORAGE_OPTIONS
from spot_core.errors import AgentError, SpotError
from spot_core.keys import SIGNING_KEY, describe_key_file
from spot_core.notice.instance import Instance
from spot_core.progress import byte_bar
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.signing import Signing

logger = logging.getLogger(__name__)

# Each agent that is killed before it has a life costs a start: what kills every one of them must be told.
_RESTARTS_AT_START = 2


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What the agent found. incarnation is None for a finished run, which was to last max_steps; restored is on the
    local tier, verified. lives: before this one, oldest first. instance: where this one runs. fleet: what other
    runs have seen there."""

    incarnation: int | None
    restored: CheckpointName | None
    source: str | None
    pin: CheckpointName | None
    lives: list[Life]
    max_steps: int | None
    instance: Instance
    fleet: Evidence


class EarlyAgent:
    """An agent that loads what it will need while the trainer still finds out what to ask it: a base is being read.

    Ends with its block unless a session has taken it.
    """

    def __init__(self, config: SpotConfig) -> None:
        self._process: subprocess.Popen[str] | None = _start_process(config)

    def take(self) -> subprocess.Popen[str] | None:
        """The process, which is the caller's from here on; None if it was taken."""
        process, self._process = self._process, None
        return process

    def __enter__(self) -> EarlyAgent:
        return self

    def __exit__(self, *_: object) -> None:
        process = self.take()
        if process is not None:
            process.kill()  # it was asked for nothing, and has done nothing
            _release(process)
            process.wait()


class AgentClient:
    """Owns the agent process of one life. Used by the trainer's main thread at start, its writer thread later."""

    def __init__(self, config: SpotConfig, identity: RunIdentity, early: EarlyAgent | None = None) -> None:
        assert config.local is not None
        self._early = early
        self._config = config
        self._identity = identity
        self.started_unix_s, self.began = time.time(), time.monotonic()
        self._process: subprocess.Popen[str] | None = None
        self._restored: str | None = None
        self.incarnation: int | None = None
        self.overflow = Overflow(None)

    @property
    def run_folder(self) -> Path:
        """The run's folder on the local tier."""
        return Path(str(self._config.local)) / self._config.run

    @property
    def tier(self) -> PosixTier:
        """The local tier, with the run's keys."""
        return PosixTier(self.run_folder, Signing(self._config.run, self._config.signing_keys))

    @property
    def near_tiers(self) -> list[PosixTier]:
        """Where a restored checkpoint may be, in the order in which it is looked for."""
        return [tier for tier in (self.tier, self.overflow.tier) if tier is not None]

    def open(self) -> OpenedRun:
        """Start the agent and wait until it has opened the run; shows a progress bar while it restores.

        An agent that is killed meanwhile is started again: what it had claimed is superseded by the next claim.
        Raises what the agent raised: ConfigError, TierError, TierDeniedError, CorruptCheckpointError, AgentError.
        """
        if (warning := describe_key_file(self._config.signing_key_file)) is not None:
            logger.warning("%s", warning)
        event = self._until_not_killed(lambda: self._start(None))
        self.incarnation, self._restored = event["incarnation"], event["restored"]
        return OpenedRun(
            incarnation=event["incarnation"],
            restored=CheckpointName.parse(event["restored"] or ""),
            source=event["source"],
            pin=CheckpointName.parse(event["pin"] or ""),
            lives=[Life(**life) for life in event["lives"]],
            max_steps=event["max_steps"],
            instance=Instance(**event["instance"]),
            fleet=evidence_from_json(event["fleet"]),
        )

    def claim(self) -> int:
        """Claim a life after all, for a run that looked finished.

        An agent that was killed meanwhile is started again, and opens the run once more.
        Raises what the agent raised, AgentError if the run went on elsewhere since it was opened.
        """
        self.incarnation = self._until_not_killed(self._claim)["incarnation"]
        assert self.incarnation is not None
        return self.incarnation

    def _claim(self) -> dict[str, Any]:
        if self.exit_code() is not None:
            opened = self._start(None)
            if opened["restored"] != self._restored:
                raise AgentError(
                    f"the run went on elsewhere: its newest checkpoint was {self._restored} and is "
                    f"{opened['restored']} now. Training was not started and nothing was deleted. Run the same command "
                    "again to continue from there."
                )
            if opened["incarnation"] is not None:
                return opened
        process = self._process
        assert process is not None
        _tell(process, "claim")
        event = _await(process, "claimed")
        self._found_overflow(event)
        _release(process)
        return event

    def _found_overflow(self, event: dict[str, Any]) -> None:
        folder = event["overflow"]
        self.overflow = Overflow(Path(folder) if folder else None, self.tier.signing)

    def restart(self) -> None:
        """Start the agent again for the same life, after it died."""
        self._start(self.incarnation)

    def exit_code(self) -> int | None:
        """The agent's exit code, None while it runs."""
        return self._process.poll() if self._process is not None else None

    def dismiss(self) -> None:
        """Let go of an agent that never claimed a life: closing its input ends it."""
        if self._process is not None:
            _release(self._process)

    def _until_not_killed(self, attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for is_last in (*[False] * _RESTARTS_AT_START, True):
            try:
                return attempt()
            except AgentError as error:
                if (self.exit_code() or 0) >= 0:
                    raise
                if is_last:
                    raise AgentError(
                        f"{error}, as did those before it. Training was not started and nothing was deleted. Find out "
                        "what kills it (a lack of memory?), then run the same command again."
                    ) from error
                logger.warning("%s, starting it again", error)
        raise AssertionError("the last attempt returns or raises")

    def _start(self, incarnation: int | None) -> dict[str, Any]:
        request = {
            "local": str(self.run_folder),
            "remote": self._config.remote,
            "storage_options": dict(self._config.storage_options),
            "run": self._config.run,
            "signing_keys": list(self._config.signing_keys),
            "framework": self._identity.framework,
            "facts": dict(self._identity.facts),
            "incarnation": incarnation,
            "overflow": str(self.overflow.folder or ""),
            "resume": self._config.resume,
            "keep_local": self._config.keep_local,
            "keep_remote": self._config.keep_remote,
            "keep_every": self._config.keep_every,
            "fleet": self._config.fleet,
            "watch": {
                "clouds": self._config.notice,
                "lead_s": self._config.notice_lead_s,
                "file": self._config.notice_file,
                "webhook": self._config.notice_webhook,
                "grace_s": self._config.grace_s,
            },
            "start_timeout_s": self._config.start_timeout_s,
            "started": self.started_unix_s,
            "began": self.began,
            "trainer_pid": os.getpid(),
            "trainer_created": psutil.Process().create_time(),
            "log_level": logging.getLogger("spot_core").getEffectiveLevel(),
        }
        early = self._early.take() if self._early is not None else None
        self._process = process = early or _start_process(self._config)
        _tell(process, json.dumps(request))
        event = _await(process, "opened")
        self._found_overflow(event)
        if event["incarnation"] is not None:
            _release(process)
        return event


def stored_loggers(config: SpotConfig) -> dict[str, str]:
    """Ids of experiment trackers in the newest checkpoint, for trackers that start before the run can be opened.

    Empty if there is none, or if the remote cannot be read: opening the run says so.
    """
    if not config.resume:
        return {}
    request = {
        "peek": True,
        "local": str(Path(str(config.local)) / config.run),
        "remote": config.remote,
        "storage_options": dict(config.storage_options),
        "run": config.run,
        "signing_keys": list(config.signing_keys),
    }
    process = _start_process(config)
    _tell(process, json.dumps(request))
    try:
        return dict(_await(process, "peeked")["loggers"])
    except SpotError as error:
        logger.debug("the stored tracker ids could not be read: %s", error)
        return {}
    finally:
        _release(process)
        process.wait()


def _start_process(config: SpotConfig) -> subprocess.Popen[str]:
    """An agent that waits to be told what to do, and meanwhile loads what opens the places it will be told of."""
    urls = [url for url in (config.remote, config.fleet) if url]
    # Its own session: a signal to the trainer's process group must not end the drain.
    return subprocess.Popen(
        [sys.executable, "-m", "spot_core.agent", *{url.partition("://")[0] for url in urls if "://" in url}],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=_environment(),
    )


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died; waiting for its event tells why
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _await(process: subprocess.Popen[str], wanted: str) -> dict[str, Any]:
    assert process.stdout is not None
    with byte_bar("restoring", is_in_logs=True) as on_progress:
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "progress":
                on_progress(event["done"], event["total"])
            elif event["event"] == "log":
                logger.log(event["level"], "%s", event["message"])
            elif event["event"] == "error":
                process.wait()
                kind = getattr(errors, event["kind"], AgentError)
                raise kind(event["message"]) if issubclass(kind, SpotError) else AgentError(event["message"])
            elif event["event"] == wanted:
                return event
    raise AgentError(f"the agent process ended with code {process.wait()} before the run was {wanted}")


def _release(process: subprocess.Popen[str]) -> None:
    pipes: tuple[IO[str] | None, ...] = (process.stdin, process.stdout)
    for pipe in pipes:
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # closed all the same; what a dead agent was told is lost
                pipe.close()


def _environment() -> dict[str, str]:
    """The trainer's environment, with the folder this package was imported from on the agent's path.

    Without the secrets that the request holds: the agent may outlive the trainer by hours.
    """
    here = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    plain = {name: value for name, value in os.environ.items() if name not in {SIGNING_KEY, STORAGE_OPTIONS}}
    return {**plain, "PYTHONPATH": here + (os.pathsep + inherited if inherited else "")}
