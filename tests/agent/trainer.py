"""A trainer without a trainer: a process that opens a run and commits when told to, one JSON line a command.

`python -m tests.agent.trainer` reads `[verb, argument, …]` from standard input and answers `{"result": …}` or
`{"error": kind, "message": text}`. It dies as trainers do: by a signal from outside.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from typing import Any

from spot_core.agent.client import AgentClient
from spot_core.agent.journal import Journal, Progress
from spot_core.config import SpotConfig
from spot_core.errors import SpotError
from spot_core.store import catalog
from spot_core.store.identity import RunIdentity
from spot_core.store.layout import CheckpointName
from spot_core.testing.checkpoints import commit_checkpoint, content_of


class Trainer:
    """What each command does."""

    def open(self, options: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        logging.getLogger("spot_core").setLevel(logging.DEBUG)
        self._client = AgentClient(SpotConfig.resolve(options, fallback_local="."), RunIdentity("testing", facts))
        opened = self._client.open()
        self._tier = self._client.tier
        if opened.incarnation is not None:
            self._start(opened.incarnation)
        return {
            "incarnation": opened.incarnation,
            "restored": str(opened.restored),
            "source": opened.source,
            "pin": str(opened.pin),
            "lives": [(life.incarnation, life.outcome) for life in opened.lives],
            "max_steps": opened.max_steps,
            "agent": self._agent_pid(),
        }

    def _start(self, number: int) -> None:
        self._journal = Journal(self._tier.root, number)
        self._journal.open_progress(Progress(0, 0.0, 0))

    def claim(self) -> int:
        number = self._client.claim()
        self._start(number)
        return number

    def dismiss(self) -> None:
        self._client.dismiss()

    def commit(self, step: int, padding_bytes: int = 0, paddings: int = 1) -> str:
        assert self._client.incarnation is not None
        name = CheckpointName(self._client.incarnation, step)
        padding = {f"checkpoint-{step}/padding-{number}.bin": bytes(padding_bytes) for number in range(paddings)}
        files = {**content_of(name), **padding}
        commit_checkpoint(self._tier, name, files=files)
        self._journal.write_progress(Progress(step, step / 10, 0))
        return str(name)

    def complete(self, step: int) -> None:
        assert self._client.incarnation is not None
        catalog.mark_complete(self._tier, CheckpointName(self._client.incarnation, step), step)

    def outcome(self, word: str) -> None:
        self._journal.write_outcome(word)

    def exit_code(self) -> int | None:
        return self._client.exit_code()

    def restart(self) -> int:
        self._client.restart()
        return self._agent_pid()

    def _agent_pid(self) -> int:
        assert self._client._process is not None
        return self._client._process.pid

    def imported(self) -> list[str]:
        return sorted({"torch", "fsspec", "s3fs"} & sys.modules.keys())


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a terminal that was closed on the tests leaves it ignored
    trainer = Trainer()
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            answer = {"result": getattr(trainer, verb)(*arguments)}
        except SpotError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
