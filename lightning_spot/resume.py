"""Makes a relaunched `trainer.fit()` continue: the seams into Lightning.

`Trainer.fit` is wrapped once, at class level, in each namespace; the wrapper acts only on a trainer that has a
SpotCallback. For the time of one `fit` it puts itself before three methods of that trainer:
1. the checkpoint connector's `resume_start`, called when the model is whole: opens the session, loads its checkpoint;
2. the fit loop's `_load_combined_loader_states`, called when the loaders exist and have not begun: positions;
3. the epoch loop's `advance`, called where nothing of the step before is pending: the boundary between two steps.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning_spot import best_model, trackers, weights
from lightning_spot.factory import name_run
from lightning_spot.identity import check_supported
from lightning_spot.namespaces import is_a, loaded
from lightning_spot.protected_fit import ProtectedFit
from lightning_spot.signals import FitSignals
from lightning_spot.state import begin_epoch, read_native, read_own_state
from spot_core.errors import ConfigError, Preempted
from spot_core.handover import ResumePoint
from spot_core.report.log import make_visible

if TYPE_CHECKING:
    from lightning_spot.callback import SpotCallback

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap `Trainer.fit` in every namespace that is loaded, once per process."""
    for namespace in loaded():
        if not getattr(namespace.Trainer.fit, "_is_spot_wrapper", False):
            namespace.Trainer.fit = _wrapped(namespace.Trainer.fit)


def _wrapped(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(self: Any, *args: Any, **kwargs: Any) -> None:
        callback = _callback_of(self)
        if callback is None or _is_trial(self):
            return original(self, *args, **kwargs)
        wanted = signature.bind(self, *args, **kwargs).arguments.get("ckpt_path")
        return _fit(callback, self, wanted, lambda: original(self, *args, **kwargs))

    fit._is_spot_wrapper = True  # type: ignore[attr-defined]
    return fit


def _callback_of(trainer: Any) -> SpotCallback | None:
    """The trainer's callback, put last in order: what others decide or change is then known."""
    from lightning_spot.callback import SpotCallback

    found = [callback for callback in trainer.callbacks if isinstance(callback, SpotCallback)]
    chosen = [callback for callback in found if not callback.is_from_environment] or found[:1]
    if len(chosen) > 1:
        raise ConfigError("this Trainer has two SpotCallbacks: they would fence each other. Keep one.")
    if found:
        trainer.callbacks = [callback for callback in trainer.callbacks if callback not in found] + chosen
    return chosen[0] if chosen else None


def _is_trial(trainer: Any) -> bool:
    """Whether this `fit` is not a run: a debugging pass, or a tuner's search that stops before training."""
    if trainer.fast_dev_run:
        make_visible()
        logger.info("fast_dev_run: nothing is checkpointed")
        return True
    tuners = ("callbacks.LearningRateFinder", "callbacks.BatchSizeFinder")
    return any(getattr(each, "_early_exit", False) for each in trainer.callbacks if any(is_a(each, t) for t in tuners))


def _fit(callback: SpotCallback, trainer: Any, wanted: Any, original: Callable[[], None]) -> None:
    check_supported(trainer)
    name_run(callback)
    config = callback.config(trainer.default_root_dir)
    error: BaseException | None = None
    callback.is_preempted = False
    with FitSignals(trainer, config.signal_numbers, config.preempt_exit_code) as signals:
        callback.protected = protected = ProtectedFit(trainer, config, signals.of_user)
        try:
            if wanted is None and trainer.global_rank == 0:
                trackers.resume(trainer, config)
            with _seams(protected, trainer, wanted):
                _run(protected, original)
                protected.returned()
        except BaseException as caught:
            error = caught
            if not isinstance(caught, Preempted):
                raise
            callback.is_preempted = True
            signals.requeue_if_announced(protected.received_signals)
            if config.on_preempt == "exit":
                raise
        finally:
            callback.protected = None
            protected.close(error)


def _run(protected: ProtectedFit, call: Callable[..., None], *args: Any) -> None:
    """Call, with the end that a signal to the loader's workers brings taken for what it is."""
    try:
        call(*args)
    except Exception as error:
        protected.broke_off(error)
        raise


@contextlib.contextmanager
def _seams(protected: ProtectedFit, trainer: Any, wanted: Any) -> Iterator[None]:
    """Put ours before three methods of one trainer. wanted: the user's own `ckpt_path`."""
    loop, connector = trainer.fit_loop, trainer._checkpoint_connector
    is_opened = False

    def resume_start(original: Callable[..., None], path: Any = None, *args: Any, **kwargs: Any) -> None:
        nonlocal is_opened
        if is_opened:
            return original(path, *args, **kwargs)  # a tuner inside fit puts its own state back
        is_opened = True
        point = protected.open(is_resumed=wanted is None)
        if wanted is not None:
            logger.info("ckpt_path=%s was given and wins over what is stored", wanted)
        return original(path, *args, **kwargs) if point is None else _load(protected, trainer, point, original)

    def loaders_ready(original: Callable[[], None]) -> None:
        protected.loaders_ready()
        original()

    def advance(original: Callable[[Any], None], fetcher: Any) -> None:
        protected.before_batch(fetcher)
        _run(protected, original, fetcher)
        protected.after_batch()

    def search(original: Callable[..., None], *args: Any) -> None:
        # It would throw away what was read for the restore; what it found is in the optimizer's state.
        if not protected.is_resumed:
            original(*args)

    replaced: list[tuple[Any, str, Callable[..., None]]] = [
        (connector, "resume_start", resume_start),
        (loop, "_load_combined_loader_states", loaders_ready),
        (loop.epoch_loop, "advance", advance),
    ]
    replaced += [(each, "lr_find", search) for each in trainer.callbacks if is_a(each, "callbacks.LearningRateFinder")]
    missing = [name for owner, name, _ in replaced if not hasattr(owner, name)]
    if missing:
        raise ConfigError(
            f"this version of Lightning has no {', '.join(missing)}: SpotCallback cannot resume under it. Nothing was "
            "written. Install a version that the changelog names."
        )
    for owner, name, replacement in replaced:
        setattr(owner, name, functools.partial(replacement, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            delattr(owner, name)


def _load(protected: ProtectedFit, trainer: Any, point: ResumePoint, original: Callable[..., None]) -> None:
    """Have Lightning load the native file, and complete what it read before anything is restored from it."""
    own = read_own_state(point.folder, trainer)
    path = point.folder / point.manifest.native
    trainer.strategy.load_checkpoint = lambda *args, **kwargs: read_native(path)
    try:
        original(str(path))
    finally:
        del trainer.strategy.load_checkpoint
    checkpoint = trainer._checkpoint_connector._loaded_checkpoint
    checkpoint.update(own.get("trainer", {}))
    if own["is_end"]:
        begin_epoch(checkpoint)
    first, live_place = weights.WEIGHTS
    stored = dict(checkpoint.get(live_place, checkpoint[first]))
    weights.complete(checkpoint, trainer.strategy.lightning_module_state_dict(), set(own["absent"]))
    best_model.adopt(trainer, checkpoint, own, point)
    own["loader_states"] = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    protected.restored(own, stored)
