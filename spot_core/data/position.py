"""Data position of a map-style DataLoader: which batches were taken, and the random state that leads back there.

The sampler inside the loader's batch sampler is wrapped, or a batch sampler that has none inside. The wrapper draws
nothing and keeps length and attributes. It remembers the random state
1. when its iteration begins: there a shuffling sampler draws the epoch's order, lazily, at the first fetch;
2. before each batch is fetched in this process: there datasets and collators draw, and a loader may be one or more
   batches ahead of what training has consumed.
On resume it sets (1) to draw the same order, skips what was consumed without loading it, gives each batch that was
ahead its own state (2), and the step's state to the first one after. Then the stream of random numbers is that of
a run that was never interrupted. Not thread-safe; used by the training thread alone.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState


@dataclass(frozen=True, slots=True)
class DataState:
    """The position at a step boundary. batches: consumed since the loader's iteration began.

    epoch_start: state when that iteration began, None if it had yet to. ahead: state before the fetch of each batch
    that was fetched but not consumed. step: state of all generators at the boundary. In all of them `own` are the
    generators of the loader and its sampler.
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
    """Tracks one training loader. Adapters tell it where epochs begin and how much was consumed.

    fetches_ahead: whether the trainer may fetch batches of the next step before a boundary.
    """

    def __init__(self, *, fetches_ahead: bool = True) -> None:
        self._fetches_ahead = fetches_ahead
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
        self._settles = True
        self._own: list[torch.Generator] = []
        self._own_at_step: RngState | None = None

    @property
    def is_tracking(self) -> bool:
        """Whether the loader could be wrapped: map-style with an ordinary batch sampler."""
        return self._is_tracking

    def track(self, loader: Any) -> None:
        """Wrap the sampler of `loader` (a DataLoader or accelerate's adapter around one)."""
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            return  # no indices to skip by: the stream is read again
        batch_sampler: Any = getattr(loader, "batch_sampler", None)
        # accelerate's shard wraps the batch sampler that holds the sampler: each rank takes one of its batches in turn.
        turns = 1 if getattr(batch_sampler, "split_batches", True) else batch_sampler.num_processes
        batch_sampler = getattr(batch_sampler, "batch_sampler", batch_sampler)
        sampler = getattr(batch_sampler, "sampler", None)
        size = getattr(batch_sampler, "batch_size", None)
        if batch_sampler is None or sampler is None or not isinstance(size, int):
            return
        batch_sampler.sampler = self._wrapped(loader, sampler, turns * size)

    def track_batches(self, loader: DataLoader[Any]) -> None:
        """Wrap what gives a plain `loader` the indices of each batch: for batch samplers without a sampler inside."""
        # The loader refuses to be given another sampler, lest the old one be in use; no iteration has begun here.
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        object.__setattr__(loader, name, self._wrapped(loader, getattr(loader, name), 1))

    def _wrapped(self, loader: Any, sampler: Any, batch_size: int) -> TrackedSampler:
        self._is_tracking = True
        self._fetches_here = loader.num_workers == 0
        self._persists = loader.num_workers > 0 and bool(getattr(loader, "persistent_workers", False))
        if isinstance(sampler, TrackedSampler):
            sampler = sampler.inner  # a second run over the same loader
        given = (getattr(sampler, "generator", None), getattr(loader, "generator", None))
        self._own = [generator for generator in dict.fromkeys(given) if isinstance(generator, torch.Generator)]
        return TrackedSampler(sampler, self, batch_size)

    def resume(self, state: DataState, *, skips_here: bool, settles: bool = True) -> None:
        """Arm the next iteration.

        skips_here: drop the consumed batches, unless the trainer's own loader does. settles: set the step's random
        state before the first batch after them is fetched; otherwise the caller does, once for all its loaders.
        """
        self._resume = state
        self._skips_here, self._settles = skips_here, settles
        self._own_at_step = state.step

    def epoch_ends(self) -> None:
        """What was fetched belongs to an epoch that is over: until the next iteration begins there is no position."""
        self._started, self._begun_at_boundary = 0, 0
        self._epoch_start = None
        self._before_fetch.clear()

    def epoch_begins(self, *, is_first: bool) -> None:
        """Call before the loader's iterator is made. is_first: of the whole run, not of this life."""
        self.epoch_ends()
        # Persistent workers draw their seed once in a run. A resumed life makes their iterator later than the
        # uninterrupted run did, so from the second epoch on the draw is undone; where none happened, nothing is.
        self._at_epoch_begin = self._now() if self._persists and not is_first else None

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
            epoch_start=self._epoch_start,
            ahead=tuple(ahead),
            step=_with_devices(fetched_since[0], step) if fetched_since else replace(step, own=rng.of_own(self._own)),
        )

    def settle(self) -> None:
        """Set the step's random state if fetching has not: call when a step begins, after its batches were fetched.

        Fetching has, unless workers fetch or the epoch's last batch was ahead already.
        """
        if self._resume is not None:
            self._set(self._resume.step)
            self._resume = None

    def settle_own(self) -> None:
        """Set the loader's own generators alone, if they are still to be set, for callers that set the others."""
        if self._own_at_step is not None:
            for generator, state in zip(self._own, self._own_at_step.own, strict=False):
                generator.set_state(state)
            self._own_at_step = None

    def _now(self) -> RngState:
        return rng.capture(with_devices=False, own=self._own)

    def _set(self, state: RngState) -> None:
        rng.restore(state, own=self._own)

    @contextlib.contextmanager
    def _at(self, state: RngState | None) -> Iterator[None]:
        """Run the body in another random state and come back; in the present one if None."""
        if state is None:
            yield
            return
        now = self._now()
        self._set(state)
        yield
        self._set(now)

    def iterate(self, inner: Any, batch_size: int) -> Iterator[Any]:
        """The iteration of a wrapped sampler begins, or one that is thrown away: loaders with workers begin two."""
        if self._at_epoch_begin is not None:
            self._set(self._at_epoch_begin)
            self._at_epoch_begin = None
        resume = self._resume
        self.epoch_ends()  # a short loader may begin again in the middle of an epoch
        target = resume.epoch_start if resume is not None else None
        with self._at(target):
            before = self._now()
            iterator = iter(inner)  # eager samplers draw the order here, others at the first index
            is_drawn = not rng.is_same(self._now(), before)
        if is_drawn:
            self._epoch_start = before
        return self._indices(iterator, batch_size, resume, is_drawn=is_drawn)

    def _indices(
        self, iterator: Iterator[Any], batch_size: int, resume: DataState | None, *, is_drawn: bool
    ) -> Iterator[Any]:
        if not self._settles:
            self._resume = None  # the iteration after this one is an ordinary one
        dropped = resume.batches * batch_size if resume is not None and self._skips_here else 0
        indices = enumerate(iterator)
        with self._at(resume.epoch_start if resume is not None else None):
            if not is_drawn:
                self._epoch_start = self._now()
            # The order is drawn at the first index, if it was not before; more of it, perhaps, on the way.
            collections.deque(itertools.islice(indices, dropped), maxlen=0)
            first = list(itertools.islice(indices, 0 if dropped else 1))
        for position, index in itertools.chain(first, indices):
            if position % batch_size == 0:
                self._batch_begins(position // batch_size, resume)
            yield index

    def _batch_begins(self, number: int, resume: DataState | None) -> None:
        """The fetch of a batch begins. resume: what this iteration was armed with."""
        self._started = number + 1
        if not self._fetches_here:
            return  # workers fetch; this process draws nothing for a batch
        if resume is not None:
            ahead = number - resume.batches
            if ahead < 0:
                return  # a batch that the trainer's loader skips
            if ahead < len(resume.ahead):
                self._set(resume.ahead[ahead])
            elif ahead == len(resume.ahead):
                self.settle()
        if self._fetches_ahead:
            self._before_fetch.append(self._now())


class TrackedSampler:
    """Stands in for a sampler: same order, length and attributes."""

    def __init__(self, inner: Any, position: DataPosition, batch_size: int) -> None:
        self.inner = inner
        self._position = position
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        return self._position.iterate(self.inner, self._batch_size)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def _with_devices(state: RngState, step: RngState) -> RngState:
    """CPU generators of `state`, accelerators of `step`: fetching does not draw from accelerators."""
    return replace(state, devices=step.devices)
