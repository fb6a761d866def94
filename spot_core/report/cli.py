"""`spot`: look at runs, verify them, bring a checkpoint home, drain by hand. Imports no torch.

Tables go to standard output, messages to standard error. Errors of this project end a command with a message and
the exit codes below, never with a traceback.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import stamina
import typer
from rich.console import Console
from rich.text import Text

from spot_core.chaos.command import chaos
from spot_core.chaos.imds import imds
from spot_core.environment import storage_options_from
from spot_core.errors import ConfigError, FencedError, SpotError, TierError, shown
from spot_core.keys import describe_key_file, signing_keys_from
from spot_core.progress import byte_bar
from spot_core.report import draining, explain, places, prune, repair, runs, status, status_report, tables, verify
from spot_core.report import restore as restoring
from spot_core.report.doctor import doctor
from spot_core.report.log import make_visible
from spot_core.report.options import AsJson, KeyFile
from spot_core.store import memory

logger = logging.getLogger(__name__)

EXIT_ERROR, EXIT_CONFIG, EXIT_LOCAL_ONLY, EXIT_FENCED = 1, 2, 3, 4

app = typer.Typer(
    name="spot",
    help="Runs on spot GPUs: what is stored, whether it is whole, and how to get it back.",
    epilog="URL is any fsspec URL or a path. SPOT_STORAGE_OPTIONS holds the file system's options, such as "
    "credentials, as a JSON object. SPOT_SIGNING_KEY holds the key of a run whose manifests are signed.\n\n"
    "Exit codes: 0 done, 1 damage, a problem that doctor found or storage that does not answer, 2 wrong call or place, "
    "3 storage did not answer and what this host knows was shown, 4 a newer life exists.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunUrl = Annotated[str, typer.Argument(metavar="URL", help="The run's folder: s3://bucket/my-run, or a path.")]
AnyUrl = Annotated[str, typer.Argument(metavar="URL", help="A run's folder, or a folder that holds runs.")]
KeepEvery = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        envvar="SPOT_KEEP_EVERY",
        help="Besides, keep the first checkpoint at or after each multiple of N steps. Default: none of them.",
    ),
]


def _version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"spot {importlib.metadata.version('spot-callbacks')}")
        raise typer.Exit


@app.callback()
def spot(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    make_visible()


@app.command()
def ls(url: AnyUrl, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """List the runs under a root, or the checkpoints of a run, newest first."""
    now = time.time()
    run, below = places.open_runs(url, _options(), _keys(key_file))
    if run is None:
        views = places.in_parallel(lambda each: runs.summary(each, now=now), below)
        if as_json:
            _print_json({"url": shown(url), "runs": [dataclasses.asdict(view) for view in views]})
        else:
            tables.show(tables.runs_table(views))
        return
    stored = runs.checkpoints(run.tier, now=now)
    if as_json:
        _print_json({"url": shown(url), "run": run.name, "checkpoints": [dataclasses.asdict(view) for view in stored]})
    else:
        tables.show(tables.checkpoints_table(stored))


@app.command("status")
def show_status(
    url: RunUrl,
    local: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run's local folder: shows what is not drained yet, and does without a URL that cannot be read.",
        ),
    ] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run stands: its lives, what is durable, what is at risk, and its goodput."""
    now, options, keys = time.time(), _options(), _keys(key_file)
    try:
        view = status.status(places.open_run(url, options, keys), local, now=now)
    except TierError as error:
        if local is None:
            hint = "--local DIR, the run's folder on its host, shows what that host knows"
            raise type(error)(f"{_message(error)}. {hint}") from error
        view = status.status_of_host(url, local, keys, remote_error=_message(error), now=now)
    if as_json:
        _print_json(dataclasses.asdict(view))
    else:
        tables.show(status_report.status_report(view))
    if view.remote_error is not None:
        raise typer.Exit(EXIT_LOCAL_ONLY)


@app.command("explain")
def explain_interval(
    url: RunUrl,
    local: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's local folder: knows the last checkpoint's numbers.")
    ] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Say why the next checkpoint is due when it is: lives seen, losses expected, costs, bounds, interval."""
    view = explain.explain(places.open_run(url, _options(), _keys(key_file)), local, now=time.time())
    if as_json:
        _print_json(dataclasses.asdict(view))
    else:
        tables.show(explain.explain_report(view))


@app.command("verify")
def verify_stored(url: AnyUrl, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Read every file of every checkpoint back and compare it with its manifest. Exits 1 if anything is damaged."""
    run, below = places.open_runs(url, _options(), _keys(key_file))
    views = []
    for each in below if run is None else [run]:
        with byte_bar(f"verifying {each.name}") as on_progress:
            views.append(verify.verify_run(each, on_progress))
    if as_json:
        body = [{**dataclasses.asdict(view), "is_sound": view.is_sound} for view in views]
        _print_json({"url": shown(url), "is_sound": all(view.is_sound for view in views), "runs": body})
    else:
        tables.show(tables.verify_report(views))
    if not all(view.is_sound for view in views):
        raise typer.Exit(EXIT_ERROR)


