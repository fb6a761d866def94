"""What the agent of `storage.py` takes: memory and processor time of the real process that drains and restores."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from storage_local import Committer

from spot_core.store.s3_files import PARALLEL_PARTS, PART_BYTES
from tests.agent.place import Place
from tests.agent.processes import TrainerProcess, eventually

_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Taken:
    """By the agent. peak_bytes: the most memory. rest_bytes: at rest before. cpu_s_per_gb: median; None: not known."""

    what: str
    peak_bytes: int
    rest_bytes: int | None
    cpu_s_per_gb: float | None


@dataclass(frozen=True, slots=True)
class AgentResult:
    """in_flight_bytes: of the parts that may travel at a time, there and back."""

    size: str
    bytes: int
    repeat: int
    in_flight_bytes: int
    rows: list[Taken]


def measure(size: str, folder: Path, options: dict[str, Any], bucket: str, *, repeat: int) -> AgentResult:
    """Checkpoints drained one after another by one agent, then the newest restored by the agent of another instance."""
    folder.mkdir(parents=True)
    place, remote = Place(folder), {"remote": f"s3://{bucket}/agent/run", "storage_options": options}
    try:
        trainer = place.trainer()
        trainer.open(**place.options(**remote))
        committer = Committer(size, place.local)
        time.sleep(1.0)  # what starting takes is over
        rest = _memory(trainer, "VmRSS")
        spent = [_drain(trainer, place, committer) for _ in range(repeat)]
        drained = Taken("drains", _memory(trainer, "VmHWM"), rest, statistics.median(spent))
        total_bytes = committer.commit()[0].total_bytes
        committer.close()
        trainer.close()
        second = place.trainer()
        opened = second.open(**{**place.options(**remote), "local": str(folder / "another-instance")})
        assert opened["source"] == "remote"
        restored = Taken("restores", _memory(second, "VmHWM"), None, None)
    finally:
        for each in place.trainers:
            each.close()
        shutil.rmtree(folder)
    return AgentResult(size, total_bytes, repeat, 2 * PARALLEL_PARTS * PART_BYTES, [drained, restored])


def _drain(trainer: TrainerProcess, place: Place, committer: Committer) -> float:
    """Processor seconds a gigabyte."""
    before = _cpu_s(trainer)
    manifest, _ = committer.commit()
    eventually(lambda: place.status().newest_durable == str(manifest.name), "it is durable", timeout_s=_PATIENCE_S)
    return (_cpu_s(trainer) - before) / (manifest.total_bytes / 1e9)


def _cpu_s(trainer: TrainerProcess) -> float:
    used = psutil.Process(trainer.agent).cpu_times()
    return used.user + used.system


def _memory(trainer: TrainerProcess, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{trainer.agent}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def table(found: AgentResult) -> str:
    lines = [
        f"agent, {found.size}: checkpoints of {found.bytes / 1e6:,.1f} MB, {found.repeat} of them; parts in flight up "
        f"to {found.in_flight_bytes / 1e6:,.0f} MB",
        "",
        "| peak memory, MB | at rest, MB | processor seconds per GB | the agent |",
        "|---:|---:|---:|---|",
    ]
    for row in found.rows:
        rest = "–" if row.rest_bytes is None else f"{row.rest_bytes / 1e6:,.0f}"
        cpu = "–" if row.cpu_s_per_gb is None else f"{row.cpu_s_per_gb:.2f}"
        lines.append(f"| {row.peak_bytes / 1e6:,.0f} | {rest} | {cpu} | {row.what} |")
    return "\n".join(lines)
