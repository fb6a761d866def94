"""`spot chaos`: the command line of the rehearsal."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from spot_core.chaos.runner import ChaosReport, rehearse
from spot_core.config import ENV_PREFIX, SpotConfig, absolute_url
from spot_core.errors import ConfigError


def chaos(
    command: Annotated[list[str], typer.Argument(help="The command to run, after --")],
    kill_every: Annotated[
        float, typer.Option(help="Mean seconds between kills; each is drawn from 0.5 to 1.5 times it")
    ],
    lives: Annotated[int, typer.Option(help="How many lives are killed; the next one may finish")] = 4,
    wipe: Annotated[list[int] | None, typer.Option(help="This kill, counted from 1, also loses the local tier")] = None,
    remote: Annotated[str | None, typer.Option(envvar="SPOT_REMOTE", help="URL of the run's folder")] = None,
    local: Annotated[str | None, typer.Option(envvar="SPOT_LOCAL", help="Folder of the local tier")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the moments of the kills repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Run a command through real SIGKILLs until it finishes, and print what they cost.

    With --remote and --local the command gets them as SPOT_REMOTE and SPOT_LOCAL, and steps are counted.
    """
    if kill_every <= 0 or lives < 0:
        raise ConfigError("--kill-every must be above 0 seconds and --lives 0 or more")
    run_folder = None
    if remote and local:
        os.environ[ENV_PREFIX + "REMOTE"] = absolute_url(remote)
        os.environ[ENV_PREFIX + "LOCAL"] = str(Path(local).absolute())
        run_folder = Path(local).absolute() / SpotConfig(remote=remote).run
    report = rehearse(
        command,
        run_folder=run_folder,
        kill_every_s=kill_every,
        kills=lives,
        wipes=frozenset(wipe or ()),
        rng=random.Random(seed),
    )
    if as_json:
        typer.echo(json.dumps(as_dict(report)))
    else:
        Console().print(as_table(report))
        typer.echo(summary(report))
    if report.failed_code is not None:
        typer.echo(f"the command failed by itself with exit code {report.failed_code}", err=True)
        raise typer.Exit(1)


def as_table(report: ChaosReport) -> Table:
    table = Table(title="lives", title_justify="left")
    for column in ("life", "lived s", "resumed at", "reached", "executed", "lost"):
        table.add_column(column, justify="right")
    table.add_column("ending")
    for index, life in enumerate(report.lives):
        progress = life.progress
        steps = (progress.resumed_step, progress.step, life.executed_steps) if progress else ("-", "-", "-")
        table.add_row(
            str(index + 1),
            f"{life.lived_s:.1f}",
            *map(str, steps),
            str(report.lost_steps(index)) if progress else "-",
            life.ending,
        )
    return table


def summary(report: ChaosReport) -> str:
    return (
        f"{len(report.lives)} lives, {report.executed_steps} steps executed, {report.total_lost_steps} lost; "
        f"goodput {report.goodput:.0%} of {report.wall_s:.0f} s (start-up of each life included)"
    )


def as_dict(report: ChaosReport) -> dict[str, object]:
    return {
        "lives": [
            {
                "lived_s": round(life.lived_s, 3),
                "ending": life.ending,
                "exit_code": life.exit_code,
                "resumed_step": life.progress.resumed_step if life.progress else None,
                "step": life.progress.step if life.progress else None,
                "lost_steps": report.lost_steps(index),
            }
            for index, life in enumerate(report.lives)
        ],
        "executed_steps": report.executed_steps,
        "lost_steps": report.total_lost_steps,
        "wall_s": round(report.wall_s, 3),
        "goodput": round(report.goodput, 4),
    }
