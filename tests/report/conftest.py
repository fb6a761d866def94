"""`spot` in this process, and as a process of its own where standard error or signals matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spot_core.report import cli
from spot_core.store.posix import PosixTier
from tests.report.stored import BuiltRun


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Spot = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPOT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def spot(capsys: pytest.CaptureFixture[str]) -> Spot:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def doctor(spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`spot doctor --json` for a run on `bucket` with a local tier on `nvme`, both of this test, on any machine."""
    monkeypatch.setenv("SPOT_NOTICE", "off")

    def examine(*arguments: object, remote: object = None, local: object = None) -> Result:
        places = ("--remote", remote or tmp_path / "bucket" / "alpaca", "--local", local or tmp_path / "nvme")
        return spot("doctor", *places, "--state-mb", 0.05, "--json", *arguments)

    return examine


def start_spot(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "spot_core.report.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def spot_process(*arguments: object, **environment: str) -> Result:
    """Run a command in a process of its own."""
    process = start_spot(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


@pytest.fixture
def run(tmp_path: Path) -> BuiltRun:
    """A run in one folder, as a path given to `spot` often is."""
    return BuiltRun(tmp_path / "runs" / "alpaca")


@pytest.fixture
def two_tiers(tmp_path: Path) -> BuiltRun:
    """A run with a local folder and a remote one."""
    return BuiltRun(tmp_path / "nvme" / "alpaca", PosixTier(tmp_path / "bucket" / "alpaca"))


def everything_in(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
