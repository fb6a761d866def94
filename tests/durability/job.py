"""The Trainer job of tests/hf with variables of its own in the environment, and the time spent in our hooks.

Lives of jobs that differ in `zygote` run at the same time; those of one zygote run one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hf_spot import SpotCallback
from tests.hf import job

# What runs between two steps. Opening the run and waiting for the last drain are none of it.
_HOOKS = ("on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_epoch_end")


@dataclass(frozen=True)
class JobSpec(job.JobSpec):
    """variables: of the environment. zygote: which process forks its lives."""

    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    zygote: int = 0

    preloaded: ClassVar[tuple[str, ...]] = ()

    @property
    def environment(self) -> dict[str, str]:
        return {"TEST_ZYGOTE": str(self.zygote)}


def run(spec: JobSpec) -> None:
    """One life. The share of its time that went into hooks goes to `hooks.json`, if it gets to its end."""
    os.environ.update(spec.variables)
    spans: list[tuple[float, float]] = []
    for name in _HOOKS:
        setattr(SpotCallback, name, _timed(getattr(SpotCallback, name), spans))
    job.run(spec)
    if spans:
        held_s = sum(end - begin for begin, end in spans)
        Path(spec.folder, "hooks.json").write_text(json.dumps(held_s / (spans[-1][1] - spans[0][0])))


def _timed(hook: Callable[..., Any], spans: list[tuple[float, float]]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return hook(*args, **kwargs)
        finally:
            spans.append((began, time.perf_counter()))

    return timed


def share_held(spec: JobSpec) -> float:
    """Of the time from the first to the last hook of the last life, how much was spent in them."""
    return float(json.loads(Path(spec.folder, "hooks.json").read_text()))
