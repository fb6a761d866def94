"""Signatures of what a resume trusts: manifests and completion records, HMAC-SHA256 with a key the storage never sees.

Who can write to a bucket can put a checkpoint there. A signature covers the record's content, its path and the name of
the run, so that a record of another run, checkpoint or kind does not pass; the digests in a manifest cover the files.
Without keys nothing is signed and no signature is looked at. A record that is copied keeps its bytes and its signature.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Any

from spot_core.errors import CorruptCheckpointError

# What is parsed, at most: objects in memory take many times the bytes of their JSON.
JSON_BYTES = 16 << 20
_FIELD = "signature"
_ALGORITHM = "hmac-sha256"


@dataclass(frozen=True, slots=True)
class Signing:
    """Signs and checks the records of one run. keys: the first one signs, any of them verifies."""

    run: str = ""
    keys: tuple[str, ...] = field(default=(), repr=False)

    def signed(self, path: str, data: bytes) -> bytes:
        """The record to write at `path`: `data`, a JSON object, with a signature if there are keys.

        Raises CorruptCheckpointError if it is signed already and not by one of them.
        """
        if not self.keys:
            return data
        body = json.loads(data)
        if _FIELD in body:
            self.check(path, data, "(to be written)")
            return data
        body[_FIELD] = _signature(self.keys[0], self._message(path, body))
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()

    def check(self, path: str, data: bytes, where: str) -> None:
        """Raise CorruptCheckpointError unless there are no keys, or one of them signed the record of `path`.

        where: URL of the tier it was read from.
        """
        if not self.keys:
            return
        try:
            if len(data) > JSON_BYTES:
                raise ValueError(f"it has {len(data)} bytes")
            body = json.loads(data)
            found = body.pop(_FIELD, None)
            message = self._message(path, body)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(f"{where}/{path} is damaged: {error!r}") from error
        if not isinstance(found, str):
            raise CorruptCheckpointError(f"{where}/{path} is not signed with this run's key: {_UNSIGNED}")
        text = found.encode(errors="replace")
        if not any(hmac.compare_digest(text, _signature(key, message).encode()) for key in self.keys):
            raise CorruptCheckpointError(
                f"{where}/{path} is not signed with this run's key (run {self.run!r}): {_OTHERWISE_SIGNED}"
            )

    def _message(self, path: str, body: dict[str, Any]) -> bytes:
        """Canonical JSON: one text for one content."""
        return json.dumps({"run": self.run, "path": path, "body": body}, sort_keys=True, separators=(",", ":")).encode()


_NOT_USED = "It is not used and not deleted"
_UNSIGNED = (
    f"it carries no signature. {_NOT_USED}. Written before this run had a key? Unset the key (SPOT_SIGNING_KEY, "
    "signing_key_file) to use it. If not, somebody else can write there"
)
_OTHERWISE_SIGNED = (
    f"another key signed it, or it was changed, or copied from another run. {_NOT_USED}. Was the key changed? Add the "
    "earlier one to the key file, on a line below. If not, somebody else can write there"
)


def is_signed(data: bytes) -> bool:
    """Whether a record carries a signature, whoever made it."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and _FIELD in body


def _signature(key: str, message: bytes) -> str:
    return f"{_ALGORITHM}:{hmac.new(key.encode(), message, hashlib.sha256).hexdigest()}"


UNSIGNED = Signing()
