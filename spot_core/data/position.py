"""Data position of a map-style DataLoader: which batches were taken, and the random state that leads back there.

The sampler inside the loader's batch sampler is wrapped (a plain attribute; the loader itself refuses changes).
The wrapper draws nothing and keeps length and attributes. It remembers the random state
1. when its iteration begins: there a shuffling sampler draws the epoch's order, lazily, at the first fetch;
2. before each batch is fetched in this process: there datasets and collators draw, and a loader may be one or more
   batches ahead of what training has consumed.
On resume it sets (1) to draw the same order, skips what was consumed without loading it, gives each batch that was
ahead its own state (2), and the step's state to the first one after. Then the stream of random numbers is that of
a run that was never interrupted. Not thread-safe; used by the training thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState


@dataclass(frozen=True, slots=True)
class DataState:
    """The position at a step boundary. batches: consumed in this epoch.

    epoch_start: state when the sampler's iteration began, None at an epoch's boundary. ahead: state before the
    fetch of each batch that was fetched but not consumed. step: state of all generators at the boundary.
    """

    batches: int
    epoch_start: RngState | None
    ahead: tuple[RngState, ...]
    step: RngState

    def to_portable(self) -> dict[str, Any]:
        """Tensors and primitives only."""
        return {
            "batches": self.batches,
            "epoch_start": rng.to_portable(self.epoch_start) if self.epoch_start else None,
            "ahead": [rng.to_portable(state) for state in self.ahead],
            "step": rng.to_portable(self.step),
        }

    @classmethod
    def from_portable(cls, body: dict[str, Any]) -> DataState:
        return cls(
            batches=body["batches"],
            epoch_start=rng.from_portable(body["epoch_start"]) if body["epoch_start"] else None,
            ahead=tuple(rng.from_portable(state) for state in body["ahead"]),
            step=rng.from_portable(body["step"]),
        )


class DataPosition:
    """Tracks one training loader. Adapters tell it where epochs begin and how much was consumed."""

    def __init__(self) -> None:
        self._is_tracking = False
        self._fetches_here = False
        self._persists = False
        self._started = 0  # batches whose fetch has begun in this epoch
        self._epoch_start: RngState | None = None
        self._before_fetch: list[RngState] = []  # of the last batches begun, oldest first
        self._begun_at_boundary = 0
        self._at_epoch_begin: RngState | None = None
        self._resume: DataState | None = None
        self._skips_here = False

    @property
    def is_tracking(self) -> bool:
        """Whether the loader could be wrapped: map-style with an ordinary batch sampler."""
        return self._is_tracking

    def track(self, loader: Any) -> None:
        """Wrap the sampler of `loader` (a DataLoader or accelerate's adapter around one)."""
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            return  # no indices to skip by: the trainer reads the stream again
        batch_sampler = getattr(loader, "batch_sampler", None)
        # accelerate's shard wraps the batch sampler that holds the sampler.
        batch_sampler = getattr(batch_sampler, "batch_sampler", batch_sampler)
        sampler = getattr(batch_sampler, "sampler", None)
        size = getattr(batch_sampler, "batch_size", None)
        if batch_sampler is None or sampler is None or not isinstance(size, int):
            return
        self._is_tracking = True
        self._fetches_here = loader.num_workers == 0
        self._persists = loader.num_workers > 0 and bool(getattr(loader, "persistent_workers", False))
        if isinstance(sampler, TrackedSampler):
            sampler = sampler.inner  # a second run over the same loader
        batch_sampler.sampler = TrackedSampler(sampler, self, size)

    def resume(self, state: DataState, *, skips_here: bool) -> None:
        """Arm the next iteration. skips_here: drop the consumed batches, unless the trainer's own loader does."""
        self._resume = state
        self._skips_here = skips_here

    def epoch_begins(self, *, is_first: bool) -> None:
        """Call before the loader's iterator is made. is_first: of the whole run, not of this life."""
        self._started, self._begun_at_boundary = 0, 0
        self._epoch_start = None
        self._before_fetch.clear()
        # Persistent workers draw their seed once in a run. A resumed life makes their iterator later than the
        # uninterrupted run did, so from the second epoch on the draw is undone; where none happened, nothing is.
        self._at_epoch_begin = rng.capture(with_devices=False) if self._persists and not is_first else None

    def mark_boundary(self, consumed: int) -> None:
        """A step has ended after `consumed` batches of this epoch: what is fetched from here on belongs to the next."""
        self._begun_at_boundary = self._started
        ahead = max(0, self._started - consumed)
        del self._before_fetch[: max(0, len(self._before_fetch) - ahead)]

    def state(self, consumed: int, step: RngState) -> DataState:
        """The position at the last marked boundary. step: state then, or now if nothing was drawn since.

        Where the next step's batches have been fetched already, the state before the first of them is the step's.
        """
        ahead = self._before_fetch[: max(0, self._begun_at_boundary - consumed)]
        fetched_since = self._before_fetch[len(ahead) :]
        return DataState(
            batches=consumed,
            epoch_start=self._epoch_start if consumed else None,
            ahead=tuple(ahead),
            step=_with_devices(fetched_since[0], step) if fetched_since else step,
        )

    def settle(self) -> None:
        """Set the step's random state if fetching has not: call when a step begins, after its batches were fetched.

        Fetching has, unless workers fetch or the epoch's last batch was ahead already.
        """
        if self._resume is not None:
            rng.restore(self._resume.step)
            self._resume = None

    def _iterate(self, inner: Any, batch_size: int) -> Iterator[Any]:
        if self._at_epoch_begin is not None:
            rng.restore(self._at_epoch_begin)
            self._at_epoch_begin = None
        resume = self._resume
        now = rng.capture(with_devices=False)
        self._epoch_start = now
        if resume is not None and resume.epoch_start is not None:
            self._epoch_start = resume.epoch_start
            rng.restore(resume.epoch_start)
        indices = enumerate(inner)
        upcoming = next(indices, None)  # lazy samplers draw the epoch's order here
        if resume is not None and resume.epoch_start is not None:
            rng.restore(now)
        dropped = resume.batches * batch_size if resume is not None and self._skips_here else 0
        while upcoming is not None:
            position, index = upcoming
            if position >= dropped:
                if position % batch_size == 0:
                    self._batch_begins(position // batch_size)
                yield index
            upcoming = next(indices, None)

    def _batch_begins(self, number: int) -> None:
        self._started = number + 1
        if not self._fetches_here:
            return  # workers fetch; this process draws nothing for a batch
        resume = self._resume
        if resume is not None and number >= resume.batches:
            ahead = number - resume.batches
            if ahead < len(resume.ahead):
                rng.restore(resume.ahead[ahead])
            elif ahead == len(resume.ahead):
                self.settle()
        elif resume is not None:
            return  # a batch that the trainer's loader skips
        self._before_fetch.append(rng.capture(with_devices=False))


class TrackedSampler:
    """Stands in for a sampler: same order, length and attributes."""

    def __init__(self, inner: Any, position: DataPosition, batch_size: int) -> None:
        self.inner = inner
        self._position = position
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        return self._position._iterate(self.inner, self._batch_size)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def _with_devices(state: RngState, step: RngState) -> RngState:
    """CPU generators of `state`, accelerators of `step`: fetching does not draw from accelerators."""
    return RngState(state.python, state.numpy, state.torch_cpu, step.devices)
