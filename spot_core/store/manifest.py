"""The manifest: the commit record of a checkpoint. A checkpoint exists if and only if its manifest exists.

Small JSON with a format version. `from_json` trusts nothing: it refuses unknown versions, paths that leave the
checkpoint's folder, duplicate paths and absurd sizes, so that a damaged manifest is found before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

from spot_core.errors import CorruptCheckpointError
from spot_core.store.layout import CheckpointName

FORMAT_VERSION = 1
DIGEST = "blake3"
_LARGEST_FILE_BYTES = 1 << 50


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

    @property
    def step(self) -> int:
        return self.name.step

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def to_json(self) -> bytes:
        body = asdict(self)
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
            body = json.loads(data)
            if not isinstance(body, dict):
                raise TypeError("not an object")
            if body["format_version"] != FORMAT_VERSION:
                raise CorruptCheckpointError(
                    f"manifest {name} has format version {body['format_version']!r}, this release reads "
                    f"{FORMAT_VERSION}: upgrade spot-callbacks to resume from it; nothing was changed"
                )
            if body["name"] != str(name) or body["digest"] != DIGEST:
                raise ValueError(f"it names {body['name']!r} with digest {body['digest']!r}")
            files = tuple(FileRecord(f["path"], f["bytes"], f["digest"]) for f in body["files"])
            _check_files(files)
            known = {slot for slot in cls.__slots__ if slot in body}
            values = {key: body[key] for key in known}
            values |= {"name": name, "files": files, "notes": tuple(body.get("notes", ()))}
            values["pins"] = _pin(body.get("pins"))
            manifest = cls(**values)
            _check_fields(manifest)
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptCheckpointError(f"manifest {name} is damaged: {error!r}") from error


def _check_files(files: tuple[FileRecord, ...]) -> None:
    if not files:
        raise ValueError("it lists no files")
    seen = set()
    for file in files:
        path = _inside(file.path)
        if path in seen:
            raise ValueError(f"path {file.path!r} is listed twice")
        if type(file.bytes) is not int or not 0 <= file.bytes <= _LARGEST_FILE_BYTES or len(file.digest) != 64:
            raise ValueError(f"record of {file.path!r} is not plausible")
        seen.add(path)


def _check_fields(manifest: Manifest) -> None:
    _inside(manifest.native)
    texts = (manifest.run, manifest.framework, *manifest.notes)
    numbers = (manifest.epoch, manifest.useful_s, manifest.created)
    mappings = (manifest.versions, manifest.world, manifest.loggers)
    if not (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, (int, float)) for number in numbers)
        and all(isinstance(mapping, Mapping) for mapping in mappings)
        and isinstance(manifest.base_fingerprint, (str, type(None)))
    ):
        raise ValueError("a field has the wrong type")


def _inside(text: str) -> str:
    """The path in one spelling. Raises ValueError if it leaves the checkpoint's folder."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in text or "\0" in text:
        raise ValueError(f"path {text!r} leaves the checkpoint's folder")
    return str(path)


def _pin(text: str | None) -> CheckpointName | None:
    if text is None:
        return None
    name = CheckpointName.parse(text)
    if name is None:
        raise ValueError(f"it pins {text!r}")
    return name
