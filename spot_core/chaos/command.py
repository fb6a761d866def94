"""`spot chaos`: the command line of the rehearsal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spot_core.chaos.imds import tell
from spot_core.chaos.metadata_servers import SERVERS
from spot_core.chaos.metadata_service import MetadataServer
from spot_core.chaos.plan import Mode, Notice, ages_in_trace, drawn_ages, planned
from spot_core.chaos.report import as_dict, as_table, summary
from spot_core.chaos.runner import rehearse
from spot_core.config import SpotConfig, absolute_url
from spot_core.environment import ENV_PREFIX
from spot_core.errors import ConfigError

_USUAL_LIVES = 4


def chaos(
    command: Annotated[list[str], typer.Argument(help="The command to run, after --")],
    kill_every: Annotated[
        float | None, typer.Option(help="Mean seconds between kills; each is drawn from 0.5 to 1.5 times it")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Kill at the ages at which real instances were preempted instead: a CSV with lifetime_s, censored and "
            "series. A censored life adds its time to the next one",
        ),
    ] = None,
    series: Annotated[str | None, typer.Option(metavar="NAME", help="Only this series of the trace")] = None,
    lives: Annotated[
        int | None, typer.Option(help="How many lives are killed; the next one may finish. Default: 4, or the trace's")
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="What a kill takes: the process group, the trainer alone, or the instance with its agent and its "
            "local tier"
        ),
    ] = Mode.KILL,
    wipe: Annotated[list[int] | None, typer.Option(help="This kill, counted from 1, also loses the local tier")] = None,
    notice: Annotated[
        str | None,
        typer.Option(
            metavar="PROVIDER:LEAD",
            help="Announce each kill LEAD seconds before, as aws, gcp or azure do in the instance's metadata, or by "
            "SIGTERM (signal). The command sees the metadata of a rehearsal, so credentials of an instance role are "
            "not found",
        ),
    ] = None,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="Withdraw each notice halfway; a kill follows, unannounced")
    ] = False,
    time_scale: Annotated[
        float, typer.Option(metavar="X", help="Multiplies --kill-every, the trace's times and the notice's LEAD")
    ] = 1.0,
    remote: Annotated[str | None, typer.Option(envvar="SPOT_REMOTE", help="URL of the run's folder")] = None,
    local: Annotated[str | None, typer.Option(envvar="SPOT_LOCAL", help="Folder of the local tier")] = None,
    preempt_exit_code: Annotated[
        int, typer.Option(metavar="CODE", envvar="SPOT_PREEMPT_EXIT_CODE", help="How the command exits when preempted")
    ] = 75,
    seed: Annotated[int | None, typer.Option(help="Makes the moments of the kills repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Run a command through real kills until it finishes, and print what they cost.

    With --remote and --local the command gets them as SPOT_REMOTE and SPOT_LOCAL, and steps are counted. A command that
    leaves by itself after a notice, with exit code 75 or --preempt-exit-code, is run again as one that was killed.
    """
    if not 0 < time_scale < math.inf or (lives is not None and lives < 0):
        raise ConfigError("--time-scale must be above 0 and --lives 0 or more")
    scaled = None
    if notice is not None:
        parsed = Notice.parse(notice)
        scaled = Notice(parsed.source, parsed.lead_s * time_scale)
    kills = planned(
        _ages(kill_every, trace, series, random.Random(seed), time_scale, scaled.lead_s if scaled else 0.0),
        most=_USUAL_LIVES if lives is None and trace is None else lives,
        mode=mode,
        wipes=frozenset(wipe or ()),
        notice=scaled,
        is_withdrawn=withdraw,
    )
    run_folder = None
    if remote and local:
        os.environ[ENV_PREFIX + "REMOTE"] = absolute_url(remote)
        os.environ[ENV_PREFIX + "LOCAL"] = str(Path(local).absolute())
        run_folder = Path(local).absolute() / SpotConfig(remote=remote).run
    with _server(scaled) as server:
        report = rehearse(
            command, kills=kills, run_folder=run_folder, server=server, preempt_exit_code=preempt_exit_code
        )
    if as_json:
        typer.echo(json.dumps(as_dict(report)))
    else:
        Console().print(as_table(report))
        typer.echo(summary(report))
    if report.failed_code is not None:
        typer.echo(f"the command failed by itself with exit code {report.failed_code}", err=True)
        raise typer.Exit(1)


def _ages(
    kill_every_s: float | None,
    trace: Path | None,
    series: str | None,
    rng: random.Random,
    scale: float,
    lead_s: float,
) -> Iterable[float]:
    """When lives end: drawn moments are those of the notice, a trace's those of the end."""
    if (kill_every_s is None) == (trace is None) or (series is not None and trace is None):
        raise ConfigError("either --kill-every, or --trace with or without --series")
    if trace is not None:
        return [age_s * scale for age_s in ages_in_trace(trace, series)]
    if kill_every_s is None or not 0 < kill_every_s < math.inf:
        raise ConfigError("--kill-every must be above 0 seconds")
    return (age_s + lead_s for age_s in drawn_ages(kill_every_s * scale, rng))


@contextlib.contextmanager
def _server(notice: Notice | None) -> Iterator[MetadataServer | None]:
    """The metadata service that announces, None where none does."""
    if notice is None or notice.source not in SERVERS:
        yield None
        return
    with SERVERS[notice.source](tell=tell) as server:
        server.new_instance()
        yield server
