"""`spot imds` as the process that a user starts: what it prints, when it announces, how it ends."""

from __future__ import annotations

import functools
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from spot_core.notice.instance import read_instance
from spot_core.notice.metadata import ask

ROOT = Path(__file__).resolve().parents[2]
FOREVER_S = 60.0
VARIABLES = {
    "aws": "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "gcp": "GCE_METADATA_HOST",
    "azure": "SPOT_AZURE_METADATA_ENDPOINT",
}


class Imds:
    """The command as a process, its lines read as they come."""

    def __init__(self, *arguments: str, stdin: int | None = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spot_core.report.cli", "imds", *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            # A shell that runs the tests in the background has it ignored, and so would every process below.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self._lines = {stream: self._read(stream) for stream in (self.process.stdout, self.process.stderr)}

    @staticmethod
    def _read(stream: IO[str] | None) -> queue.Queue[str]:
        assert stream is not None
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in stream:
                lines.put(line.rstrip("\n"))
            lines.put("<the end>")

        threading.Thread(target=read, daemon=True).start()
        return lines

    def printed(self) -> str:
        return self._lines[self.process.stdout].get(timeout=FOREVER_S)

    def told(self) -> str:
        return self._lines[self.process.stderr].get(timeout=FOREVER_S)

    def environ(self) -> dict[str, str]:
        """What a shell that evaluates the first line has."""
        line = self.printed()
        assert line.startswith("export ")
        shown = subprocess.run(["sh", "-c", f"{line}; env -0"], capture_output=True, text=True, check=True, env={})
        variables = dict(entry.split("=", 1) for entry in shown.stdout.split("\0") if entry)
        return {name: value for name, value in variables.items() if name in VARIABLES.values()}

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(FOREVER_S)


@pytest.fixture
def started() -> Iterator[list[Imds]]:
    """Those that are killed when a test fails before it ends them."""
    processes: list[Imds] = []
    yield processes
    for each in processes:
        each.process.kill()
        each.process.wait()


@pytest.mark.parametrize("provider", VARIABLES)
def test_what_it_prints_leads_an_instance_to_it_until_ctrl_c(started: list[Imds], provider: str) -> None:
    imds = Imds(provider)
    started.append(imds)
    environ = imds.environ()
    assert environ.keys() == {VARIABLES[provider]}
    assert "127.0.0.1:" in environ[VARIABLES[provider]]
    assert read_instance(environ, budget_s=FOREVER_S).provider == provider
    assert imds.interrupt() == 0
    assert read_instance(environ, budget_s=FOREVER_S).provider == ""


def preempted(environ: dict[str, str]) -> str:
    url = f"http://{environ['GCE_METADATA_HOST']}/computeMetadata/v1/instance/preempted"
    return ask(url, headers={"Metadata-Flavor": "Google"}, until_s=time.monotonic() + FOREVER_S).body.decode()


def test_it_announces_and_withdraws_when_it_is_due(started: list[Imds]) -> None:
    imds = Imds("gcp", "--notice-after", "0.5", "--lead", "7", "--withdraw-after", "0.5")
    started.append(imds)
    environ = imds.environ()
    assert imds.told().startswith("spot: gcp: preemption announced, in 7 s")
    assert imds.told() == "spot: gcp: preemption withdrawn"
    assert preempted(environ) == "FALSE"
    assert imds.interrupt() == 0


def test_enter_announces_and_enter_again_withdraws(started: list[Imds]) -> None:
    keyboard, terminal = pty.openpty()
    imds = Imds("gcp", stdin=terminal)
    started.append(imds)
    environ = imds.environ()
    assert "Enter announces a preemption in 30 s" in imds.told()
    for said, answer in (("announced", "TRUE"), ("withdrawn", "FALSE"), ("announced", "TRUE")):
        os.write(keyboard, b"\n")
        assert said in imds.told()
        assert preempted(environ) == answer
    assert imds.interrupt() == 0


def test_it_serves_on_where_nobody_presses_enter(started: list[Imds]) -> None:
    imds = Imds("gcp")
    started.append(imds)
    environ = imds.environ()
    for _ in range(3):
        assert preempted(environ) == "FALSE"
    assert imds.interrupt() == 0


def test_each_refusal_is_told_in_a_line(started: list[Imds]) -> None:
    imds = Imds("aws", "--notice-after", "3600")
    started.append(imds)
    url = imds.environ()["AWS_EC2_METADATA_SERVICE_ENDPOINT"] + "latest/meta-data/spot/instance-action"
    assert ask(url, headers={}, until_s=time.monotonic() + FOREVER_S).status == 401
    assert imds.told().startswith("spot: aws: 401 to GET '/latest/meta-data/spot/instance-action': no valid X-aws")
    assert imds.interrupt() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["oracle"], "'oracle'"),
        (["aws", "--lead", "nan"], "--lead"),
        (["aws", "--notice-after", "-1"], "--notice-after"),
    ],
)
def test_a_wrong_call_ends_with_2(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spot_core.report.cli", "imds", *arguments],
        capture_output=True,
        text=True,
        timeout=FOREVER_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout
