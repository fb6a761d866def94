"""The trainer's side of the agent: start it, wait until the run is open, restart it if it dies."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from spot_core import errors
from spot_core.agent import launch
from spot_core.agent.launch import AgentProcess, EarlyAgent
from spot_core.agent.lives import Life
from spot_core.cadence.hazard import Evidence
from spot_core.cadence.record import evidence_from_json
from spot_core.config import SpotConfig
from spot_core.errors import AgentError, SpotError
from spot_core.keys import describe_key_file
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


class AgentClient:
    """Owns the agent process of one life. Used by the trainer's main thread at start, its writer thread later."""

    def __init__(self, config: SpotConfig, identity: RunIdentity, early: EarlyAgent | None = None) -> None:
        assert config.local is not None
        self._early = early
        self._config = config
        self._identity = identity
        self.started_unix_s, self.began = time.time(), time.monotonic()
        self._process: AgentProcess | None = None
        self._restored: str | None = None
        self.incarnation: int | None = None
        self.overflow = Overflow(None)

    @property
    def tier(self) -> PosixTier:
        """The local tier, with the run's keys."""
        return PosixTier(self._config.run_folder, Signing(self._config.run, self._config.signing_keys))

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
        launch.ask(process, "claim", {})
        event = _await(process, "claimed")
        self._found_overflow(event)
        launch.release(process)
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
            launch.release(self._process)

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
            **launch.place(self._config),
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
        self._process = process = early or launch.start(self._config)
        launch.ask(process, "open", request)
        event = _await(process, "opened")
        self._found_overflow(event)
        if event["incarnation"] is not None:
            launch.release(process)
        return event


def stored_loggers(config: SpotConfig) -> dict[str, str]:
    """Ids of experiment trackers in the newest checkpoint, for trackers that start before the run can be opened.

    Empty if there is none, or if the remote cannot be read: opening the run says so.
    """
    if not config.resume:
        return {}
    process = launch.start(config)
    launch.ask(process, "peek", launch.place(config))
    try:
        found = dict(_await(process, "peeked")["loggers"])
    except SpotError as error:
        logger.debug("the stored tracker ids could not be read: %s", error)
        launch.end(process)
        return {}
    launch.give_back(process, config)
    return found


def _await(process: AgentProcess, wanted: str) -> dict[str, Any]:
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
