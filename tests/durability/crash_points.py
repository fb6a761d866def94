"""Does one thing to a run again and again, each time in a fork that kills itself at another change of a file.

Run as a process of its own, which has no other threads when it forks:
`python -m tests.durability.crash_points ACTION TEMPLATE FOLDER STRIDE` copies TEMPLATE (a run's `local` and `remote`)
for every STRIDE-th crash point and prints one JSON line for each, the last one being the action that was left alone.
What only reads, and fsync, are no points of their own: a kill there leaves what a kill at the next change leaves.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from spot_core.agent import opening
from spot_core.agent.drain import Drain
from spot_core.agent.opening import Opened
from spot_core.report import prune
from spot_core.report.places import StoredRun
from spot_core.report.repair import repair
from spot_core.report.restore import restore
from spot_core.store import catalog
from spot_core.store.identity import read_run
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier
from tests.opening import open_run
from tests.store.commit_crashes import Killer

NOW = 1e9  # long after the last sign of life of any run here


def start_life(local: PosixTier, remote: Tier) -> Opened:
    """Resume, claim, sweep."""
    opened = open_run(local, remote)
    if opened.incarnation is not None:
        opening.sweep_remote(remote, opened.incarnation)
    return opened


def drain(local: PosixTier, remote: Tier, *, number: int = 1) -> None:
    """Everything an agent does once its trainer has ended, with retention on both tiers."""
    agent = Drain(local, remote, incarnation=number, keep_local=1, keep_remote=1)
    while agent.step(lambda *_: None) is not None:
        pass


def prune_by_hand(local: PosixTier, remote: Tier) -> None:
    prune.execute(remote, prune.plan(remote, keep=1, keep_every=None, now=NOW, on_progress=lambda *_: None))


def repair_remote(local: PosixTier, remote: Tier) -> None:
    _repair(remote, local)


def repair_local(local: PosixTier, remote: Tier) -> None:
    _repair(local, remote)


def _repair(target: Tier, source: Tier) -> None:
    runs = [StoredRun(tier, read_run(tier) or {}) for tier in (target, source)]
    assert repair(*runs, now=NOW, on_progress=lambda *_: None).is_whole


def restore_elsewhere(local: PosixTier, remote: Tier) -> None:
    """`spot restore` to a folder beside the tiers."""
    restore(remote, local.root.parent / "restored", choice=None, progress_bar=lambda: nullcontext(lambda *_: None))


def mark_complete(local: PosixTier, remote: Tier) -> None:
    newest = catalog.names(local)[0]
    catalog.mark_complete(local, newest, newest.step)


Action = Callable[[PosixTier, Tier], object]
ACTIONS: dict[str, Action] = {
    action.__name__: action
    for action in (
        start_life,
        drain,
        prune_by_hand,
        repair_remote,
        repair_local,
        restore_elsewhere,
        mark_complete,
    )
}


class ChangeKiller(Killer):
    """Counts only what changes a file or a name. Threads take turns, so that no point is missed."""

    def __init__(self, nth: int, when: str, note: Path) -> None:
        super().__init__(nth, when, note)
        self._lock = threading.RLock()

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        counted = super()._counted(name, function)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not _is_change(name, args, kwargs):
                return function(*args, **kwargs)
            with self._lock:
                return counted(*args, **kwargs)

        return call


def _is_change(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "open":
        mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
        return any(letter in mode for letter in "wxa")
    if name == "os.open":
        return bool(args[1] & (os.O_WRONLY | os.O_RDWR))
    return name != "os.fsync"


def main(action: Action, template: Path, folder: Path, stride: int) -> None:
    number = 0
    for nth in itertools.count(1, stride):
        for when in ("before", "midway"):
            number += 1
            target = folder / str(number)
            shutil.copytree(template, target)
            status = _in_a_fork(action, target, nth, when)
            operation = (target / "died-at").read_text()
            is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if when == "midway" and not operation.startswith("os.write(") and operation:
                shutil.rmtree(target)  # only a write has a middle
                continue
            point = {"operation": operation, "when": when, "folder": str(target), "is_killed": is_killed}
            print(json.dumps({**point, "status": status}), flush=True)
            if not is_killed:
                return


def _in_a_fork(action: Action, target: Path, nth: int, when: str) -> int:
    killer = ChangeKiller(nth, when, target / "died-at")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            killer.install()
            action(PosixTier(target / "local"), PosixTier(target / "remote"))
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    main(ACTIONS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
