"""Every error this project raises, grouped by what the caller does next.

SpotError
├── ConfigError              fix the call, the options or the place; nothing was written
├── TierError                a tier did not answer; retry
│   └── TierDeniedError      a tier answered "no" (permission, missing bucket); retrying will not help
├── CommitConflictError      someone else owns this name
├── CommitUnknownError       the outcome of a write is unknown; read it back before judging
├── FencedError              a newer life of this run exists; stop, write nothing
├── CorruptCheckpointError   what is stored is not what was committed; try the older one
├── DeadlineError            the grace period is too short for what was asked
└── AgentError               the agent process could not be started or died during start
"""

from __future__ import annotations


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


class DeadlineError(SpotError):
    """The time left is shorter than what the operation needs."""


class AgentError(SpotError):
    """The agent process could not be started, or ended before the run was opened."""
