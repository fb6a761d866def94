"""`spot doctor`: whether this machine is ready for a long run, and what to do where it is not.

Leaves nothing behind, and touches nothing else of a run that is in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spot_core.bounded import NoAnswer, within
from spot_core.config import SpotConfig
from spot_core.environment import ENV_PREFIX
from spot_core.errors import CorruptCheckpointError, TierError
from spot_core.keys import describe_key_file
from spot_core.notice.instance import read_instance
from spot_core.report import tables
from spot_core.report.checks import clock, grace, remote, signals
from spot_core.report.checks.finding import OK, PROBLEM, SKIPPED, WARNING, Finding
from spot_core.report.checks.local import local_probe
from spot_core.report.checks.notices import check_notices
from spot_core.report.checks.remote import PATIENCE_S, RemoteProbe
from spot_core.report.options import AsJson, KeyFile
from spot_core.report.units import count
from spot_core.store import catalog
from spot_core.store.posix import PosixTier
from spot_core.store.signing import Signing
from spot_core.store.tier import Tier, open_tier

EXIT_PROBLEM = 1

# What is measured with, where no checkpoint tells how large one is; and with at most.
_STATE_BYTES = 100_000_000
_SAMPLE_BYTES = 1_000_000_000
_TERMINATED = 128 + signal.SIGTERM
# Stands for a remote where none is given: the other settings are checked all the same.
_NO_REMOTE = "none://bucket/run"
_LOCAL = ".spot"
_MARKS = {
    OK: ("✓", "ok", "green"),
    WARNING: ("!", "!", "yellow"),
    PROBLEM: ("✗", "x", "bold red"),
    SKIPPED: ("-", "-", "dim"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to check. config: as a training would resolve it. state_bytes: of a checkpoint, None to find out."""

    config: SpotConfig
    environ: Mapping[str, str]
    has_remote: bool = True
    is_local_chosen: bool = True
    state_bytes: int | None = None


def doctor(
    remote: Annotated[
        str | None, typer.Option(metavar="URL", envvar="SPOT_REMOTE", help="The run's folder, as a training gets it.")
    ] = None,
    local: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="SPOT_LOCAL", help="The local tier. Default: what a training would choose."),
    ] = None,
    grace_s: Annotated[
        float | None,
        typer.Option(metavar="S", help="Seconds between the signal and the kill. Default: SPOT_GRACE_S or 25."),
    ] = None,
    state_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MB", min=0.001, help="Size of a checkpoint. Default: that of the run's newest one, else 100."
        ),
    ] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine before a long run: notices, signals, grace period, local disk, remote, clock.

    Writes a file like a checkpoint to both tiers, reads it back and deletes it again; a run in use is not disturbed.
    Exits 1 if there is a problem.
    """
    state_bytes = None if state_mb is None else max(1, round(state_mb * 1e6))
    wanted = _wanted(remote, local, grace_s, key_file, state_bytes)
    findings = examine(wanted)
    if as_json:
        typer.echo(json.dumps(_as_json(findings), indent=1))
    else:
        tables.show(doctor_report(findings, can_mark=_can_mark()))
    if any(finding.status == PROBLEM for finding in findings):
        raise typer.Exit(EXIT_PROBLEM)


def examine(wanted: Wanted) -> list[Finding]:
    """Every check, in the order in which they are shown."""
    config, environ = wanted.config, wanted.environ
    found = [*check_notices(config, read_instance(environ), environ), *signals.check_signals(config, environ)]
    with _ends_in_order():  # its handler is no longer that of whoever started this
        return [*found, *_examine_storage(wanted)]


def _examine_storage(wanted: Wanted) -> Iterator[Finding]:
    config, environ = wanted.config, wanted.environ
    probe = (
        RemoteProbe(open_tier(config.remote, config.storage_options, config.signing_keys))
        if wanted.has_remote
        else None
    )
    if probe is not None:
        probe.reach()
    state_bytes = wanted.state_bytes or _newest_bytes(config, probe) or _STATE_BYTES
    sample_bytes = min(state_bytes, _SAMPLE_BYTES)
    with local_probe(
        config,
        remote=config.remote,
        state_bytes=state_bytes,
        sample_bytes=sample_bytes,
        is_chosen=wanted.is_local_chosen,
    ) as here:
        if probe is not None:
            probe.run(here.sample)
    yield from here.findings
    yield from _remote_findings(config, probe)
    yield clock.check_clock(probe.stamp if probe is not None else None)
    measured = grace.Measured(
        state_bytes=state_bytes,
        sample_bytes=sample_bytes,
        write_s=here.write_s,
        upload_s=probe.upload_s if probe is not None else None,
        read_s=probe.read_s if probe is not None else None,
    )
    yield from grace.check_grace(config, measured, environ, torchrun_waits_s=signals.torchrun_waits_s(environ))


def _wanted(
    remote_url: str | None, local: Path | None, grace_s: float | None, key_file: str | None, state_bytes: int | None
) -> Wanted:
    """What a training with this environment would be given. Raises ConfigError."""
    said = {"REMOTE": remote_url or _NO_REMOTE, "LOCAL": local, "GRACE_S": grace_s, "SIGNING_KEY_FILE": key_file}
    environ = {**os.environ, **{ENV_PREFIX + name: str(value) for name, value in said.items() if value is not None}}
    config = SpotConfig.resolve({}, fallback_local=_LOCAL, environ=environ)
    return Wanted(
        config=config,
        environ=environ,
        has_remote=bool(remote_url),
        is_local_chosen=config.local != str(Path(_LOCAL).absolute()),
        state_bytes=state_bytes,
    )


def _newest_bytes(config: SpotConfig, probe: RemoteProbe | None) -> int | None:
    """Size of the run's newest checkpoint, here or on the remote; None if there is none that can be read."""
    tiers: list[Tier] = [PosixTier(config.run_folder, Signing(config.run, config.signing_keys))]
    if probe is not None and not probe.is_away:
        tiers.append(probe.tier)

    def look(tier: Tier) -> int | None:
        stored = catalog.names(tier)
        return catalog.read_manifest(tier, stored[0]).total_bytes if stored else None

    for tier in tiers:
        with contextlib.suppress(TierError, CorruptCheckpointError, FileNotFoundError, NoAnswer):
            if (found := within(PATIENCE_S, partial(look, tier))) is not None:
                return found
    return None