@app.command()
def restore(
    url: RunUrl,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where the checkpoint's own folder is to appear.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="A name that `spot ls` shows. Default: the newest valid one.")
    ] = None,
    step: Annotated[int | None, typer.Option(metavar="N", help="The checkpoint of this step.")] = None,
    key_file: KeyFile = None,
) -> None:
    """Download a verified checkpoint, as stock tools load it: DIR/checkpoint-N."""
    tier = places.open_run(url, _options(), _keys(key_file)).tier
    choice = restoring.choose(tier, checkpoint=checkpoint, step=step)
    folder = to.expanduser().absolute()
    restored = restoring.restore(tier, folder, choice=choice, progress_bar=lambda: byte_bar("restoring"))
    typer.echo(f"step {restored.manifest.step}, verified: {restored.path}")
    typer.echo(f"load it with: {restoring.how_to_load(restored)}")
    if restored.manifest.pins is not None:
        typer.echo(f"its best model is checkpoint {restored.manifest.pins}, restored with --checkpoint")


@app.command("prune")
def prune_stored(
    url: RunUrl,
    keep: Annotated[
        int, typer.Option(metavar="N", min=1, envvar="SPOT_KEEP_REMOTE", help="How many of the newest stay.")
    ] = 2,
    keep_every: KeepEvery = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Delete a run's superseded checkpoints, never the newest one nor what one that stays refers to.

    The newest is read back whole first. A manifest that is damaged, or not signed with the run's key, is neither
    counted nor deleted. Refused while a life of the run is active: its agent prunes by itself.
    """
    tier = places.open_run(url, _options(), _keys(key_file)).tier
    with byte_bar("verifying the newest") as on_progress:
        plan = prune.plan(tier, keep=keep, keep_every=keep_every, now=time.time(), on_progress=on_progress)
    if not dry_run:
        prune.execute(tier, plan)
    if as_json:
        _print_json({"url": url, "is_deleted": not dry_run, **plan.as_json()})
    else:
        tables.show(tables.prune_report(plan, is_done=not dry_run))


@app.command("repair")
def repair_stored(
    url: RunUrl,
    source: Annotated[
        str, typer.Option("--from", metavar="URL", help="The run's other copy: its remote, or its local folder.")
    ],
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Mend damaged checkpoints from the run's other copy, where that one verifies. Exits 1 if any damage is left.

    What is damaged is set aside under damaged/ first. Refused while a life of the run is active.
    """
    options, keys = _options(), _keys(key_file)
    target, other = places.open_run(url, options, keys), places.open_run(source, options, keys)
    with byte_bar(f"verifying {target.name}") as on_progress:
        result = repair.repair(target, other, now=time.time(), on_progress=on_progress)
    if as_json:
        _print_json({"url": url, "from": source, **result.as_json()})
    else:
        tables.show(tables.repair_report(result, other.tier.url))
    if not result.is_whole:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def agent(
    local: Annotated[Path, typer.Option(metavar="DIR", help="The run's folder on this host.")],
    remote: Annotated[str, typer.Option(metavar="URL", help="The run's folder on the remote.", envvar="SPOT_REMOTE")],
    once: Annotated[bool, typer.Option("--once", help="Drain what is there, then leave.")] = False,
    keep_local: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, envvar="SPOT_KEEP_LOCAL", help="Prune DIR to the newest N. Default: keep all."
        ),
    ] = None,
    keep_remote: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, envvar="SPOT_KEEP_REMOTE", help="Prune the remote to the newest N. Default: keep all."
        ),
    ] = None,
    keep_every: KeepEvery = None,
    key_file: KeyFile = None,
) -> None:
    """Drain a run's local folder to the remote by hand, or beside a trainer that shares the folder."""
    drain = draining.open_drain(
        local,
        remote,
        _options(),
        keep_local=keep_local,
        keep_remote=keep_remote,
        keep_every=keep_every,
        keys=_keys(key_file),
    )
    if once:
        drain.once()
    else:
        drain.watch(draining.stop_on_signals())


app.command("doctor")(doctor)
app.command("chaos")(chaos)
app.command("imds")(imds)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script."""
    stamina.instrumentation.set_on_retry_hooks(())  # structlog, where it is installed, would print into the output
    memory.give_back_at_once()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show an arrow still gets its table
    try:
        app(args=None if arguments is None else list(arguments), prog_name="spot")
    except SpotError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"spot: {_message(error)}", style="red"))
        return exit_code(error)
    return 0


def exit_code(error: SpotError) -> int:
    if isinstance(error, FencedError):
        return EXIT_FENCED
    return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_ERROR


def _options() -> dict[str, Any]:
    return storage_options_from(os.environ)


def _keys(file: str | None) -> tuple[str, ...]:
    if (warning := describe_key_file(file)) is not None:
        logger.warning("%s", warning)
    return signing_keys_from(os.environ, file or None)


def _message(error: SpotError) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__


def _print_json(body: dict[str, Any]) -> None:
    typer.echo(json.dumps(body, indent=1))


if __name__ == "__main__":
    sys.exit(main())
