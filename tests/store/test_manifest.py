"""The manifest: what is written comes back, and nothing that is damaged gets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spot_core.errors import CorruptCheckpointError
from spot_core.store import layout
from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import FileRecord, Manifest

NAME = CheckpointName(3, 1200)
DIGEST = "ab" * 32
FULL = Manifest(
    run="my-run",
    name=NAME,
    epoch=1.5,
    useful_s=312.25,
    created=1_700_000_000.5,
    framework="hf",
    native="checkpoint-1200",
    files=(
        FileRecord("checkpoint-1200/model.safetensors", 12, DIGEST),
        FileRecord("state.bin", 0, DIGEST),
        FileRecord("checkpoint-1200/config.json", 0, DIGEST),
    ),
    versions={"torch": "2.13.0"},
    world={"world_size": 2},
    notes=("world size 2 -> 1",),
    loggers={"wandb": "abc"},
    base_fingerprint="fingerprint",
    pins=CheckpointName(2, 900),
)


def test_everything_comes_back() -> None:
    assert Manifest.from_json(FULL.to_json(), name=NAME) == FULL


def test_defaults_come_back() -> None:
    plain = replace(FULL, versions={}, world={}, notes=(), loggers={}, base_fingerprint=None, pins=None)
    assert Manifest.from_json(plain.to_json(), name=NAME) == plain


def test_fields_of_a_later_release_of_the_same_format_are_ignored() -> None:
    body = json.loads(FULL.to_json())
    assert Manifest.from_json(json.dumps({**body, "new_field": [1]}).encode(), name=NAME) == FULL


def test_its_size_is_that_of_its_files() -> None:
    assert (FULL.step, FULL.total_bytes) == (1200, 12)


Change = Callable[[dict[str, Any]], object]


def _file(**changes: Any) -> Change:
    return lambda body: body["files"][0].update(changes)


def _field(**changes: Any) -> Change:
    return lambda body: body.update(changes)


def _without(key: str) -> Change:
    return lambda body: body.pop(key)


BAD: dict[str, Change] = {
    "a later format": _field(format_version=2),
    "a format that is text": _field(format_version="1"),
    "no format": _without("format_version"),
    "another name": _field(name="000003-000000001201"),
    "another digest": _field(digest="md5"),
    "no files": _field(files=[]),
    "files that are none": _field(files=[1]),
    "files missing": _without("files"),
    "an absolute path": _file(path="/etc/passwd"),
    "a path to the parent": _file(path="../000003-000000001100/model.bin"),
    "a path to the parent in the middle": _file(path="a/../../b"),
    "a path that is the folder": _file(path="."),
    "an empty path": _file(path=""),
    "a path with a backslash": _file(path="..\\model.bin"),
    "a path with a zero byte": _file(path="model\0.bin"),
    "a path that is a number": _file(path=7),
    "the same path twice": _file(path="state.bin"),
    "the same path in two spellings": _file(path=".//state.bin"),
    "the same path in another spelling later": lambda body: body["files"][1].update(
        path="./checkpoint-1200//model.safetensors"
    ),
    "a negative size": _file(bytes=-1),
    "an absurd size": _file(bytes=1 << 60),
    "an infinite size": _file(bytes=float("inf")),
    "a size that is no number": _file(bytes=float("nan")),
    "a size with a fraction": _file(bytes=1.5),
    "a size that is text": _file(bytes="12"),
    "a size that is a truth value": _file(bytes=True),
    "a short digest": _file(digest="ab"),
    "no digest": lambda body: body["files"][0].pop("digest"),
    "a native path to the parent": _field(native="../../elsewhere"),
    "an absolute native path": _field(native="/etc"),
    "a native path that is none": _field(native=None),
    "a pin that is no name": _field(pins="best"),
    "a pin that is a number": _field(pins=7),
    "a time that is none": _field(created=None),
    "a time that is text": _field(useful_s="long"),
    "an epoch that is a list": _field(epoch=[]),
    "no run": _without("run"),
    "a run that is a number": _field(run=7),
    "versions that are a list": _field(versions=[]),
    "a world that is none": _field(world=None),
    "notes that are numbers": _field(notes=[1]),
    "a fingerprint that is a number": _field(base_fingerprint=7),
    "another step": _field(step=1201),
    "another incarnation": _field(incarnation=4),
    "a step that is no whole number": _field(step=1200.0),
    "a name without end": _field(name="0" * 100_000),
    "a step that is text": _field(step="1200"),
    "an incarnation that is a truth value": _field(incarnation=True),
    "no step": _without("step"),
    "the same path in other letters": _file(path="STATE.bin"),
    "the same path with another accent": lambda body: [
        file.update(path=path) for file, path in zip(body["files"], ("\u00e9.bin", "e\u0301.bin"), strict=False)
    ],
    "a file that is a folder too": _file(path="state.bin/model"),
    "a file that is a folder too, in other letters": _file(path="State.BIN/model"),
    "a path with a dot in the middle": _file(path="checkpoint-1200/./model"),
    "a path with a slash at the end": _file(path="checkpoint-1200/model/"),
    "a path with a line break": _file(path="checkpoint-1200/model\nspot: resume"),
    "a path with a terminal's escape": _file(path="checkpoint-1200/\x1b[2Jmodel"),
    "a path that turns the text around": _file(path="checkpoint-1200/\u202elebom"),
    "a path that is half a character": _file(path="checkpoint-1200/\ud800"),
    "a name that no file system takes": _file(path="checkpoint-1200/" + "m" * 256),
    "a path that no object store takes": _file(path="checkpoint-1200/" + "deep/" * 200 + "model"),
    "more bytes in one file than any store takes": _file(bytes=(1 << 46) + 1),
    "more bytes in all than any store holds": lambda body: body.update(
        files=[{**body["files"][0], "path": f"checkpoint-1200/{index}", "bytes": 1 << 46} for index in range(20)]
    ),
    "more files than any checkpoint": lambda body: body["files"].extend(
        {**body["files"][0], "path": f"checkpoint-1200/{index}"} for index in range(100_000)
    ),
    "a digest that is not hex": _file(digest="xy" * 32),
    "a digest in capitals": _file(digest="AB" * 32),
    "a digest with a line break": _file(digest="ab" * 32 + "\n"),
    "a digest that is a number": _file(digest=7),
    "a native part that no file belongs to": _field(native="checkpoint-12"),
    "an epoch that is no number": _field(epoch=float("nan")),
    "a time without end": _field(created=float("inf")),
    "a time before all": _field(useful_s=-1.0),
    "a time that is a truth value": _field(useful_s=True),
    "a number with 400 digits": _field(epoch=10**400),
    "a version that is a number": _field(versions={"torch": 2}),
    "a world that is text": _field(world={"world_size": "2"}),
    "a tracker's id that is a list": _field(loggers={"wandb": ["abc"]}),
    "a run's name without end": _field(run="r" * 10_001),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_manifest_is_refused(kind: str) -> None:
    body = json.loads(FULL.to_json())
    BAD[kind](body)
    with pytest.raises(CorruptCheckpointError, match="000003-000000001200") as caught:
        Manifest.from_json(json.dumps(body).encode(), name=NAME)
    assert len(str(caught.value)) < 500, "a log line must not be as long as what is absurd"


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"7", b'"text"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format_version": 1}', b"\0" * 600],
    ids=["empty", "null", "list", "number", "text", "object", "no text", "deep", "short", "zeros"],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        Manifest.from_json(data, name=NAME)


def test_a_manifest_cut_anywhere_is_refused() -> None:
    data = FULL.to_json().rstrip()
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            Manifest.from_json(data[:length], name=NAME)


def test_a_manifest_that_is_absurdly_large_is_not_parsed() -> None:
    """As objects in memory its JSON would take many times the bytes."""
    data = FULL.to_json().replace(b"{", b"{" + b" " * (16 << 20), 1)
    with pytest.raises(CorruptCheckpointError, match="bytes"):
        Manifest.from_json(data, name=NAME)


def test_what_it_was_read_from_is_what_a_copy_gets() -> None:
    """What a later release wrote is not lost on the way from one tier to the other."""
    data = json.dumps({**json.loads(FULL.to_json()), "new_field": [1]}).encode()
    read = Manifest.from_json(data, name=NAME)
    assert read.to_json() == data
    assert replace(read, epoch=2.0).to_json() == replace(FULL, epoch=2.0).to_json(), "a changed one is written anew"


def test_a_manifest_cannot_bring_its_own_bytes() -> None:
    body = {**json.loads(FULL.to_json()), "_stored": "text"}
    data = json.dumps(body).encode()
    assert Manifest.from_json(data, name=NAME).to_json() == data


def test_a_later_format_says_what_to_do() -> None:
    data = FULL.to_json().replace(b'"format_version": 1', b'"format_version": 2')
    with pytest.raises(CorruptCheckpointError, match=r"version 2.*upgrade"):
        Manifest.from_json(data, name=NAME)


# -- names -----------------------------------------------------------------------------------------------------


def test_names_order_by_incarnation_then_step() -> None:
    names = [CheckpointName(2, 5), CheckpointName(10, 1), CheckpointName(2, 40), CheckpointName(1, 10**11)]
    ordered = [CheckpointName(1, 10**11), CheckpointName(2, 5), CheckpointName(2, 40), CheckpointName(10, 1)]
    assert sorted(names) == ordered
    assert sorted(map(str, names)) == list(map(str, ordered))


def test_names_come_back() -> None:
    for name in (NAME, CheckpointName(0, 0), CheckpointName(999_999, 10**12 - 1)):
        assert CheckpointName.parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3-1200",
        "000003-000000001200.json",
        "x000003-000000001200",
        "000003_000000001200",
        "000003-000000001200\n",
        "00000\u0663-000000001200",
    ],
)
def test_other_texts_are_no_names(text: str) -> None:
    assert CheckpointName.parse(text) is None


def test_entries_of_the_manifests_folder_are_told_apart() -> None:
    entries = [f"{NAME}.json", f"{NAME}.complete.json", str(NAME), f".tmp-1-{NAME}.json", f"{NAME}.json.bak"]
    assert [layout.committed(entry) for entry in entries] == [NAME, None, None, None, None]
    assert [layout.completed(entry) for entry in entries] == [None, NAME, None, None, None]


def test_numbered_entries_are_told_apart() -> None:
    entries = ["000003.json", "3.json", "000003.json.bak", "000003", "00000a.json", ".tmp-1-000003.json"]
    entries += ["00000\u00b2.json", "00000\u0663.json"]
    assert [layout.numbered(entry) for entry in entries] == [3, *[None] * 7]
