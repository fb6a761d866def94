"""Damage as data: what may happen to the bytes of a file, and to a JSON record that somebody wrote on purpose."""

from __future__ import annotations

import json
import random
from typing import Any

_MARK = "the place of something else"

# JSON texts that no record holds where they are put.
ODD = [
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1.5",
    str(1 << 63),
    str(1 << 80),
    "9" * 5_000,
    "1e308",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    '""',
    '"x"',
    '"' + "x" * 100_000 + '"',
    '"../../../../../etc/passwd"',
    '"../000001-000000000010/checkpoint-10/model.safetensors"',
    '"/etc/passwd"',
    '"a/../../b"',
    '"a\\u0000b"',
    '"\\ud800"',
    '"\\u202e\\u0007\\u001b[2J"',
    '"checkpoint-20/MODEL.safetensors"',
    '"C:\\\\windows"',
    '"000001-000000000010"',
    '"000009-000000000020"',
    '"999999-999999999999"',
    '"' + "0" * 64 + '"',
    "[]",
    "{}",
    "[null]",
    '{"": {}}',
    "[" * 50_000 + "]" * 50_000,
    '{"a":' * 20_000 + "1" + "}" * 20_000,
    "[" + ",".join(["0"] * 20_000) + "]",
]


def damage_bytes(data: bytes, source: random.Random) -> bytes:
    """`data` with bits flipped, cut, lengthened, overwritten, or replaced by something else; never as it was."""
    while True:
        damaged = bytearray(data)
        kind = source.choice(["flip", "flip", "cut", "append", "splice", "drop", "other", "zeros"])
        at = source.randrange(len(data) + 1)
        if kind == "flip" and data:
            for _ in range(source.choice([1, 1, 2, 30])):
                damaged[source.randrange(len(data))] ^= 1 << source.randrange(8)
        elif kind == "cut":
            del damaged[at:]
        elif kind == "append":
            damaged += source.randbytes(source.choice([1, 8, 4_096]))
        elif kind == "splice":
            damaged[at : at + 8] = source.randbytes(source.choice([1, 8, 64]))
        elif kind == "drop":
            del damaged[at : at + source.choice([1, 8, 64])]
        elif kind == "other":
            damaged = bytearray(source.choice([b"", b"{}", b"[]", b"\xff\xfe", b"PK\x03\x04", source.randbytes(300)]))
        elif kind == "zeros":
            damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
        if bytes(damaged) != data:
            return bytes(damaged)


def damage_json(data: bytes, source: random.Random) -> bytes:
    """The record with one thing in it replaced, left out, renamed, doubled or added; never as it was."""
    while True:
        body = json.loads(data)
        place, key = source.choice(_places(body))
        odd, kind = source.choice(ODD), source.choice(["replace"] * 4 + ["leave out", "rename", "double", "add"])
        if kind == "leave out":
            del place[key]
        elif kind == "rename" and isinstance(place, dict):
            place[source.choice(["", "x" * 300, "\ud800", key.upper()])] = place.pop(key)
        elif kind == "double" and isinstance(place, dict):
            # Twice the same key: of the two values the parser takes the later one.
            place[f"{_MARK}{key}"] = _MARK
        elif kind == "add" and isinstance(place, list):
            place.append(source.choice([_MARK, place[key]]))
        else:
            place[key] = _MARK
        text = json.dumps(body).replace(f'"{_MARK}"', odd).replace(f'"{_MARK}', '"')
        damaged = text.encode()
        if _parsed(damaged) != json.loads(data):
            return damaged


def damage_record(data: bytes, source: random.Random) -> bytes:
    """Either of the two; never only spelt differently."""
    while True:
        damaged = source.choice([damage_bytes, damage_json, damage_json])(data, source)
        if _parsed(damaged) != json.loads(data):
            return damaged


def _places(tree: Any) -> list[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found: list[tuple[Any, Any]] = []
    for key, value in items:
        found += [(tree, key), *_places(value)]
    return found


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
