"""Bad input is refused at start, says what is wrong and what to do, and leaves everything as it was."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_spot import SpotCallback, opening
from spot_core.errors import ConfigError
from spot_core.store import catalog, layout
from spot_core.store.posix import PosixTier
from tests.lightning.data import data_of
from tests.lightning.job import JobSpec, trainer_of
from tests.lightning.modules import KINDS, Plain
from tests.lightning.namespace import pl
from tests.lives.job import SeenLog
from tests.lives.lives import (
    PLACES,
    assert_agent_is_early,
    assert_same_training,
    final,
    live,
    live_to_the_end,
    local_of,
    uninterrupted,
    wait_for,
)
from tests.servers import nothing_listens


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    (tmp_path / "job").mkdir()
    return JobSpec(folder=str(tmp_path / "job"))


def fit(spec: JobSpec, kind: type[Plain] | None = None, *, trainer: Any = None) -> None:
    """Train in this process. kind: of no life, only of this test."""
    module = (kind or KINDS[spec.kind])(SeenLog(Path(spec.folder)))
    (trainer or trainer_of(spec)).fit(module, **data_of(spec.data, {}))


def assert_nothing_written(spec: JobSpec) -> None:
    assert not Path(spec.folder, "remote").exists()
    assert not Path(spec.folder, "local").exists()


def stored(spec: JobSpec) -> dict[str, bytes]:
    """Every file of a committed checkpoint, and every life that was claimed."""
    files: list[Path] = []
    for tier in ("local", "remote"):
        files += Path(spec.folder, tier, "job", "lives").iterdir()
        posix = PosixTier(f"{spec.folder}/{tier}/job")
        for name in catalog.names(posix):
            files += [path for path in posix.path(layout.checkpoint(name)).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def started_run(spec: JobSpec) -> dict[str, bytes]:
    assert live(dataclasses.replace(spec, dies="step:15")).exit_code == -signal.SIGKILL
    life = Path(spec.folder, "remote/job/lives/000001.json")
    wait_for(lambda: '"died"' in life.read_text())  # the agent has drained, pruned and ended
    return stored(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval_s": 0.0}, "interval_s=0.0 is not valid"),
        ({"keep_local": 0}, "keep_local=0 is not valid"),
        ({"keep_every": 0}, "keep_every=0 is not valid"),
        ({"preempt_exit_code": 0}, "0 would make a preempted run look finished"),
        ({"remote": "s3://bucket"}, "whose last component names the run"),
        ({"remote": None}, "no remote: pass remote="),
    ],
)
def test_option_out_of_range_is_refused_when_the_callback_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpotCallback(**{"remote": "s3://bucket/run", **options})


def test_two_callbacks_on_one_trainer_are_refused(spec: JobSpec) -> None:
    trainer = trainer_of(spec)
    trainer.callbacks.append(SpotCallback(f"{spec.folder}/remote/other"))
    with pytest.raises(ConfigError, match="two SpotCallbacks"):
        fit(spec, trainer=trainer)
    assert_nothing_written(spec)


# -- Trainers that cannot be captured ------------------------------------------------------------------------


class Sharded(pl.strategies.FSDPStrategy):
    """Lightning refuses FSDP itself on a CPU, by name."""


def own_strategy() -> Any:
    """A user's, which shares nothing with Lightning's but the interface."""
    base, lent = pl.strategies.Strategy, pl.strategies.SingleDeviceStrategy
    methods = {name: vars(lent).get(name) or getattr(lent, name) for name in base.__abstractmethods__}
    strategy = type("OwnStrategy", (base,), methods)()
    strategy._root_device = torch.device("cpu")
    return strategy


def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lightning's own class, without the library behind it."""
    monkeypatch.setattr(f"{pl.strategies.__name__}.deepspeed._DEEPSPEED_AVAILABLE", True)
    monkeypatch.setattr(f"{pl.strategies.__name__}.deepspeed._DEEPSPEED_GREATER_EQUAL_0_16", True)
    library = SimpleNamespace(utils=SimpleNamespace(logging=SimpleNamespace(logger=logging.getLogger("deepspeed"))))
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    return pl.strategies.DeepSpeedStrategy()


