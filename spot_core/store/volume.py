"""The volume that the local tier lies on: how much still fits, what may go to make room, what is told at start.

Room is made by deleting local copies only, oldest first, each of them committed and verified on the remote, older than
a newer one that is so too, not the newest here and not referred to. A restore may besides delete damaged copies of what
is durable. What does not fit then is not begun.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from spot_core.errors import CorruptCheckpointError, NewerFormatError, TierError
from spot_core.store import catalog, layout, retention
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier

logger = logging.getLogger(__name__)

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.ceph",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.juicefs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "smb3",
        "virtiofs",
        "wekafs",
    }
)
# A container format's headers, the manifest, folder blocks, the journal and the life's record.
_MARGIN_SHARE = 0.02
_MARGIN_BYTES = 16 << 10


def make_room(
    tier: PosixTier,
    expected_bytes: int,
    *,
    durable: Collection[CheckpointName],
    pinned: Collection[CheckpointName] = (),
    replaced: CheckpointName | None = None,
) -> list[CheckpointName]:
    """See to it that a checkpoint of about `expected_bytes` fits; returns what was deleted for it.

    durable: names committed and verified on the remote. pinned: names that stay, beside those that local ones refer to.
    replaced: what is to be restored; then damaged copies, its own last, may go too, while the remote holds them.
    Raises TierError (ENOSPC) if it does not fit: then it must not be begun.
    """
    deleted: list[CheckpointName] = []
    while not has_room(tier, expected_bytes):
        name = next(_expendable(tier, durable, pinned), None)
        if name is not None:
            retention.delete_checkpoints(tier, [name])
        elif replaced is not None:
            name = _delete_damaged(tier, durable, replaced)
        if name is None:
            raise TierError(
                errno.ENOSPC,
                f"no room in {tier.url}: {megabytes(needed_bytes(expected_bytes))} needed, "
                f"{megabytes(_free_bytes(tier.root) or 0)} free and nothing more there that is durable on the remote "
                "and superseded",
            )
        deleted.append(name)
    if deleted:
        logger.info("room made in %s: %s deleted there, durable on the remote", tier.url, ", ".join(map(str, deleted)))
    return deleted


def has_room(tier: PosixTier, expected_bytes: int) -> bool:
    """Whether a checkpoint of about that size fits as it is."""
    free_bytes = _free_bytes(tier.root)
    return free_bytes is None or free_bytes >= needed_bytes(expected_bytes)


def needed_bytes(expected_bytes: int) -> int:
    """What must be free for a checkpoint of about that size."""
    return expected_bytes + int(_MARGIN_SHARE * expected_bytes) + _MARGIN_BYTES


def describe_place(local: Path, remote_url: str) -> Iterator[tuple[int, str]]:
    """What a user should know at start about where the tiers are: log level and sentence."""
    kind = file_system(local)
    if kind in NETWORK_FILE_SYSTEMS:
        yield (
            logging.WARNING,
            f"the local folder {local} is on a network file system ({kind}): what fsync and rename promise, and how "
            "fast they are, is up to its server. Set local= (SPOT_LOCAL) to a disk of this instance",
        )
    scheme, separator, path = remote_url.rpartition("://")
    if not separator or scheme in {"file", "local"}:
        remote = Path(path).expanduser().absolute()
        try:
            is_same = os.stat(_existing(local)).st_dev == os.stat(_existing(remote)).st_dev
        except OSError:
            return
        if is_same:
            yield logging.INFO, "local and remote tier are on one volume: losing it loses both"


def file_system(folder: Path, mounts: str | None = None) -> str | None:
    """Type of the file system that holds `folder`, None where the system does not tell. mounts: /proc/self/mounts."""
    try:
        text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
        wanted = folder.resolve()
    except OSError:
        return None
    found: tuple[int, str | None] = (0, None)
    for line in text.splitlines():
        _, point, kind, *_ = line.split(" ")
        place = Path(point.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        # Of two mounts on one folder the later one is seen.
        if wanted.is_relative_to(place) and len(place.parts) >= found[0]:
            found = (len(place.parts), kind)
    return found[1]


def _expendable(
    tier: PosixTier, durable: Collection[CheckpointName], pinned: Collection[CheckpointName]
) -> Iterator[CheckpointName]:
    """Local commits that may go, oldest first."""
    here = catalog.names(tier)
    kept = set(pinned)
    for name in here:
        try:
            pin = catalog.read_manifest(tier, name).pins
            kept.update([pin] if pin is not None else [])
        except NewerFormatError:
            kept.add(name)  # for a newer release to delete
        except (FileNotFoundError, CorruptCheckpointError):
            pass
    for name in retention.superseded(here, keep=1, durable=durable, pinned=kept):
        if name in durable:
            yield name


def _delete_damaged(
    tier: PosixTier, durable: Collection[CheckpointName], replaced: CheckpointName
) -> CheckpointName | None:
    """Delete one damaged copy of what the remote holds; None if there is none. `replaced` was found damaged here."""
    for entry in tier.list(layout.DAMAGED):
        name = CheckpointName.parse(entry.partition("-")[2])
        if name in durable:
            tier.delete([f"{layout.DAMAGED}/{entry}"])
            return name
    if replaced in durable and replaced in catalog.names(tier):
        retention.delete_checkpoints(tier, [replaced])
        return replaced
    return None


def _free_bytes(folder: Path) -> int | None:
    """Room for this user, None where the file system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total > 0 else None


def _existing(path: Path) -> Path:
    """The nearest of `path` and the folders above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists() or place == place.parent)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
