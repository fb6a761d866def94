"""`spot imds`: a cloud's metadata service on this machine, which announces a preemption when it is told to."""

from __future__ import annotations

import contextlib
import math
import os
import select
import shlex
import sys
import time
from enum import Enum
from typing import Annotated

import typer

from spot_core.chaos.metadata_servers import SERVERS
from spot_core.chaos.metadata_service import MetadataServer
from spot_core.errors import ConfigError


class Provider(str, Enum):
    AWS = "aws"
    GCP = "gcp"
    AZURE = "azure"


def imds(
    provider: Annotated[Provider, typer.Argument(help="Whose service")],
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one")] = 0,
    notice_after: Annotated[
        float | None, typer.Option(metavar="S", help="Announce after so many seconds, instead of on Enter")
    ] = None,
    lead: Annotated[
        float | None,
        typer.Option(metavar="S", help="Seconds from announcement to preemption; default: the provider's own"),
    ] = None,
    withdraw_after: Annotated[
        float | None, typer.Option(metavar="S", help="Withdraw so many seconds after the announcement")
    ] = None,
) -> None:
    """Serve the metadata of a spot instance on 127.0.0.1: a training that is led here takes it for its instance's.

    Standard output holds what leads it here, for another shell. Enter announces a preemption, Enter again withdraws
    it, Ctrl-C ends. Credentials of an instance role are not served.
    """
    kind = SERVERS[provider.value]
    lead_s = _seconds("--lead", kind.usual_lead_s if lead is None else lead)
    notice_after_s = None if notice_after is None else _seconds("--notice-after", notice_after)
    withdraw_after_s = None if withdraw_after is None else _seconds("--withdraw-after", withdraw_after)
    try:
        with kind(port=port, tell=tell) as server:
            server.new_instance()
            for name, value in server.environ.items():
                typer.echo(f"export {name}={shlex.quote(value)}")
            _serve(server, lead_s, notice_after_s, withdraw_after_s)
    except KeyboardInterrupt:
        return


def tell(line: str) -> None:
    """One line to standard error."""
    typer.echo(f"spot: {line}", err=True)


def _serve(server: MetadataServer, lead_s: float, notice_after_s: float | None, withdraw_after_s: float | None) -> None:
    """Announce and withdraw when it is due or Enter is pressed, until Ctrl-C."""
    keyboard = _keyboard() if notice_after_s is None else None
    due = None if notice_after_s is None else time.monotonic() + notice_after_s
    is_announced = False
    if keyboard is not None:
        tell(f"Enter announces a preemption in {lead_s:g} s, Enter again withdraws it, Ctrl-C ends")
    while True:
        left_s = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([] if keyboard is None else [keyboard], [], [], left_s)
        if ready and not os.read(keyboard or 0, 4096):
            keyboard = None  # nobody is there any more
            continue
        if is_announced:
            server.withdraw()
            due = None
        else:
            server.announce(lead_s)
            due = None if withdraw_after_s is None else time.monotonic() + withdraw_after_s
        is_announced = not is_announced


def _keyboard() -> int | None:
    """Where Enter is read; None where nobody presses it. A job in the background would be stopped by reading."""
    try:
        file = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    with contextlib.suppress(OSError):  # no terminal, or none that has jobs
        if os.tcgetpgrp(file) != os.getpgrp():
            return None
    return file


def _seconds(option: str, value: float) -> float:
    if not (math.isfinite(value) and 0.0 <= value <= 1e9):
        raise ConfigError(f"{option} must be 0 seconds or more")
    return value
