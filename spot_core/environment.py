"""Options in environment variables: their names, and what their text means."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from spot_core.errors import ConfigError

ENV_PREFIX = "SPOT_"
STORAGE_OPTIONS = "SPOT_STORAGE_OPTIONS"


def storage_options_from(environ: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object in `SPOT_STORAGE_OPTIONS`, empty if it is not set.

    Raises ConfigError, which never repeats the value: it may hold secrets.
    """
    text = environ.get(STORAGE_OPTIONS, "").strip()
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(
            f'{STORAGE_OPTIONS} is not valid: it must be a JSON object, such as {{"key": "…", "secret": "…"}}'
        )
    return options


def parse(name: str, text: str, hint: Any) -> Any:
    """The value that the variable of an option of type `hint` holds. Raises ConfigError naming the variable."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    variable = ENV_PREFIX + name.upper()
    if bool in kinds:
        lowered = text.strip().lower()
        if lowered not in {"1", "true", "yes", "on", "0", "false", "no", "off"}:
            raise ConfigError(f"{variable}={text!r} is not valid: it must be true or false")
        return lowered in {"1", "true", "yes", "on"}
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise ConfigError(f"{variable}={text!r} is not valid: it must be {_words(kind)}") from None
    return text


def _words(kind: type) -> str:
    return "a whole number" if kind is int else "a number"