TRAINERS: dict[str, tuple[Callable[[pytest.MonkeyPatch], dict[str, Any]], str]] = {
    "sharded": (lambda _: {"strategy": Sharded()}, "Sharded, whose state is not in one place,"),
    "split": (
        lambda _: {"strategy": pl.strategies.ModelParallelStrategy()},
        "ModelParallelStrategy, whose state is not in one place,",
    ),
    "of the user": (lambda _: {"strategy": own_strategy()}, "OwnStrategy, whose state is not in one place,"),
    "DeepSpeed": (
        lambda patch: {"strategy": deepspeed(patch)},
        "DeepSpeedStrategy, whose state is not in one place,",
    ),
    "spawned": (lambda _: {"strategy": "ddp_spawn"}, "_MultiProcessingLauncher, which trains in another process,"),
}


@pytest.mark.parametrize("which", TRAINERS)
def test_a_trainer_that_cannot_be_captured_is_refused(
    which: str, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = TRAINERS[which]
    trainer = trainer_of(dataclasses.replace(spec, trainer=arguments(monkeypatch)))
    with pytest.raises(ConfigError, match=f"does not work with {message}.*Nothing was written"):
        fit(spec, trainer=trainer)
    assert_nothing_written(spec)


@pytest.mark.parametrize(
    ("other", "message"),
    [("stochastic average", "StochasticWeightAveraging"), ("batch size finder", "BatchSizeFinder")],
)
def test_a_callback_that_cannot_be_resumed_is_refused(other: str, message: str, spec: JobSpec) -> None:
    trainer = trainer_of(dataclasses.replace(spec, others=[other]))
    with pytest.raises(ConfigError, match=f"does not work with {message}.*Nothing was written"):
        fit(spec, trainer=trainer)
    assert_nothing_written(spec)


class OfTheModule(Plain):
    """Brings the callback itself."""

    def configure_callbacks(self) -> list[Any]:
        return [SpotCallback(f"{self.trainer.default_root_dir}/remote/job")]


class ReadsItself(Plain):
    """Takes the iterator in place of batches."""

    def training_step(self, dataloader_iter: Any) -> torch.Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch["input_ids"])


