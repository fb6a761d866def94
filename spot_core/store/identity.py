"""Which run lives in a folder. Two different runs in one place are refused before anything is written."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spot_core.errors import CommitConflictError, ConfigError, CorruptCheckpointError
from spot_core.store import layout
from spot_core.store.manifest import FORMAT_VERSION
from spot_core.store.tier import Tier

_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What must stay the same for two lives to be one run.

    framework: the adapter's name. facts: readable name -> value, such as the fingerprint of the frozen base, the
    trainable shapes and the batch geometry. A difference in any of them is refused.
    """

    framework: str
    facts: Mapping[str, str | int]


def read_run(tier: Tier) -> dict[str, Any] | None:
    """The content of run.json, or None if there is none. Raises CorruptCheckpointError if it is damaged."""
    data = _record(tier)
    return None if data is None else _parsed(data, tier)


def _record(tier: Tier) -> bytes | None:
    try:
        return tier.read(layout.RUN)
    except FileNotFoundError:
        return None


def _parsed(data: bytes, tier: Tier) -> dict[str, Any]:
    try:
        body = json.loads(data)
        version = body["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise CorruptCheckpointError(
                f"{tier.url} was written by format version {version}, this release reads {FORMAT_VERSION}: upgrade "
                "spot-callbacks; nothing was changed"
            )
        return _checked(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = repr(error)[:_LONGEST_REASON]  # it may repeat what is absurdly long
        raise CorruptCheckpointError(f"{tier.url}/{layout.RUN} is damaged: {reason}") from error


def _checked(body: Mapping[str, Any]) -> dict[str, Any]:
    """What is used of run.json. Raises KeyError, TypeError or ValueError."""
    facts, created = dict(body["facts"]), body.get("created")
    if not (
        body["format_version"] == FORMAT_VERSION
        and isinstance(body["run_id"], str)
        and isinstance(body["framework"], str)
        and all(isinstance(value, str) or _is_number(value) for value in facts.values())
        and (created is None or _is_number(created))
    ):
        raise ValueError("a field has the wrong type, or a value that none can have")
    return {"run_id": body["run_id"], "framework": body["framework"], "facts": facts, "created": created}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_identity(stored: Mapping[str, Any] | None, now: RunIdentity, where: str) -> None:
    """Raise ConfigError, naming each difference, unless the folder is empty or holds this very run."""
    if stored is None:
        return
    then = {"framework": stored["framework"], **stored["facts"]}
    current = {"framework": now.framework, **now.facts}
    different = [
        f"  {fact}: {then.get(fact, 'not recorded')} there, {current.get(fact, 'not given')} now"
        for fact in sorted({*then, *current})
        if then.get(fact) != current.get(fact)
    ]
    if different:
        raise ConfigError(
            f"{where} holds a different run:\n" + "\n".join(different) + "\nNothing was read, written or deleted. "
            "Restore the setting to continue that run, or give this one its own name: another last component of "
            "`remote` (SPOT_REMOTE)."
        )


def check_same_run(local: Tier, stored: Mapping[str, Any] | None) -> None:
    """Raise ConfigError if the local folder belongs to a run of the same name in another bucket."""
    here = read_run(local)
    if here is None:
        return
    if stored is None or here["run_id"] != stored["run_id"]:
        raise ConfigError(
            f"the local folder {local.url} belongs to another run of the same name"
            + (": the remote holds no run yet" if stored is None else "")
            + ". Nothing was written or deleted. Use another run name or another local folder (SPOT_LOCAL), or "
            "remove that folder if its run is no longer needed."
        )


def create_run(local: Tier, remote: Tier, identity: RunIdentity, created: float) -> str:
    """Write run.json where it is missing and return the run id. Racing first lives agree on one.

    Raises ConfigError if the remote turns out to hold a different run.
    """
    data = _record(remote)
    if data is None:
        body = {
            "format_version": FORMAT_VERSION,
            "run_id": uuid.uuid4().hex,
            "framework": identity.framework,
            "facts": dict(identity.facts),
            "created": created,
        }
        try:
            remote.create(layout.RUN, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        except CommitConflictError:
            pass
        data = remote.read(layout.RUN)
    stored = _parsed(data, remote)
    # Also when it was there already: since the last look, another run's first life may have created it.
    check_identity(stored, identity, remote.url)
    if read_run(local) is None:
        local.create(layout.RUN, data)
    return str(stored["run_id"])


def agree(local: Tier, remote: Tier, now: RunIdentity) -> None:
    """Take over the remote's run.json, for stores that let racing first lives overwrite it.

    Raises ConfigError if it is a different run's now.
    """
    check_identity(read_run(remote), now, remote.url)
    data = remote.read(layout.RUN)
    if local.read(layout.RUN) != data:
        local.replace(layout.RUN, data)
