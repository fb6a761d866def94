"""Makes a relaunched `trainer.train()` continue: the seam into the Trainer.

`train()` reads only its own `resume_from_checkpoint` argument, and when the first callback hook runs everything is
fixed. So `transformers.Trainer.train` is wrapped once, at class level. The wrapper acts only on a trainer that has
a SpotCallback, outside hyper-parameter trials; every other trainer goes straight through.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_spot.identity import check_supported, device_of, run_identity, versions
from hf_spot.state import TRAINER_STATE, read_own_state
from hf_spot.weights import live_weights
from spot_core.agent.launch import EarlyAgent
from spot_core.config import SpotConfig
from spot_core.errors import ConfigError, Preempted
from spot_core.handover import ResumePoint, expected_bytes
from spot_core.notice.signals import LeaveOnSignal
from spot_core.opening import AnySession, open_on_each, open_session
from spot_core.ranks.leader import Alone
from spot_core.report import loggers
from spot_core.session import Session
from spot_core.snapshot.trees import byte_count
from spot_core.store import layout

if TYPE_CHECKING:
    from hf_spot.callback import SpotCallback

logger = logging.getLogger(__name__)

_VIEW = "resume-"
_RNG_STATES = "rng_state*.pth"  # one, or one of each rank


class AlreadyFinished(Exception):
    """Training ended at the restored step although more steps would fit: it was stopped early, on purpose."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A restored checkpoint as the Trainer gets it. view: a `checkpoint-N` folder; own: our state beside it."""

    view: Path
    own: dict[str, Any]

    def discard_view(self) -> None:
        shutil.rmtree(self.view.parent, ignore_errors=True)


def install() -> None:
    """Wrap `transformers.Trainer.train`, once per process."""
    original = Trainer.train
    if getattr(original, "_is_spot_wrapper", False):
        return

    @functools.wraps(original)
    def train(
        self: Trainer, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        callback = _callback_of(self)
        if callback is None or trial is not None:
            return original(self, resume_from_checkpoint, trial, *args, **kwargs)
        return _train(callback, self, resume_from_checkpoint, lambda path: original(self, path, trial, *args, **kwargs))

    train._is_spot_wrapper = True  # type: ignore[attr-defined]
    Trainer.train = train


def _callback_of(trainer: Trainer) -> SpotCallback | None:
    from hf_spot.callback import SpotCallback

    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SpotCallback)]
    if len(found) > 1:
        raise ConfigError("this Trainer has two SpotCallbacks: they would fence each other. Keep one.")
    if found:
        # Last in order: what other callbacks decide at a step, to stop for example, is then known.
        trainer.callback_handler.callbacks.remove(found[0])
        trainer.callback_handler.callbacks.append(found[0])
    return found[0] if found else None


def _train(
    callback: SpotCallback,
    trainer: Trainer,
    wanted: str | bool | None,
    original: Callable[[str | bool | None], TrainOutput],
) -> TrainOutput:
    check_supported(trainer)
    config = callback.config(trainer.args.output_dir)
    callback.is_preempted = False
    with LeaveOnSignal(config.signal_numbers, config.preempt_exit_code) as signals:
        try:
            return _train_protected(callback, trainer, config, signals.of_user, wanted, original)
        except Preempted:
            callback.is_preempted = True
            if config.on_preempt == "exit":
                raise
            return TrainOutput(trainer.state.global_step, float("nan"), {})


def _train_protected(
    callback: SpotCallback,
    trainer: Trainer,
    config: SpotConfig,
    signals: Mapping[signal.Signals, Any],
    wanted: str | bool | None,
    original: Callable[[str | bool | None], TrainOutput],
) -> TrainOutput:
    is_explicit = isinstance(wanted, (str, os.PathLike))
    is_resumed = wanted is not False and not is_explicit
    session = _open(replace(config, resume=config.resume and is_resumed), trainer)
    error: BaseException | None = None
    skips_data = trainer.args.ignore_data_skip
    try:
        restored = _materialise(session.resume, trainer) if session.resume else None
        if session.resume is not None:
            loggers.resume(session.resume.manifest.loggers)
        if restored is not None and restored.own["stream_passes"] > 0:
            # Skipping what was read in all passes would exhaust the first one and end training early.
            trainer.args.ignore_data_skip = True
        callback.attach(trainer, session, restored, signals)
        if is_explicit:
            logger.info("resume_from_checkpoint=%s was given and wins over what is stored", wanted)
        try:
            return original(str(restored.view) if restored else wanted)
        except AlreadyFinished:
            return _finished_output(trainer)
        except Exception as broken:
            callback.broke_off(broken)
            raise
    except BaseException as caught:
        error = caught
        raise
    finally:
        trainer.args.ignore_data_skip = skips_data
        callback.detach()
        session.close(error)


