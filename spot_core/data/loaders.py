"""Positions of all loaders that feed one training, for trainers that combine several.

Loaders with a state of their own (`state_dict`, as `StatefulDataLoader`) are left to the trainer, which saves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from spot_core.data import workers
from spot_core.data.position import DataPosition, DataState
from spot_core.data.stream import StreamPosition
from spot_core.data.workers import WorkerDraws
from spot_core.errors import ConfigError
from spot_core.snapshot.rng import RngState


class LoaderPositions:
    """Tracks loaders in the trainer's order.

    cycles: whether a loader that is exhausted before the longest one begins again. fetches_ahead: whether the
    trainer fetches a batch before the step that consumes it. fetches_here: whether a loader reads its data in this
    process. is_stateful_ahead: the states of loaders are then one batch too far at a boundary; the trainer's side must
    remember them from before the fetch.
    """

    def __init__(self, loaders: Sequence[Any], *, cycles: bool, fetches_ahead: bool) -> None:
        self._loaders, self._cycles, self.fetches_ahead = list(loaders), cycles, fetches_ahead
        self.fetches_here = any(not getattr(loader, "num_workers", 0) for loader in self._loaders)
        self.is_stateful_ahead = fetches_ahead and any(map(has_state, self._loaders))
        self._positions: list[DataPosition | StreamPosition | None] = []
        self._draws = WorkerDraws()
        reasons: dict[str, None] = {}
        for loader in self._loaders:
            position, reason = _track(loader, fetches_ahead=fetches_ahead)
            self._positions.append(position)
            if reason:
                reasons[reason] = None
            if isinstance(position, DataPosition):
                self._draws.watch(loader)
        self._reasons = tuple(reasons)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why a resume from here may not be bit-exact."""
        return (*self._reasons, *((workers.NOTE,) if self._draws.is_seen else ()))

    def facts(self) -> dict[str, str | int]:
        """What must not change between two lives for a position to mean the same."""
        facts: dict[str, str | int] = {}
        for number, loader in enumerate(self._loaders):
            which = f" of loader {number}" if len(self._loaders) > 1 else ""
            facts[f"batch size{which}"] = str(_batch_size(loader))
            facts[f"training samples{which}"] = _length(getattr(loader, "dataset", None))
            facts[f"batches per epoch{which}"] = _length(loader)
        return facts

    def epoch_ends(self) -> None:
        """What was fetched belongs to an epoch that is over."""
        for position in self._positions:
            if position is not None:
                position.epoch_ends()

    def state(self, batches: int, step: RngState) -> list[dict[str, Any] | None]:
        """Portable positions after `batches` of this epoch; None for loaders that are not tracked."""
        states: list[dict[str, Any] | None] = []
        for position, loader in zip(self._positions, self._loaders, strict=True):
            if position is None:
                states.append(None)
                continue
            consumed = self._consumed(loader, batches)
            if isinstance(position, DataPosition):
                position.mark_boundary(consumed)
            states.append(position.state(consumed, step).to_portable())
        return states

    def resume(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Arm the next iteration of each loader. Raises ConfigError if these are other loaders."""
        if len(states) != len(self._positions):
            raise ConfigError(
                f"the checkpoint holds the positions of {len(states)} training loaders, now there are "
                f"{len(self._positions)}. Nothing was changed. Build the data as in the run's earlier lives."
            )
        for position, portable in zip(self._positions, states, strict=True):
            if portable is None or position is None:
                continue
            state = DataState.from_portable(portable)
            if isinstance(position, DataPosition):
                position.resume(state, skips_here=True, settles=False)
            else:
                position.resume(state)

    def settle(self) -> None:
        """Set the loaders' own generators: before the first fetch, when everything else is set."""
        for position in self._positions:
            if isinstance(position, DataPosition):
                position.settle_own()

    def _consumed(self, loader: Any, batches: int) -> int:
        """Batches taken from the loader's running iteration: all of them, unless it is shorter than the epoch."""
        length = _length(loader)
        if not isinstance(length, int) or batches <= length:
            return batches
        # Exhausted is not yet begun again: that happens at the fetch after.
        return (batches - 1) % length + 1 if self._cycles else length


def has_state(loader: Any) -> bool:
    """Whether the loader keeps its own position."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _track(loader: Any, *, fetches_ahead: bool) -> tuple[DataPosition | StreamPosition | None, str | None]:
    """The loader's position, and why a resume may not be exact."""
    if has_state(loader):
        return None, None
    if not isinstance(loader, DataLoader):
        return None, f"a {type(loader).__name__} cannot be positioned: it begins its epoch again"
    if isinstance(loader.dataset, IterableDataset):
        stream = StreamPosition()
        stream.track(loader)
        return stream, "the data is a stream, read again up to where it was: exact only if its order is fixed"
    position = DataPosition(fetches_ahead=fetches_ahead)
    position.track(loader)
    if position.is_tracking:
        return position, None
    position.track_batches(loader)
    if loader.batch_sampler is None:
        return position, None
    return position, "the data has its own batch sampler: exact only if it draws its order when it begins"


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    return size if size is not None else getattr(getattr(loader, "batch_sampler", None), "batch_size", None)


def _length(sized: Any) -> int | str:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return "unknown"
