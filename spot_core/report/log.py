"""Makes this project's log lines visible to users who configured no logging."""

from __future__ import annotations

import logging
import os

_ROOTS = ("spot_core", "hf_spot", "lightning_spot")


def make_visible() -> None:
    """Print INFO lines to standard error unless logging is configured already. SPOT_LOG_LEVEL sets the level.

    A resume that says nothing cannot be trusted, and Python shows only warnings by default.
    """
    level = os.environ.get("SPOT_LOG_LEVEL", "INFO").upper()
    for name in _ROOTS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level if isinstance(logging.getLevelName(level), int) else "INFO")
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("spot: %(message)s"))
            logger.addHandler(handler)
