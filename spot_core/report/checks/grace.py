"""Whether a checkpoint fits between the signal and the kill."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spot_core.cadence.interval import COPIED_BYTES_PER_S, MARGIN_S
from spot_core.config import SpotConfig
from spot_core.report.checks.finding import Area, Finding
from spot_core.report.units import duration, size

AREA = Area("grace period")

_IN_DOCKER = Path("/.dockerenv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured with a sample. None: it could not be."""

    state_bytes: int
    sample_bytes: int
    write_s: float | None
    upload_s: float | None
    read_s: float | None

    def parts_s(self) -> tuple[float, float, float, float] | None:
        """Seconds for the stall, the local commit, the upload and reading it back, of a whole checkpoint."""
        if self.write_s is None or self.upload_s is None or self.read_s is None:
            return None
        times = self.state_bytes / self.sample_bytes
        return (
            self.state_bytes / COPIED_BYTES_PER_S,
            self.write_s * times,
            self.upload_s * times,
            self.read_s * times,
        )


def check_grace(
    config: SpotConfig, measured: Measured, environ: Mapping[str, str], *, torchrun_waits_s: float | None
) -> Iterator[Finding]:
    """torchrun_waits_s: after which a torchrun above kills its workers, None without one."""
    yield _fits(config, measured, torchrun_waits_s)
    yield from _what_must_hold(config, environ)


def _fits(config: SpotConfig, measured: Measured, torchrun_waits_s: float | None) -> Finding:
    what, parts_s = "save", measured.parts_s()
    if parts_s is None:
        return AREA.skipped(what, "what a checkpoint takes until it is durable could not be measured")
    stall_s, write_s, upload_s, read_s = parts_s
    save_s = sum(parts_s)
    is_torchrun = torchrun_waits_s is not None and torchrun_waits_s < config.grace_s
    grace_s = torchrun_waits_s if is_torchrun and torchrun_waits_s is not None else config.grace_s
    of = " by torchrun" if is_torchrun else ""
    scaled = f", by a sample of {size(measured.sample_bytes)}" if measured.sample_bytes != measured.state_bytes else ""
    detail = (
        f"{duration(save_s)} until {size(measured.state_bytes)} are durable{scaled}: stall {duration(stall_s)}, disk "
        f"{duration(write_s)}, upload {duration(upload_s)}, read back {duration(read_s)}; {duration(grace_s)} are "
        f"given{of}, {duration(MARGIN_S)} of them as a margin"
    )
    numbers = {"save_s": round(save_s, 3), "grace_s": grace_s, "state_bytes": measured.state_bytes}
    missing_s = save_s + MARGIN_S - grace_s
    if missing_s <= 0:
        return AREA.ok(what, detail, **numbers)
    needed = math.ceil(grace_s + missing_s)
    fix = f"give {needed} s: where the grace period is set, and here with SPOT_GRACE_S={needed}"
    if is_torchrun:
        fix = f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={needed}; the grace period itself must be as long"
    return AREA.warning(
        what,
        f"{detail}. {duration(missing_s)} more are needed",
        f"{fix}; or use a faster remote",
        missing_s=round(missing_s, 3),
        **numbers,
    )


def _what_must_hold(config: SpotConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What nobody inside can see."""
    grace = f"{config.grace_s:g}"
    if environ.get("KUBERNETES_SERVICE_HOST"):
        yield AREA.skipped(
            "Kubernetes",
            f"terminationGracePeriodSeconds cannot be seen from here; it is 30 unless the pod says so, and must be "
            f"grace_s={grace} or more, with what a preStop hook takes on top",
            f"terminationGracePeriodSeconds: {math.ceil(config.grace_s) + 5}",
        )
    elif _IN_DOCKER.exists():
        yield AREA.skipped(
            "Docker",
            f"`docker stop` kills after 10 s unless it is told otherwise: it must wait grace_s={grace} or more",
            f"docker run --stop-timeout {math.ceil(config.grace_s) + 5}",
        )
    if environ.get("SLURM_JOB_ID"):
        yield AREA.skipped(
            "SLURM",
            f"the partition's GraceTime and the cluster's KillWait cannot be seen from here; GraceTime must be "
            f"grace_s={grace} or more. At the job's time limit --signal sends the signal earlier",
            f"#SBATCH --signal=TERM@{math.ceil(config.grace_s) + 60}; scontrol show partition "
            f"{environ.get('SLURM_JOB_PARTITION', '')}".rstrip(),
        )
