"""Ceph's S3 gateway as a real server to test against: one monitor, one storage daemon in memory, radosgw, cephx on.

`python -m tests.radosgw COMMAND…` runs a command with its address and credentials in the environment, stops it
and exits with the command's code. Without a command it says whether it could. Needs the packages radosgw, ceph-mon,
ceph-osd and ceph-common.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from typing_extensions import Self

from tests.servers import free_port

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool")
_START_TIMEOUT_S = 120.0
_KEY, _SECRET = "test-key", "test-secret"

_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
ms bind msgr1 = false
ms bind ipv6 = false
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.socket
pid file =
log file = {folder}/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 1
osd objectstore = memstore
memstore device bytes = 8589934592
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[client.gateway]
rgw data = {folder}/gateway
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
"""

_CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "osd.0": {"mon": "allow *", "osd": "allow *"},
    "client.gateway": {"mon": "allow rwx", "osd": "allow rwx"},
}


def why_not() -> str | None:
    """Why it cannot be started here, None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class RadosGateway:
    """A gateway of its own on free ports, with an empty store, gone when the block ends.

    environment: what points tests, and every S3 client, at it.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "SPOT_TEST_S3_ENDPOINT": self.endpoint,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="radosgw-")
        self._folder = Path(self._temporary.name)
        self._deadline = time.monotonic() + _START_TIMEOUT_S
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        folder, fsid, mon_port = self._folder, str(uuid.uuid4()), free_port()
        for name in ("mon", "osd", "gateway"):
            (folder / name).mkdir()
        text = _CONFIGURATION.format(folder=folder, fsid=fsid, mon_port=mon_port, port=self.port)
        (folder / "ceph.conf").write_text(text)
        self._make_keys()

        monmap = str(folder / "monmap")
        address = f"[v2:127.0.0.1:{mon_port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", str(folder / "keyring"))
        self._daemon("ceph-mon", "-i", "a")
        self._wait("the monitor", lambda: self._is_done("ceph", "--connect-timeout", "5", "mon", "stat"))

        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=here", "root=default")
        self._daemon("ceph-osd", "-i", "0")
        self._wait("the storage daemon", lambda: b"1 up" in self._run("ceph", "osd", "stat"))

        keys = ("--access-key", _KEY, "--secret-key", _SECRET)
        self._run("radosgw-admin", "user", "create", "--uid", "tester", "--display-name", "tester", *keys)
        self._daemon("radosgw", "-n", "client.gateway")
        self._wait("the gateway", self._answers)

    def _make_keys(self) -> None:
        keyring = str(self._folder / "keyring")
        self._run("ceph-authtool", "--create-keyring", keyring)
        for name, capabilities in _CAPABILITIES.items():
            allowed = [word for who, what in capabilities.items() for word in ("--cap", who, what)]
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *allowed)

    def _command(self, *command: str) -> list[str]:
        return [*command, "-c", str(self._folder / "ceph.conf")]

    def _run(self, *command: str) -> bytes:
        is_tool = command[0] in {"ceph-authtool", "monmaptool"}
        words = list(command) if is_tool else self._command(*command)
        result = subprocess.run(words, capture_output=True, timeout=_START_TIMEOUT_S)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.decode(errors='replace')}")
        return result.stdout

    def _is_done(self, *command: str) -> bool:
        return subprocess.run(self._command(*command), capture_output=True).returncode == 0

    def _daemon(self, *command: str) -> None:
        words = self._command(*command, "-f")
        if shutil.which("setpriv"):
            words = ["setpriv", "--pdeathsig", "KILL", *words]  # it ends even if this process is killed
        self._daemons.append(
            subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def _wait(self, what: str, is_up: Callable[[], bool]) -> None:
        while not is_up():
            if time.monotonic() > self._deadline or any(daemon.poll() is not None for daemon in self._daemons):
                raise RuntimeError(f"{what} of radosgw did not start:\n{self._logs()}")
            time.sleep(0.2)

    def _logs(self) -> str:
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()  # nothing that it holds is wanted
            daemon.wait()
        self._temporary.cleanup()


def main(command: list[str]) -> int:
    with RadosGateway() as gateway:
        return subprocess.run(command, env={**os.environ, **gateway.environment}).returncode


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"radosgw cannot be started: {reason}")
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else 0)
