"""The manifest: the commit record of a checkpoint. A checkpoint exists if and only if its manifest exists.

Small JSON with a format version. `from_json` trusts nothing: it refuses unknown versions, paths that leave the
checkpoint's folder, that no file system could hold or that meet on one which ignores case, absurd sizes and numbers, so
that a damaged or a hostile manifest is found before it is used. The limits below are far above what training writes.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from spot_core.errors import CorruptCheckpointError, NewerFormatError
from spot_core.store.layout import CheckpointName
from spot_core.store.signing import JSON_BYTES, is_signed

FORMAT_VERSION = 1
DIGEST = "blake3"
MOST_FILES = 100_000
LARGEST_FILE_BYTES = 1 << 46
LARGEST_TOTAL_BYTES = 1 << 50
LONGEST_PATH_BYTES = 900  # an object's key may have 1,024, with the run's own
LONGEST_NAME_BYTES = 255
LONGEST_TEXT = 10_000
_LONGEST_REASON = 300

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: path relative to its folder, length in bytes, blake3 hex digest."""

    path: str
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was committed, by whom, at which moment of training.

    native: folder or file inside the checkpoint that stock tools load, such as `checkpoint-1200`.
    useful_s: seconds of training that led to this state, over all lives. created: Unix time.
    world: world size and batch geometry. notes: why a resume from here would not be bit-exact, if so.
    pins: another checkpoint that must be kept with this one (the best model).
    """

    run: str
    name: CheckpointName
    epoch: float
    useful_s: float
    created: float
    framework: str
    native: str
    files: tuple[FileRecord, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    world: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    loggers: Mapping[str, str] = field(default_factory=dict)
    base_fingerprint: str | None = None
    pins: CheckpointName | None = None
    # What it was read from: a copy has the same bytes, and so what a later release wrote, and the signature.
    _stored: bytes | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def step(self) -> int:
        return self.name.step

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def is_signed(self) -> bool:
        """Whether it was read with a signature, whoever made it."""
        return self._stored is not None and is_signed(self._stored)

    def to_json(self) -> bytes:
        """The bytes that it was read from, where it was."""
        if self._stored is not None:
            return self._stored
        body = asdict(self)
        del body["_stored"]
        body.update(
            format_version=FORMAT_VERSION,
            digest=DIGEST,
            name=str(self.name),
            incarnation=self.name.incarnation,
            step=self.name.step,
            pins=str(self.pins) if self.pins else None,
        )
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, *, name: CheckpointName) -> Manifest:
        """Parse and check. Raises CorruptCheckpointError with the reason."""
        try:
            if len(data) > JSON_BYTES:
                raise ValueError(f"it has {len(data)} bytes")
            body = json.loads(data, parse_constant=_no_number)
            if not isinstance(body, dict):
                raise TypeError("not an object")
            version = body["format_version"]
            if type(version) is int and version > FORMAT_VERSION:
                raise NewerFormatError(
                    f"manifest {name} has format version {version}, this release reads {FORMAT_VERSION}: upgrade "
                    "spot-callbacks to resume from it; nothing was changed"
                )
            if version != FORMAT_VERSION:
                raise ValueError(f"its format version is {version!r}")
            if body["name"] != str(name) or body["digest"] != DIGEST:
                raise ValueError(f"it names {body['name']!r} with digest {body['digest']!r}")
            for key, value in (("incarnation", name.incarnation), ("step", name.step)):
                if type(body[key]) is not int or body[key] != value:
                    raise ValueError(f"it says {key} {body[key]!r}")
            if len(body["files"]) > MOST_FILES:
                raise ValueError(f"it lists {len(body['files'])} files")
            files = tuple(FileRecord(f["path"], f["bytes"], f["digest"]) for f in body["files"])
            _check_files(files)
            values = {slot.name: body[slot.name] for slot in fields(cls) if slot.init and slot.name in body}
            values |= {"name": name, "files": files, "notes": tuple(body.get("notes", ()))}
            values["pins"] = _pin(body.get("pins"))
            manifest = cls(**values)
            _check_fields(manifest)
            object.__setattr__(manifest, "_stored", bytes(data))
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            reason = repr(error)  # it may repeat what is absurdly long
            raise CorruptCheckpointError(f"manifest {name} is damaged: {reason[:_LONGEST_REASON]}") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _check_files(files: tuple[FileRecord, ...]) -> None:
    if not files:
        raise ValueError("it lists no files")
    folders: set[str] = set()
    seen: set[str] = set()
    for file in files:
        path = _one_spelling(_inside(file.path))
        if path in seen:
            raise ValueError(f"path {file.path!r} is listed twice")
        if type(file.bytes) is not int or not 0 <= file.bytes <= LARGEST_FILE_BYTES:
            raise ValueError(f"{file.path!r} has {file.bytes!r} bytes")
        if not _DIGEST.fullmatch(file.digest):
            raise ValueError(f"the digest of {file.path!r} is {file.digest!r}")
        seen.add(path)
        folders.update(map(str, PurePosixPath(path).parents))
    if both := seen & folders:
        raise ValueError(f"path {min(both)!r} is a file and a folder")
    if sum(file.bytes for file in files) > LARGEST_TOTAL_BYTES:
        raise ValueError("its files have more bytes than any checkpoint")


def _check_fields(manifest: Manifest) -> None:
    native = _inside(manifest.native)
    if not any(file.path == native or file.path.startswith(f"{native}/") for file in manifest.files):
        raise ValueError(f"it lists no file of its native part {native!r}")
    fingerprint = () if manifest.base_fingerprint is None else (manifest.base_fingerprint,)
    labels = (manifest.versions, manifest.loggers)
    if not (
        all(map(_is_text, (manifest.run, manifest.framework, *manifest.notes, *fingerprint)))
        and all(map(_is_number, (manifest.epoch, manifest.useful_s, manifest.created)))
        and all(isinstance(mapping, Mapping) for mapping in (*labels, manifest.world))
        and all(_is_text(key) and _is_text(value) for mapping in labels for key, value in mapping.items())
        and all(_is_text(key) and isinstance(value, int) for key, value in manifest.world.items())
    ):
        raise ValueError("a field has the wrong type, or a value that none can have")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _inside(text: str) -> str:
    """`text`, a plain path below the checkpoint's folder. Raises ValueError if it is not one."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in text:
        raise ValueError(f"path {text!r} leaves the checkpoint's folder")
    if str(path) != text or not text.isprintable():
        raise ValueError(f"path {text!r} is not spelt plainly")
    is_short = all(len(part.encode()) <= LONGEST_NAME_BYTES for part in path.parts)
    if not is_short or len(text.encode()) > LONGEST_PATH_BYTES:
        raise ValueError(f"path {text[:50]!r}… is too long")
    return text


def _one_spelling(path: str) -> str:
    """What a file system sees that ignores case and how accents are encoded."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _pin(text: str | None) -> CheckpointName | None:
    if text is None:
        return None
    name = CheckpointName.parse(text)
    if name is None:
        raise ValueError(f"it pins {text!r}")
    return name
