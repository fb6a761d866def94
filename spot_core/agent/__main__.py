"""Entry point of the agent process: JSON requests on standard input, events on standard output until a run is opened.

Its arguments are the schemes of the URLs to come, whose file systems are loaded while a request is waited for. Those
come on standard input, never in arguments or the environment: they hold storage options and signing keys.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import logging.handlers
import os
import platform
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil
import stamina

from spot_core.agent import opening
from spot_core.agent.drain import Drain
from spot_core.agent.fleet import FleetMember
from spot_core.agent.journal import Journal
from spot_core.agent.lives import Life
from spot_core.agent.look import EarlyLook, prepare
from spot_core.agent.process import Agent
from spot_core.cadence.hazard import Evidence
from spot_core.errors import ConfigError, SpotError, shown
from spot_core.notice.instance import Instance, read_instance
from spot_core.notice.rebalance import RebalanceHint
from spot_core.notice.watch import Watch, WatchOptions, watchers
from spot_core.store import incarnation, memory
from spot_core.store.identity import RunIdentity, read_run
from spot_core.store.overflow import Overflow
from spot_core.store.posix import PosixTier
from spot_core.store.signing import Signing
from spot_core.store.tier import Tier, forget, open_tier, preload


class _EventHandler(logging.Handler):
    """Relays warnings to the trainer until the run is open: they belong on the user's screen."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.WARNING)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._stream, event="log", level=record.levelno, message=record.getMessage())


class _LogFile(logging.handlers.WatchedFileHandler):
    """The agent's log, made again if its folder is removed. A log that cannot be written costs no drain."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Standard error may be the very file that cannot be written."""


def _send(stream: TextIO, **event: Any) -> None:
    try:
        stream.write(json.dumps(event) + "\n")
        stream.flush()
    except (OSError, ValueError):
        pass  # the trainer is gone; the main loop notices


