"""Builds stored runs with the code that real lives use: create_run, claim, stage, commit, Drain."""

from __future__ import annotations

import platform
import time
from pathlib import Path

from spot_core.agent import lives
from spot_core.agent.drain import Drain
from spot_core.agent.lives import Life
from spot_core.notice.instance import this_boot
from spot_core.store import catalog, incarnation, layout
from spot_core.store.identity import RunIdentity, create_run
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Tier, digest_file

FACTS: dict[str, str | int] = {"model": "LlamaForCausalLM", "batch size per device": 4, "world size": 1}


class BuiltRun:
    """A run whose commits go to the folder `local`, and from there to `remote` by `drain`."""

    def __init__(self, local: Path, remote: Tier | None = None, *, framework: str = "transformers") -> None:
        self.local = PosixTier(local)
        self.remote = remote or self.local
        self.number = 0
        create_run(self.local, self.remote, RunIdentity(framework, FACTS), time.time())

    @property
    def url(self) -> str:
        return self.remote.url

    def claim(self) -> int:
        self.number = incarnation.claim(self.local, self.remote, time.time())
        return self.number

    def live(
        self,
        outcome: str = lives.RUNNING,
        *,
        ended_s_ago: float = 0.0,
        lasted_s: float = 100.0,
        steps: tuple[int, int] = (0, 0),
        host: str = platform.node(),
    ) -> int:
        """Claim a life and record it as its agent does."""
        heartbeat = time.time() - ended_s_ago
        number = self.claim()
        life = Life(
            incarnation=number,
            host=host,
            boot_id=this_boot(),
            started=heartbeat - lasted_s,
            heartbeat=heartbeat,
            outcome=outcome,
            resumed_step=steps[0],
            step=steps[1],
        )
        for tier in (self.local, self.remote):
            tier.replace(layout.life(number), life.to_json())
        return number

    def commit(
        self,
        step: int,
        *,
        native: str | None = None,
        useful_s: float = 0.0,
        pins: CheckpointName | None = None,
        notes: tuple[str, ...] = (),
        age_s: float = 0.0,
        ballast: int = 0,
        epoch: float = 0.5,
    ) -> CheckpointName:
        """Commit a checkpoint of the newest life on the local tier."""
        name = CheckpointName(self.number or self.claim(), step)
        native = native or f"checkpoint-{step}"
        staged = self.local.stage(name)
        is_file = native.endswith(".ckpt")
        contents = {
            native if is_file else f"{native}/adapter_config.json": b'{"r": 8}',
            "spot/data.json": b"{}",
        }
        if not is_file:
            contents |= {
                f"{native}/adapter_model.safetensors": f"weights of step {step}".encode(),
                f"{native}/optimizer.pt": b"moments" * 50 + b"\0" * ballast,
                f"{native}/empty.txt": b"",
            }
        records = []
        for path, content in contents.items():
            file = staged / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            record = digest_file(file)
            records.append(type(record)(path, record.bytes, record.digest))
        manifest = Manifest(
            run=self.local.root.name,
            name=name,
            epoch=epoch,
            useful_s=useful_s,
            created=time.time() - age_s,
            framework="transformers",
            native=native,
            files=tuple(records),
            pins=pins,
            notes=notes,
        )
        self.local.commit(staged, manifest)
        return name

    def complete(self, name: CheckpointName) -> None:
        catalog.mark_complete(self.local, name, name.step)

    def drain(self, *, keep: int = 99) -> None:
        drain = Drain(self.local, self.remote, incarnation=self.number, keep_local=keep, keep_remote=keep)
        while drain.step(lambda *_: None):
            pass

    def file(self, name: CheckpointName, path: str) -> Path:
        """A committed file of the local tier, such as `optimizer.pt`, to be damaged."""
        found = list(self.local.path(layout.checkpoint(name)).rglob(path))
        assert len(found) == 1, found
        return found[0]


def flip(file: Path) -> None:
    """One bit of it, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    """By one byte."""
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {"flipped": flip, "truncated": truncate, "missing": Path.unlink}


def of_newer_format(tier: Tier, name: CheckpointName) -> None:
    """Its manifest becomes one that a later release wrote."""
    body = tier.read(layout.manifest(name)).replace(b'"format_version": 1', b'"format_version": 2')
    tier.replace(layout.manifest(name), body)
