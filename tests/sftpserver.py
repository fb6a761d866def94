"""SFTP to test against: a file system over the network, without create-only writes.

`python -m tests.sftpserver PORT FOLDER` serves the folder until it is killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import asyncssh
from typing_extensions import Self

from tests.servers import free_port, wait_until_it_listens

_USER, _PASSWORD = "tester", "test-secret"


class SftpServer:
    """Serves a folder from a process of its own. Entered again, it is up again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self.options: dict[str, Any] = {"username": _USER, "password": _PASSWORD}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.sftpserver", str(self.port), str(self._folder)],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.DEVNULL,
        )
        wait_until_it_listens(self._process, self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def new_url(self) -> str:
        """The URL of a folder that nobody has used."""
        return f"sftp://127.0.0.1:{self.port}/{uuid.uuid4().hex[:12]}/team/run"


class _Login(asyncssh.SSHServer):
    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (_USER, _PASSWORD)


async def _serve(port: int, folder: Path) -> None:
    class Served(asyncssh.SFTPServer):
        def __init__(self, channel: asyncssh.SSHServerChannel[bytes]) -> None:
            super().__init__(channel, chroot=bytes(folder))

    key = asyncssh.generate_private_key("ssh-ed25519")
    server = await asyncssh.create_server(_Login, "127.0.0.1", port, server_host_keys=[key], sftp_factory=Served)
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), Path(sys.argv[2])))
