"""The core under the trainer callbacks: snapshot, commit, cadence, agent. Knows no trainer.

Importing this package imports neither torch nor fsspec, so that the agent starts fast and small.
"""

from __future__ import annotations

from spot_core.config import SpotConfig
from spot_core.errors import (
    AgentError,
    CommitConflictError,
    CommitUnknownError,
    ConfigError,
    CorruptCheckpointError,
    DeadlineError,
    FencedError,
    SpotError,
    TierDeniedError,
    TierError,
)

__all__ = [
    "AgentError",
    "CommitConflictError",
    "CommitUnknownError",
    "ConfigError",
    "CorruptCheckpointError",
    "DeadlineError",
    "FencedError",
    "SpotConfig",
    "SpotError",
    "TierDeniedError",
    "TierError",
]
