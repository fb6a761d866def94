"""Drain and restore of `storage.py`: the same files through this project and through other clients, on one server.

Ours does more: a drain verifies the local bytes first and has the store attest what it holds, a restore verifies each
digest. The others only move bytes; all downloads are made durable. So the drain's upload alone is a row too, and so are
two clients that read back and digest what they uploaded, into files that are not made durable.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from storage_clients import CLIENTS, Boto3, Client, Obstore, side_by_side
from storage_local import Committer
from storage_report import Result, Row, Way, take_turns

from spot_core.agent.drain import Drain
from spot_core.store import layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.store.s3_files import PART_BYTES
from spot_core.store.tier import digest_file
from spot_core.testing.checkpoints import commit_checkpoint

DRAIN, UPLOAD, RESTORE = "Drain, verified", "Drain's upload alone", "restore, verified"


class Mover:
    """Moves one committed checkpoint to a bucket and back; each turn uses names of its own."""

    def __init__(self, size: str, folder: Path, options: dict[str, Any], bucket: str) -> None:
        self._folder, self._options, self._bucket = folder, options, bucket
        committer = Committer(size, PosixTier(folder / "run"))
        self.manifest, _ = committer.commit()
        committer.close()
        self._local = committer.tier
        # What a life drains first is read back whole, which is not what is measured.
        commit_checkpoint(self._local, CheckpointName(1, self.manifest.step + 1))
        self._sources = [self._local.path(self._path(file.path)) for file in self.manifest.files]
        self._turn = 0
        self._first = folder / "two-parts"
        self._first.write_bytes(bytes(PART_BYTES + 1))

    def _path(self, file: str) -> str:
        return f"{layout.checkpoint(self.manifest.name)}/{file}"

    def _new_remote(self) -> FsspecTier:
        self._turn += 1
        return FsspecTier(f"s3://{self._bucket}/turn-{self._turn}/run", self._options)

    def _known_remote(self) -> FsspecTier:
        """One of which it is known what the first upload of a life finds out about its store."""
        remote = self._new_remote()
        remote.upload(self._first, "first", lambda _: None)
        return remote

    def drain(self) -> float:
        remote = self._known_remote()
        for tier in (remote, self._local):  # what a claim leaves, without its waiting
            tier.replace(layout.incarnation(1), b"{}\n")
        remote.refuses_overwrite(layout.incarnation(1), b"{}\n")
        drain = Drain(self._local, remote, incarnation=1, keep_local=2, keep_remote=2)
        drain.step(lambda *_: None)
        ended: list[float] = []
        began = time.perf_counter()
        drained = drain.step(lambda *_: None, lambda *_: ended.append(time.perf_counter()))
        assert drained is not None and drained[0] == self.manifest.name
        remote.delete([""])
        return ended[0] - began

    def upload(self) -> float:
        remote = self._known_remote()
        began = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            files = (file.path for file in self.manifest.files)
            list(pool.map(lambda source, file: remote.upload(source, file, lambda _: None), self._sources, files))
        seconds = time.perf_counter() - began
        remote.delete([""])
        return seconds

    def upload_by(self, client: Client, *, is_verified: bool = False) -> Way:
        def upload() -> float:
            remote, prefix = self._new_remote(), f"turn-{self._turn}/run"
            copies = [self._folder / "copies" / source.name for source in self._sources]
            copies[0].parent.mkdir(exist_ok=True)  # a client that was refused left it
            began = time.perf_counter()
            client.put_all(self._sources, prefix)
            if is_verified:
                side_by_side(lambda copy: client.get(f"{prefix}/{copy.name}", copy), copies)
                found = {file.name: digest_file(file).digest for file in copies}
                assert found == {Path(file.path).name: file.digest for file in self.manifest.files}
            seconds = time.perf_counter() - began
            shutil.rmtree(copies[0].parent)
            remote.delete([""])
            return seconds

        return upload

    def stored(self) -> FsspecTier:
        """A remote that holds the checkpoint, committed."""
        remote = self._new_remote()
        for source, file in zip(self._sources, self.manifest.files, strict=True):
            remote.upload(source, self._path(file.path), lambda _: None)
        remote.create(layout.manifest(self.manifest.name), self.manifest.to_json())
        return remote

    def restore(self, remote: FsspecTier) -> Way:
        def restore() -> float:
            target = PosixTier(self._folder / "restored")
            began = time.perf_counter()
            resume.fetch(self.manifest.name, target, remote, here=False, there=True, on_progress=lambda *_: None)
            seconds = time.perf_counter() - began
            shutil.rmtree(target.root)
            return seconds

        return restore

    def download_by(self, client: Client, prefix: str) -> Way:
        def download() -> float:
            folder = self._folder / "downloaded"
            folder.mkdir()
            targets = [folder / Path(file.path).name for file in self.manifest.files]
            began = time.perf_counter()
            client.get_all(prefix, targets)
            seconds = time.perf_counter() - began
            for target, file in zip(targets, self.manifest.files, strict=True):
                assert target.stat().st_size == file.bytes
            shutil.rmtree(folder)
            return seconds

        return download


def measure(size: str, folder: Path, options: dict[str, Any], bucket: str, *, repeat: int) -> list[Result]:
    """Drains, then restores, beside every client that is installed."""
    mover = Mover(size, folder, options, bucket)
    clients = [kind(options, bucket, folder) for kind in CLIENTS if kind.is_installed()]

    def compare(what: str, ours: dict[str, Way], others: dict[str, Way]) -> Result:
        absent = [_absent(kind.name, "not installed") for kind in CLIENTS if not kind.is_installed()]
        ways = dict(ours)
        for name, way in others.items():
            try:
                way()
                ways[name] = way
            except ClientError as error:
                absent.append(_absent(name, f"refused by this server: {error.response['Error']['Code']}"))
        rows = take_turns(ways, repeat=repeat) + absent
        return Result(what, size, mover.manifest.total_bytes, len(mover.manifest.files), repeat, next(iter(ours)), rows)

    uploads = {client.name: mover.upload_by(client) for client in clients}
    uploads |= {
        f"{client.name}, read back": mover.upload_by(client, is_verified=True)
        for client in clients
        if type(client) in (Boto3, Obstore)
    }
    drained = compare("drain", {DRAIN: mover.drain, UPLOAD: mover.upload}, uploads)
    remote = mover.stored()
    prefix = f"{remote.url.removeprefix(f's3://{bucket}/')}/{layout.checkpoint(mover.manifest.name)}/checkpoint"
    downloads = {client.name: mover.download_by(client, prefix) for client in clients}
    restored = compare("restore", {RESTORE: mover.restore(remote)}, downloads)
    remote.delete([""])
    shutil.rmtree(folder)
    return [drained, restored]


def _absent(name: str, why: str) -> Row:
    return Row(name, None, None, None, why)