def _remote_findings(config: SpotConfig, probe: RemoteProbe | None) -> Iterator[Finding]:
    if probe is None:
        yield remote.AREA.skipped("remote", "none is given", "spot doctor --remote s3://bucket/my-run, or SPOT_REMOTE")
        return
    yield from probe.findings
    if (text := describe_key_file(config.signing_key_file)) is not None:
        detail, _, fix = text.rpartition(". ")
        yield remote.AREA.warning("signing key", detail, fix)


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """SIGTERM ends the block by an exception, so that what it has written is deleted."""

    def leave(*_: Any) -> None:
        sys.exit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def doctor_report(findings: Sequence[Finding], *, can_mark: bool = True) -> RenderableType:
    """What `spot doctor` prints. can_mark: whether the terminal has more than ASCII."""
    parts: list[RenderableType] = []
    for area in dict.fromkeys(finding.area for finding in findings):
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for finding in (finding for finding in findings if finding.area == area):
            mark, plain, style = _MARKS[finding.status]
            grid.add_row(Text(mark if can_mark else plain, style=style), finding.what, Text(finding.detail))
            if finding.fix:
                grid.add_row("", "", Text(f"fix: {finding.fix}", style="bold"))
        parts += [tables.line("bold", area), grid, ""]
    return Group(*parts, _summary(findings))


def _summary(findings: Sequence[Finding]) -> Text:
    number = Counter(finding.status for finding in findings)
    told = f"{count(number[PROBLEM], 'problem')}, {count(number[WARNING], 'warning')}, {number[OK]} checks passed"
    if number[PROBLEM]:
        return tables.line("bold red", f"{told}: not ready for a long run")
    return tables.line("yellow" if number[WARNING] else "green", f"{told}: ready for a long run")


def _as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    number = Counter(finding.status for finding in findings)
    return {
        "is_ready": number[PROBLEM] == 0,
        "problems": number[PROBLEM],
        "warnings": number[WARNING],
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _can_mark() -> bool:
    try:
        "✓✗".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
