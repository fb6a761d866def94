"""Signing keys: from a file or from `SPOT_SIGNING_KEY`, one a line, never shown."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from spot_core.errors import ConfigError, check

SIGNING_KEY = "SPOT_SIGNING_KEY"

_SHORTEST_KEY_BYTES = 16
_LONGEST_KEY_FILE_BYTES = 64 << 10


def signing_keys_from(environ: Mapping[str, str], file: str | None) -> tuple[str, ...]:
    """The keys of a file or of `SPOT_SIGNING_KEY`, one a line; empty if neither is given.

    Raises ConfigError, which never repeats a key: both are given, the variable is empty, a key is too short.
    """
    text = environ.get(SIGNING_KEY)
    if text is None:
        return read_keys(file) if file is not None else ()
    if file is not None:
        raise ConfigError(
            f"{SIGNING_KEY} and signing_key_file={file!r} are both given: which of them signs? Keep one. To change "
            "the key write the new one and the old one to one file, the new one first"
        )
    keys = _lines(text)
    # An empty one is a secret that did not arrive, and must not turn signatures off.
    check_keys(keys, SIGNING_KEY, "…", least=1)
    return keys


def read_keys(file: object) -> tuple[str, ...]:
    allowed = f"a readable file with one key of {_SHORTEST_KEY_BYTES} bytes or more a line"
    check(isinstance(file, (str, Path)) and bool(str(file)), "signing_key_file", file, allowed)
    try:
        with open(Path(str(file)).expanduser(), "rb") as opened:
            data = opened.read(_LONGEST_KEY_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"signing_key_file={file!r} is not valid: it must be {allowed} ({reason})") from None
    check(len(data) <= _LONGEST_KEY_FILE_BYTES, "signing_key_file", file, f"{allowed}, and below 64 KiB")
    keys = _lines(text)
    check_keys(keys, "signing_key_file", file, least=1)
    return keys


def check_keys(keys: object, name: str, value: object, *, least: int = 0) -> None:
    allowed = f"keys of {_SHORTEST_KEY_BYTES} bytes or more, one a line, such as openssl rand -hex 32 prints"
    is_plain = isinstance(keys, tuple) and all(isinstance(key, str) for key in keys)
    check(is_plain and all(len(key.encode()) >= _SHORTEST_KEY_BYTES for key in keys), name, value, allowed)  # type: ignore[attr-defined]
    check(len(keys) >= least, name, value, f"{allowed}: there is none")  # type: ignore[arg-type]


def describe_key_file(file: str | None) -> str | None:
    """What a user should know about who can read the key file, None if nothing."""
    try:
        mode = Path(file).expanduser().stat().st_mode if file is not None else 0
    except OSError:
        return None
    if not mode & (stat.S_IRGRP | stat.S_IROTH):
        return None
    return (
        f"the signing key file {file} can be read by other users of this machine (mode {stat.S_IMODE(mode):04o}): "
        "who reads it can sign. chmod 600 it"
    )


def _lines(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.splitlines())))
