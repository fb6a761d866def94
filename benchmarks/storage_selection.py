"""Choosing what to resume from among very many manifests, for `storage.py`: seconds, and requests to an S3 server."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage_clients import Boto3

from spot_core.agent.lives import Life, newest_durable
from spot_core.store import catalog, layout, resume
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.testing.checkpoints import commit_checkpoint
from tests.faultproxy import FaultProxy

_UNTOLD = 20


@dataclass(frozen=True, slots=True)
class Selection:
    """One way to look. lists, requests: to the server, None where there is none."""

    what: str
    seconds: float
    lists: int | None = None
    requests: int | None = None


@dataclass(frozen=True, slots=True)
class SelectionResult:
    manifests: int
    rows: list[Selection]


def measure(
    manifests: int, folder: Path, options: dict[str, Any], bucket: str, port: int, *, repeat: int
) -> SelectionResult:
    """Looks of `repeat` rounds, of which the quickest counts: on a local folder, and on a server through a proxy."""
    full, empty = PosixTier(folder / "full" / "run"), PosixTier(folder / "empty" / "run")
    newest = commit_checkpoint(full, CheckpointName(1, manifests))
    names = [CheckpointName(1, step) for step in range(1, manifests)]
    contents = {layout.manifest(name): replace(newest, name=name).to_json() for name in names}
    for path, content in contents.items():
        full.path(path).write_bytes(content)
    _store(full, contents, Boto3(options, bucket, folder))
    with FaultProxy(port) as proxy:
        server = {**options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        remote = FsspecTier(f"s3://{bucket}/selection/run", server)
        # What the life before told of with its last heartbeat, some checkpoints ago.
        told = CheckpointName(1, manifests - _UNTOLD)
        life = Life(incarnation=1, host="", boot_id="", started=0.0, heartbeat=0.0, newest_durable=str(told))
        remote.replace(layout.life(1), life.to_json())

        def nearest() -> None:
            restored = resume.newest_valid(full, empty, lambda *_: None)
            assert restored is not None and restored.manifest == newest

        def from_remote() -> None:
            target = PosixTier(folder / "target" / "run")
            recent = catalog.recent(remote, lambda: newest_durable(remote))  # as whoever opens the run
            restored = resume.newest_valid(target, remote, lambda *_: None, recent=recent)
            assert restored is not None and restored.manifest == newest
            shutil.rmtree(target.root)

        rows = [
            _look("names, local", lambda: catalog.names(full), repeat),
            _look("newest_valid, local", nearest, repeat),
            _look("names, S3", lambda: catalog.names(remote), repeat, proxy),
            _look("the newest of S3, with its download", from_remote, repeat, proxy),
        ]
    shutil.rmtree(folder)
    return SelectionResult(manifests, rows)


def _store(tier: PosixTier, contents: dict[str, bytes], client: Boto3) -> None:
    """What `tier` holds, in the bucket."""

    def put(path: str, content: bytes) -> None:
        client.s3.put_object(Bucket=client.bucket, Key=f"selection/run/{path}", Body=content)

    whole = {str(file.relative_to(tier.root)): file for file in tier.root.rglob("*") if file.is_file()}
    everything = contents | {path: file.read_bytes() for path, file in whole.items() if path not in contents}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, everything, everything.values()))


def _look(what: str, look: Callable[[], object], repeat: int, proxy: FaultProxy | None = None) -> Selection:
    seconds = []
    for _ in range(repeat):
        before = len(proxy.seen) if proxy is not None else 0
        began = time.perf_counter()
        look()
        seconds.append(time.perf_counter() - began)
    if proxy is None:
        return Selection(what, min(seconds))
    seen = proxy.seen[before:]
    return Selection(what, min(seconds), sum("list-type=2" in request.path for request in seen), len(seen))


def table(found: SelectionResult) -> str:
    lines = [
        f"selection among {found.manifests:,} manifests",
        "",
        "| seconds | LIST requests | requests | look |",
        "|---:|---:|---:|---|",
    ]
    for row in found.rows:
        counts = "– | –" if row.lists is None else f"{row.lists} | {row.requests}"
        lines.append(f"| {row.seconds:.3f} | {counts} | {row.what} |")
    return "\n".join(lines)
