"""The remote: every operation that a run needs of it, tried once below one new name in the run's folder.

In the folder, since a policy may allow nothing beside it. What was written is deleted, also after a failure; folders
that had to be made go too, while they are empty. No operation is waited for longer than it may take.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from spot_core.bounded import NoAnswer, within
from spot_core.errors import CommitConflictError, CorruptCheckpointError, TierDeniedError, shown
from spot_core.progress import byte_bar
from spot_core.report.checks.advice import advice, lacks_permission
from spot_core.report.checks.clock import Stamp
from spot_core.report.checks.finding import PROBLEM, Area, Finding
from spot_core.report.checks.local import PROBE, no_new_folders
from spot_core.report.units import duration, size
from spot_core.store import layout
from spot_core.store.posix import PosixTier
from spot_core.store.tier import Dated, ObjectStore, Tier, check_record, digest_file

AREA = Area("remote")

PATIENCE_S = 20.0
# Of an upload: a slower remote than this keeps no run safe.
_SLOWEST_BYTES_PER_S = 1e6

_LIST, _READ, _WRITE, _DELETE = "s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"
_LIST_UPLOADS, _ABORT = "s3:ListBucketMultipartUploads", "s3:AbortMultipartUpload"
_SWEEPS = "it serves to clear away what kills cut off: or set a lifecycle rule that aborts incomplete uploads"


class RemoteProbe:
    """The remote as it proves itself. upload_s, read_s: of the sample; stamp: of a small record.

    patience_s: for each answer. is_away: no more of them are to be waited for.
    """

    def __init__(self, tier: Tier, *, patience_s: float = PATIENCE_S) -> None:
        from spot_core.store.remote import FsspecTier  # brings fsspec, which `spot --help` does without

        self.tier = tier
        self._fsspec = tier if isinstance(tier, FsspecTier) else None
        self._bucket = self._fsspec.bucket if self._fsspec is not None else None
        self._patience_s = patience_s
        self.findings: list[Finding] = []
        self.upload_s: float | None = None
        self.read_s: float | None = None
        self.stamp: Stamp | None = None
        self.is_away = False
        self._scratch = f"{PROBE}{uuid.uuid4().hex[:12]}"
        self._record, self._claim = f"{self._scratch}/record.json", f"{self._scratch}/claim.json"
        self._unfinished, self._sample = f"{self._scratch}/unfinished.bin", f"{self._scratch}/sample.bin"
        self._data = f'{{"token": "{uuid.uuid4().hex}"}}\n'.encode()
        self._is_listed = self._may_exist = self._is_written = self._is_read = False
        self._uploads: list[str] = []
        self._remove_folders: Callable[[], None] = lambda: None

    def reach(self) -> None:
        """List the run's folder. Without an answer, or credentials, nothing else is tried."""
        found = self._check("list", _LIST, self._list)
        self._is_listed = found is not None and found.status != PROBLEM

    def run(self, sample: Path | None) -> None:
        """Try everything else. sample: a file to upload, None if there is none."""
        if self.is_away:
            return
        with contextlib.ExitStack() as stack:
            if isinstance(self.tier, PosixTier):
                stack.enter_context(no_new_folders(self.tier.root))
            stack.callback(self._clean)
            self._check("write", _WRITE, self._write)
            self._check("read", _READ, self._read)
            if self._is_read:
                self._check("create", _WRITE, self._create)
                self._check("conditional write", _WRITE, self._try_overwrite)
                self._check("replace", _WRITE, self._replace)
            if self._may_exist:
                self._check("delete", _DELETE if self._is_listed else _LIST, self._delete)
            self._check_uploads()
            self._check_upload(sample)

    def _check(
        self, what: str, permission: str, operation: Callable[[], Finding], *, more_s: float = 0.0
    ) -> Finding | None:
        """Note what `operation` finds, or how it failed; None if it was not tried."""
        if self.is_away:
            return None
        try:
            found = within(self._patience_s + more_s, operation)
        except NoAnswer as error:
            self.is_away = True
            found = AREA.problem(what, f"{self.tier.url}: {error}", advice(error, permission, self.tier.url))
        except Exception as error:
            self.is_away = what == "list" and not lacks_permission(error)
            found = AREA.problem(what, _told(error), advice(error, permission, self.tier.url))
        self.findings.append(found)
        return found

    def _list(self) -> Finding:
        entries = self.tier.list("")
        if left := [entry for entry in entries if entry.startswith(PROBE)]:
            return AREA.warning(
                "list",
                f"{self.tier.url} holds {', '.join(left)}, of a check that was killed or is still at work",
                "delete it unless another spot doctor is at work: no run needs it",
            )
        return AREA.ok("list", f"{self.tier.url} {'is there' if entries else 'is empty, or not there yet'}")

    def _write(self) -> Finding:
        if self._fsspec is not None:
            self._remove_folders = self._fsspec.make_root()
        self._may_exist = True  # an error, too, may come after the fact
        began = time.time()
        try:
            self.tier.replace(self._record, self._data)
        except TierDeniedError:
            self._may_exist = False
            raise
        ended = time.time()
        self._is_written = True
        self.stamp = Stamp(began=began, ended=ended, stored=None)
        return AREA.ok("write", f"a record is written in {duration(ended - began)}", write_s=round(ended - began, 4))

    def _read(self) -> Finding:
        try:
            found = self.tier.read(self._record if self._is_written else layout.RUN)
        except FileNotFoundError:
            if self._is_written:
                return self._lies("read", "what was written is not there")
            return AREA.ok("read", "allowed; there is nothing to read")
        if self._is_written and found != self._data:
            return self._lies("read", "what is read is not what was written")
        self._is_read = self._is_written
        if self.stamp is not None and isinstance(self.tier, Dated):
            self.stamp = replace(self.stamp, stored=self.tier.modified_unix_s(self._record))
        return AREA.ok("read", "what was written is read back")

    def _create(self) -> Finding:
        self.tier.create(self._claim, self._data)
        return AREA.ok("create", "a record can be created that must not exist")

    def _try_overwrite(self) -> Finding:
        what = "conditional write"
        if isinstance(self.tier, ObjectStore) and not self.tier.refuses_overwrite(self._claim, self._data):
            return AREA.warning(
                what,
                "this store does not refuse to overwrite: of two jobs that are started for one run at the same moment "
                "only a check some seconds after the claim stops one",
                "start one job at a time, or use a store with conditional writes (If-None-Match)",
            )
        try:
            self.tier.create(self._claim, b"{}\n")
        except CommitConflictError:
            return AREA.ok(what, "refused where there is a file already")
        return self._lies(what, "a create-only write went over what was there")

    def _replace(self) -> Finding:
        data = self._data * 2
        self.tier.replace(self._record, data)
        if self.tier.read(self._record) != data:
            return self._lies("replace", "the old content is read after it was replaced")
        return AREA.ok("replace", "the new content is read at once")

    def _check_upload(self, sample: Path | None) -> None:
        """Last, since it is large: only what can be deleted is written."""
        if sample is None:
            self.findings.append(AREA.skipped("upload", "there is no file to upload: see the local tier"))
        elif self._may_exist:
            self.findings.append(AREA.skipped("upload", "not tried: what cannot be deleted again would stay"))
        elif self._is_read:
            more_s = 2 * sample.stat().st_size / _SLOWEST_BYTES_PER_S
            self._check("upload", _WRITE, lambda: self._upload(sample), more_s=more_s)

    def _upload(self, sample: Path) -> Finding:
        path, total, done = self._sample, sample.stat().st_size, 0
        self._uploads.append(path)
        self._may_exist = True
        wanted = digest_file(sample)
        began = time.perf_counter()
        with byte_bar("uploading") as on_progress:

            def on_bytes(number: int) -> None:
                nonlocal done
                done += number
                on_progress(done, total)

            attested = self.tier.upload(sample, path, on_bytes)
        self._uploads.remove(path)
        uploaded = time.perf_counter()
        try:
            check_record(self.tier.record(path), wanted, self.tier.url)
        except CorruptCheckpointError as error:
            return self._lies("upload", str(error))
        self.upload_s, self.read_s = uploaded - began, time.perf_counter() - uploaded
        which = "the first checkpoint of a life: the store attests what it holds" if attested else "every checkpoint"
        speeds = [total / max(seconds, 1e-9) for seconds in (self.upload_s, self.read_s)]
        return AREA.ok(
            "upload",
            f"{size(total)} uploaded in {duration(self.upload_s)}, {size(speeds[0])}/s, and read back whole in "
            f"{duration(self.read_s)}, {size(speeds[1])}/s, as {which}",
            upload_bytes_per_s=round(speeds[0]),
            read_bytes_per_s=round(speeds[1]),
        )

    def _check_uploads(self) -> None:
        """On S3, whether a life may clear away uploads that the one before did not end."""
        bucket = self._bucket
        if bucket is None or self.is_away:
            return
        path = self._unfinished
        self._uploads.append(path)
        begun: list[str] = []

        def begin() -> Finding:
            begun.append(bucket.begin_upload(path))
            return AREA.ok("begin upload", "an upload in parts can be begun")

        def find() -> Finding:
            listed = bucket.unfinished_uploads(path)
            if begun and begun[0] not in listed:
                return AREA.warning("list uploads", "an upload that was begun is not listed", _SWEEPS)
            return AREA.ok("list uploads", "unfinished ones are found")

        def abort() -> Finding:
            try:
                bucket.abort_upload(path, begun[0])
            except Exception:
                bucket.complete_upload(path, begun[0])  # a file can be deleted, an upload cannot
                self._may_exist = True
                raise
            finally:
                self._uploads.remove(path)
            return AREA.ok("abort upload", "unfinished ones can be cleared away")

        self._check("begin upload", _WRITE, begin)
        self._milder(self._check("list uploads", _LIST_UPLOADS, find))
        if begun:
            self._milder(self._check("abort upload", _ABORT, abort))

    def _milder(self, found: Finding | None) -> None:
        """A run does without it."""
        if found is not None and found.status == PROBLEM:
            self.findings[-1] = AREA.warning(found.what, found.detail, f"{found.fix}; {_SWEEPS}")

    def _delete(self) -> Finding:
        self.tier.delete([self._scratch])
        if left := self.tier.list(self._scratch):  # some clients do not tell that a store refused
            raise TierDeniedError(f"{self.tier.url}/{self._scratch} is still there: {', '.join(left)}")
        self._may_exist = False
        return AREA.ok("delete", "what was written is gone again")

    def _clean(self) -> None:
        """Whatever happened: nothing is to stay."""
        try:
            if self._uploads:
                within(self._patience_s, self._abort_uploads)
            if self._may_exist:
                within(self._patience_s, self._delete_or_name)
            within(self._patience_s, self._remove_folders)
        except Exception as error:
            self.findings.append(
                AREA.problem(
                    "clean up",
                    f"{self.tier.url}/{self._scratch} may be left: {_told(error)}",
                    "delete it by hand: no run needs it",
                )
            )

    def _delete_or_name(self) -> None:
        try:
            self._delete()
        except Exception:
            if self._bucket is None:
                raise
            for path in (self._record, self._claim, self._unfinished, self._sample):  # needs no listing
                self._bucket.delete_file(path)

    def _abort_uploads(self) -> None:
        bucket = self._bucket
        if bucket is None:
            return
        with contextlib.suppress(Exception):  # told by the check of it
            for path in self._uploads:
                for upload_id in bucket.unfinished_uploads(path):
                    bucket.abort_upload(path, upload_id)

    def _lies(self, what: str, detail: str) -> Finding:
        fix = "use another store: this one does not do what it says"
        return AREA.problem(what, f"{self.tier.url}: {detail}", fix)


def _told(error: Exception) -> str:
    from spot_core.store import s3  # brings fsspec, which `spot --help` does without

    text = error.strerror if isinstance(error, OSError) and error.strerror else s3.reason(error)
    return shown(text)[:500]