def _events() -> TextIO:
    """Standard output for events alone: what a library prints there goes to standard error."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return stream


def main() -> int:
    memory.give_back_at_once()
    stamina.instrumentation.set_on_retry_hooks(())  # what passes is told by who retries, in the words of this project
    with _events() as stream:
        gc.disable()  # what is loaded is there to stay
        for scheme in sys.argv[1:]:
            preload(scheme)
        gc.enable()
        relay = _EventHandler(stream)
        logging.getLogger("spot_core").addHandler(relay)
        try:
            agent = _serve(stream)
        except SpotError as error:
            _send(stream, event="error", kind=type(error).__name__, message=_message(error))
            return 1
        except Exception as error:
            _send(stream, event="error", kind="AgentError", message=shown(f"{type(error).__name__}: {error}"))
            raise
        logging.getLogger("spot_core").removeHandler(relay)
    return agent.run() if agent is not None else 0


def _serve(stream: TextIO) -> Agent | None:
    """Answer until a run is to be opened, and return its agent; None if the trainer wants no life, or has ended."""
    remote: Tier | None = None  # kept while requests and environment stay the same
    place: tuple[object, ...] = ()
    early: EarlyLook | None = None
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        keys = tuple(request["signing_keys"])
        before, place = place, (request["remote"], request["storage_options"], keys)
        if _take_over(request["environment"]) or place != before:
            remote = early = None
        if request["ask"] == "prepare":
            with contextlib.suppress(SpotError):  # told to who opens it
                remote = open_tier(request["remote"], request["storage_options"], keys)
                threading.Thread(target=prepare, args=(remote,), daemon=True).start()
            continue
        local = PosixTier(request["local"], Signing(request["run"], keys))
        remote = remote or open_tier(request["remote"], request["storage_options"], keys)
        if request["ask"] == "look":
            early = EarlyLook(remote)
        elif request["ask"] == "peek":
            newest = opening.newest_manifest(local, remote)
            _send(stream, event="peeked", loggers=dict(newest.loggers) if newest else {})
            remote = early = None
        else:
            return _open(request, stream, local, remote, early)
    return None


def _take_over(environment: dict[str, str]) -> bool:
    """Bring the environment to what the trainer's is now: it may have changed since this process was started.

    Returns whether it had: file systems that were opened before have looked up their credentials in the old one.
    """
    gone = os.environ.keys() - environment.keys()
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    for name in gone:
        del os.environ[name]
    os.environ.update(changed)
    if (fsspec := sys.modules.get("fsspec")) is not None:
        fsspec.config.set_conf_env(fsspec.config.conf, changed)  # it reads its variables only when it is loaded
    if gone or changed:
        for scheme in sys.argv[1:]:
            forget(scheme)
    return bool(gone or changed)


def _open(
    request: dict[str, Any], stream: TextIO, local: PosixTier, remote: Tier, early: EarlyLook | None
) -> Agent | None:
    """Open the run, tell the trainer, and return the agent; None if the trainer wants no life."""
    background = ThreadPoolExecutor(1)  # a metadata service may take its time: it is asked while the run is opened
    asked = background.submit(read_instance, os.environ)
    background.shutdown(wait=False)
    shared = _fleet_tier(request, remote.signing.keys)
    identity = RunIdentity(request["framework"], request["facts"])
    trainer = _trainer(request["trainer_pid"], request["trainer_created"])

    def on_progress(done: int, total: int) -> None:
        _send(stream, event="progress", done=done, total=total)

    number = request["incarnation"]
    resumed_step, fleet = 0, None
    overflow = Overflow(Path(request["overflow"]) if request["overflow"] else None, local.signing)
    if number is None:
        opened = opening.open_run(
            local,
            remote,
            identity,
            is_resumed=request["resume"],
            started=request["started"],
            timeout_s=request["start_timeout_s"],
            on_progress=on_progress,
            is_wanted=lambda: _is_alive(trainer),
            early=early,
        )
        if opened.incarnation is None:
            drain = _drain(request, local, remote, incarnation.newest(local), opened.overflow)
            opening.drain_end(local, remote, drain, opened, timeout_s=request["start_timeout_s"])
        restored = opened.restored
        number, resumed_step = opened.incarnation, restored.manifest.step if restored else 0
        overflow = opened.overflow
        instance = asked.result()
        stored = read_run(local) if shared is not None else None
        if shared is not None and stored is not None:
            life = _life(request, number or 0, resumed_step, instance)
            fleet = FleetMember(shared, stored["run_id"], opened.lives, life)
        _send(
            stream,
            event="opened",
            incarnation=number,
            restored=str(restored.manifest.name) if restored else None,
            source=restored.source if restored else None,
            pin=str(opened.pin) if opened.pin else None,
            lives=[asdict(life) for life in opened.lives],
            instance=asdict(instance),
            fleet=asdict(fleet.learn() if fleet else Evidence()),
            max_steps=opened.max_steps,
            overflow=str(overflow.folder or ""),
        )
    else:
        _send(stream, event="opened", incarnation=number, overflow=request["overflow"])
    if number is None:
        if not sys.stdin.readline():
            opening.clear_finished(overflow, local, remote)
            return None
        number = opening.claim(
            local, remote, identity, started=request["started"], timeout_s=request["start_timeout_s"]
        )
        _send(stream, event="claimed", incarnation=number, overflow=str(overflow.folder or ""))
    _detach(Journal(local.root, number), request["log_level"])
    instance = asked.result()
    watched = watchers(WatchOptions(**request["watch"]), instance, os.environ, since_unix_s=request["started"])
    return Agent(
        local,
        remote,
        _drain(request, local, remote, number, overflow),
        life=_life(request, number, resumed_step, instance),
        began=request["began"],
        is_trainer_alive=lambda: _is_alive(trainer),
        overflow=overflow,
        watch=Watch(watched),
        hint=RebalanceHint.for_instance(instance, os.environ),
        fleet=fleet,
        sweep=partial(opening.sweep_remote, remote, number) if request["incarnation"] is None else None,
    )


def _fleet_tier(request: dict[str, Any], keys: tuple[str, ...]) -> Tier | None:
    """The folder shared by many runs. It gets the remote's options where it is of the same kind of store."""
    url = request["fleet"]
    if url is None:
        return None
    is_same_kind = url.rpartition("://")[0] == request["remote"].rpartition("://")[0]
    return open_tier(url, request["storage_options"] if is_same_kind else {}, keys)


def _life(request: dict[str, Any], number: int, resumed_step: int, instance: Instance) -> Life:
    return Life(
        incarnation=number,
        host=platform.node(),
        boot_id=instance.boot_id,
        started=request["started"],
        heartbeat=request["started"],
        resumed_step=resumed_step,
        step=resumed_step,
        instance=instance.id,
        pool=instance.pool,
        began_s=round(max(0.0, request["started"] - instance.booted), 3),
    )


def _drain(request: dict[str, Any], local: PosixTier, remote: Tier, number: int, overflow: Overflow) -> Drain:
    return Drain(
        local,
        remote,
        incarnation=number,
        keep_local=request["keep_local"],
        keep_remote=request["keep_remote"],
        keep_every=request["keep_every"],
        overflow=overflow,
    )


def _trainer(pid: int, created: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - created) < 1 else None
    except psutil.NoSuchProcess:
        return None


def _is_alive(trainer: psutil.Process | None) -> bool:
    try:
        return trainer is not None and trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _detach(journal: Journal, level: int) -> None:
    """Let go of the trainer's pipes and terminal: the agent outlives both."""
    null = log = os.open(os.devnull, os.O_RDWR)
    try:
        journal.log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(journal.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        pass  # an agent that is started again while the local folder is full or gone still drains
    for descriptor, target in ((0, null), (1, log), (2, log)):
        os.dup2(target, descriptor)
    handler = _LogFile(journal.log_path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("spot_core").addHandler(handler)
    logging.getLogger("spot_core").setLevel(level)


def _message(error: SpotError) -> str:
    if isinstance(error, ConfigError) or not isinstance(error, OSError):
        return str(error)
    return error.strerror or str(error)


if __name__ == "__main__":
    sys.exit(main())
