"""Hugging Face Trainer fine-tunes that survive preemption: add `SpotCallback`, run the same command again."""

from __future__ import annotations

from hf_spot.arguments import SpotArguments
from hf_spot.callback import SpotCallback

__all__ = ["SpotArguments", "SpotCallback"]