def _open(config: SpotConfig, trainer: Trainer) -> AnySession:
    """The session of this process."""

    def open_run(ranks: Alone) -> Session:
        with EarlyAgent(config) as early:
            identity, base_fingerprint = run_identity(trainer)
            trained_bytes = sum(byte_count(p) for p in trainer.model.parameters() if p.requires_grad)
            session = open_session(
                config,
                identity,
                device=device_of(trainer),
                state_bytes=expected_bytes(live_weights(trainer.model).bytes, trained_bytes),
                versions=versions(),
                base_fingerprint=base_fingerprint,
                early=early,
                ranks=ranks,
            )
        if session.resume is not None:
            for stale in _views(session.resume).glob(f"{_VIEW}*"):
                shutil.rmtree(
                    stale, ignore_errors=True
                )  # of a life killed before it had loaded: links keep pruned files
        return session

    return open_on_each(trainer.args.process_index, trainer.args.world_size, config, open_run)


def _views(point: ResumePoint) -> Path:
    """Where folders for the Trainer to load are made."""
    return point.folder.parents[1] / layout.STAGING


def _materialise(point: ResumePoint, trainer: Trainer) -> Restored:
    """A native folder for the Trainer to load, made of hard links to the committed files, with two differences.

    No `rng_state.pth`: the Trainer would set it after fetching data, too late for datasets that draw; the callback
    sets each state at its moment. And the best model's path is this machine's.
    """
    native = point.folder / point.manifest.native
    view = _views(point) / f"{_VIEW}{os.getpid()}" / point.manifest.native
    for source in native.rglob("*"):
        relative = source.relative_to(native)
        if source.is_file() and relative.name != TRAINER_STATE and not relative.match(_RNG_STATES):
            (view / relative).parent.mkdir(parents=True, exist_ok=True)
            _link(source, view / relative)
    state = TrainerState.load_from_json(str(native / TRAINER_STATE))
    if state.best_model_checkpoint is not None and state.best_global_step is not None:
        best = Path(trainer.args.output_dir) / f"checkpoint-{state.best_global_step}"
        stored = native if state.best_global_step == state.global_step else None
        if point.pinned is not None:
            stored = point.pinned / f"checkpoint-{state.best_global_step}"
        if stored is not None and stored.is_dir() and trainer.args.process_index == 0:
            _restore_best(stored, best)
        state.best_model_checkpoint = str(best)
    (view / TRAINER_STATE).write_text(json.dumps(vars(state), indent=2, sort_keys=True) + "\n")
    return Restored(view, read_own_state(point.folder, trainer.args))


def _restore_best(stored: Path, best: Path) -> None:
    """Put the best model where the Trainer will look for it, unless it is there whole.

    The Trainer's own copy may be torn by the kill, or gone with the old instance.
    """
    weights = [path.relative_to(stored) for path in stored.rglob("*.safetensors")]
    if all((best / path).is_file() and (best / path).read_bytes() == (stored / path).read_bytes() for path in weights):
        return
    logger.info("restoring the best model to %s", best)
    temporary = best.with_name(f".tmp-{os.getpid()}-{best.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(stored, temporary)
    if best.exists():
        # A torn folder may hold what the user put there: files are replaced, none is removed.
        shutil.copytree(temporary, best, dirs_exist_ok=True)
        shutil.rmtree(temporary)
    else:
        os.replace(temporary, best)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _finished_output(trainer: Trainer) -> TrainOutput:
    """What `train()` returns for a run that was stopped early in an earlier life."""
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    trainer.is_in_train = False
    logger.info("training was complete at step %d already", trainer.state.global_step)
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return TrainOutput(trainer.state.global_step, losses[-1] if losses else 0.0, {})
