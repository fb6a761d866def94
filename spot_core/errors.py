"""Every error this project raises, grouped by what the caller does next.

SpotError
├── ConfigError              fix the call, the options or the place; nothing was written
├── TierError                a tier did not answer; retry
│   └── TierDeniedError      a tier answered "no" (permission, missing bucket); retrying will not help
├── CommitConflictError      someone else owns this name
├── CommitUnknownError       the outcome of a write is unknown; read it back before judging
├── FencedError              a newer life of this run exists; stop, write nothing
├── CorruptCheckpointError   what is stored is not what was committed; try the older one
│   └── NewerFormatError     a newer release committed it; try the older one, change nothing about it
├── ChangedStateError        what was to be copied is not what the trainer has any more; take another checkpoint
├── DeadlineError            the grace period is too short for what was asked
└── AgentError               the agent process could not be started or died during start
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator


class SpotError(Exception):
    """Base of all errors of this project."""


class ConfigError(SpotError, ValueError):
    """The call, an option or the place is wrong. Raised before anything is written or deleted."""


class TierError(SpotError, OSError):
    """A tier could not be read or written. The operation may be tried again."""


class TierDeniedError(TierError):
    """A tier refused: no permission, no such bucket, no credentials. Trying again will not help."""


class CommitConflictError(SpotError):
    """A create-only name already exists with other content."""


class CommitUnknownError(SpotError):
    """A write may or may not have landed. Read it back; never delete on unknown."""


class FencedError(SpotError):
    """A newer life of the same run exists. This one must stop and write nothing more."""


class CorruptCheckpointError(SpotError):
    """Stored bytes do not match the manifest, or no stored checkpoint is valid."""


class NewerFormatError(CorruptCheckpointError):
    """A manifest of a newer format version: this release cannot tell what was committed, so it must not touch it."""


class Preempted(SystemExit):
    """Ends the process of a preempted run with the configured exit code. No SpotError: nobody is to catch it."""


class ChangedStateError(SpotError):
    """The trainer's state consists of other tensors than a snapshot was told."""


class DeadlineError(SpotError):
    """The time left is shorter than what the operation needs."""


class AgentError(SpotError):
    """The agent process could not be started, or ended before the run was opened."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota without room is what led to `error`."""
    return any(isinstance(each, OSError) and each.errno in _FULL for each in chain(error))


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what led to it, what led to that."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:  # one that is raised again may have itself behind it
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def shown(text: str) -> str:
    """A URL, or a text with URLs, without the passwords in them: for logs, errors and records."""
    return _PASSWORD.sub("://…@", text)


# `user:password@` before the host. `container@account` of Azure has no colon, and stays.
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s]*@")


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ConfigError unless the value of an option is one that it may have."""
    if not ok:
        raise ConfigError(shown(f"{name}={value!r} is not valid: it must be {allowed}"))
