"""The folders of a run, and the processes that work on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spot_core.agent.journal import AgentStatus, Journal
from spot_core.agent.lives import Life
from spot_core.store import layout
from spot_core.store.posix import PosixTier
from tests.agent.processes import TrainerProcess


class Place:
    """The folders of a run, and the processes that work on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.local, self.remote = PosixTier(folder / "local" / "run"), PosixTier(folder / "bucket" / "run")
        self.trainers: list[TrainerProcess] = []

    def options(self, **more: Any) -> dict[str, Any]:
        return {"local": str(self.folder / "local"), "remote": str(self.folder / "bucket" / "run"), **more}

    def trainer(self, **environment: str) -> TrainerProcess:
        self.trainers.append(TrainerProcess(**environment))
        return self.trainers[-1]

    def opened(self, **more: Any) -> TrainerProcess:
        trainer = self.trainer()
        trainer.open(**self.options(**more))
        return trainer

    def life(self, number: int = 1) -> Life:
        return Life.from_json(self.remote.read(layout.life(number)))

    def status(self, number: int = 1) -> AgentStatus:
        return Journal(self.local.root, number).read_status() or AgentStatus()