class Forgetful(Plain):
    """Leaves out of checkpoints what it trains."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["network.1.weight"]


@pytest.mark.parametrize("has_another", [False, True])
def test_a_callback_that_the_module_brings_is_refused(has_another: bool, spec: JobSpec) -> None:
    """When the module is asked for it, what must be prepared before is over."""
    with pytest.raises(ConfigError, match="Give it to the Trainer, not to configure_callbacks"):
        fit(dataclasses.replace(spec, has_callback=has_another), OfTheModule)
    assert not list(Path(spec.folder).rglob("checkpoints"))


def test_a_module_that_reads_the_data_itself_is_refused(spec: JobSpec) -> None:
    with pytest.raises(ConfigError, match=r"dataloader_iter.*Take batch and batch_idx"):
        fit(spec, ReadsItself)
    assert not list(Path(spec.folder).rglob("checkpoints"))


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_the_agent_loads_while_the_model_is_read_and_ends_where_that_fails(
    options: dict[str, Any], spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(spec, options=options)

    def make() -> Callable[[], None]:
        trainer = trainer_of(spec)
        return lambda: fit(spec, trainer=trainer)

    assert_agent_is_early(monkeypatch, opening, make, is_first=bool(options))
    assert_nothing_written(spec)


def test_trained_tensors_that_the_module_leaves_out_are_refused_by_name(spec: JobSpec) -> None:
    with pytest.raises(ConfigError, match=r"1 trained tensors are not part .*: network\.1\.weight\..*lose them"):
        fit(spec, Forgetful)
    assert catalog.names(local_of(spec)) == []


# -- places that cannot be used ------------------------------------------------------------------------------


def test_local_folder_that_cannot_be_written_is_refused(spec: JobSpec, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with pytest.raises(ConfigError, match=rf"the local folder {in_the_way}.*Set local= \(SPOT_LOCAL\)"):
        fit(dataclasses.replace(spec, options={"local": str(in_the_way)}))
    assert_nothing_written(spec)


def test_remote_that_cannot_be_written_is_an_error_before_training(spec: JobSpec, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    result = live(dataclasses.replace(spec, options={"remote": f"{in_the_way}/job", "start_timeout_s": 2.0}))
    assert result.exit_code == 1
    assert "Training was not started" in result.log
    assert str(in_the_way) in result.log
    assert (Path(spec.folder) / "seen.jsonl").read_text() == ""


def test_unreachable_remote_is_retried_then_an_error_and_never_a_fresh_start(spec: JobSpec) -> None:
    options = nothing_listens(start_timeout_s=2.0)
    result = live(dataclasses.replace(spec, options=options))
    assert result.exit_code == 1
    assert "could not be reached for 2 s" in result.log
    assert "Training was not started" in result.log
    assert (Path(spec.folder) / "seen.jsonl").read_text() == ""


# -- another run in the same place ---------------------------------------------------------------------------

DIFFERENT: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "plain": {
        "other model": ({"kind": "two_schedulers"}, "model: Plain there, TwoSchedulers now"),
        "other accumulation": (
            {"trainer": {"accumulate_grad_batches": 2}},
            "gradient accumulation steps: 1 there, 2 now",
        ),
    },
    "lora": {
        "other LoRA rank": ({"kind": "lora_wide"}, "trained tensors"),
        "other base model": ({"seed": 8}, "frozen base weights"),
    },
}
# Known only once the data is there, when this life has been claimed.
DIFFERENT_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "other batch size": ({"batch": 2}, "batch size: 4 then, 2 now"),
    "more samples": ({"samples": 38}, "training samples: 37 then, 38 now"),
}


def refused(spec: JobSpec, case: str, changes: dict[str, Any], message: str) -> None:
    changes = {**changes, "trainer": {**spec.trainer, **changes.get("trainer", {})}}
    result = live(dataclasses.replace(spec, **changes))
    assert result.exit_code == 1, case
    assert message in result.log, case
    assert "another last component of `remote`" in result.log, case


@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_run_in_the_same_place_is_refused_and_the_one_there_goes_on(kind: str, spec: JobSpec) -> None:
    spec = dataclasses.replace(spec, kind=kind, trainer={"max_epochs": 2})
    before = started_run(spec)
    assert before
    for case, (changes, message) in DIFFERENT[kind].items():
        refused(spec, case, changes, message)
        assert stored(spec) == before, case
    assert "resume: step" in live_to_the_end(spec)[-1].log
    assert_same_training(spec, uninterrupted(spec, Path(spec.folder).with_name("reference")))


def test_other_data_is_refused_before_a_batch_is_taken_and_the_run_goes_on(spec: JobSpec) -> None:
    spec = dataclasses.replace(spec, trainer={"max_epochs": 2})
    before = {name: content for name, content in started_run(spec).items() if "checkpoints" in name}
    seen = (Path(spec.folder) / "seen.jsonl").read_text()
    for case, (changes, message) in DIFFERENT_DATA.items():
        refused(spec, case, changes, message)
        assert before.items() <= stored(spec).items(), case
        assert (Path(spec.folder) / "seen.jsonl").read_text() == seen, case
    assert "resume: step" in live_to_the_end(spec)[-1].log
    assert_same_training(spec, uninterrupted(spec, Path(spec.folder).with_name("reference")))


# -- runs that are none --------------------------------------------------------------------------------------


def test_fast_dev_run_trains_and_writes_nothing(spec: JobSpec) -> None:
    live_to_the_end(dataclasses.replace(spec, trainer={"fast_dev_run": True, "limit_val_batches": 1.0}))
    assert_nothing_written(spec)


def test_a_search_for_the_learning_rate_before_training_claims_no_life(spec: JobSpec) -> None:
    spec = dataclasses.replace(spec, trainer={"max_epochs": 1})
    trainer = trainer_of(spec)
    module = Plain(SeenLog(Path(spec.folder)))
    data = data_of("map", {})
    assert pl.tuner.Tuner(trainer).lr_find(module, **data, num_training=5).results["lr"]
    assert_nothing_written(spec)
    trainer.fit(module, **data)
    assert trainer.global_step == 10
    assert [path.name for path in Path(spec.folder, "remote/job/lives").iterdir()] == ["000001.json"]


def test_a_search_for_the_learning_rate_as_training_starts_is_not_repeated_by_a_resume(spec: JobSpec) -> None:
    spec = dataclasses.replace(spec, others=["learning rate finder"], trainer={"max_epochs": 2})
    reference = final(uninterrupted(spec, Path(spec.folder).with_name("reference")))
    live_to_the_end(spec, ["step:4", "step:15"])
    ours = final(spec)
    assert ours["step"] == reference["step"]
    assert ours["log"] == reference["log"]
    assert all(torch.equal(tensor, ours["tensors"][name]) for name, tensor in reference["tensors"].items())


def test_evaluating_without_training_needs_no_session(spec: JobSpec) -> None:
    trainer = trainer_of(dataclasses.replace(spec, trainer={"limit_val_batches": 1.0}))
    loader = data_of("map", {})["val_dataloaders"]
    assert trainer.validate(Plain(SeenLog(Path(spec.folder))), loader, verbose=False)[0]["val_loss"] > 0
    assert_nothing_written(spec)
