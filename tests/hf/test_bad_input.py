"""Bad input is refused at start, says what is wrong and what to do, and leaves everything as it was."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from hf_spot import SpotCallback
from spot_core.errors import ConfigError
from spot_core.store import catalog
from tests.hf.job import JobSpec
from tests.lives.lives import PLACES, assert_agent_is_early, live, local_of, wait_for
from tests.servers import nothing_listens


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(folder=str(tmp_path / "job"))


def tree(folder: Path) -> dict[str, bytes]:
    """Everything that is stored, without the journal, which is about processes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "journal" not in path.parts
    }


def started_run(spec: JobSpec) -> dict[str, bytes]:
    assert live(dataclasses.replace(spec, dies="step:15")).exit_code == -signal.SIGKILL
    life = Path(spec.folder, "remote/job/lives/000001.json")
    wait_for(lambda: '"died"' in life.read_text())  # the agent has drained, pruned and ended
    return tree(Path(spec.folder, "local"))


def test_unknown_scheme_is_refused(spec: JobSpec) -> None:
    result = live(dataclasses.replace(spec, options={"remote": "s4://bucket/run"}))
    assert result.exit_code == 1
    assert "cannot open s4://" in result.log
    assert "Nothing was read or written" in result.log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval_s": 0.0}, "interval_s=0.0 is not valid"),
        ({"keep_local": 0}, "keep_local=0 is not valid: it must be a whole number, 1 or more"),
        ({"keep_remote": -1}, "keep_remote=-1 is not valid"),
        ({"keep_every": 0}, "keep_every=0 is not valid"),
        ({"grace_s": 0}, "grace_s=0 is not valid"),
        ({"preempt_exit_code": 0}, "0 would make a preempted run look finished"),
        ({"preempt_exit_code": 137}, "137 like one killed for memory"),
        ({"remote": "s3://bucket"}, "whose last component names the run"),
        ({"remote": None}, "no remote: pass remote="),
    ],
)
def test_option_out_of_range_is_refused_when_the_callback_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        SpotCallback(**{"remote": "s3://bucket/run", **options})


def test_local_folder_that_cannot_be_written_is_refused(spec: JobSpec, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    result = live(dataclasses.replace(spec, options={"local": str(in_the_way)}))
    assert result.exit_code == 1
    assert f"the local folder {in_the_way}" in result.log
    assert "Set local= (SPOT_LOCAL)" in result.log
    assert not Path(spec.folder, "remote").exists()


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "other LoRA shape": ({"kind": "lora_wide"}, "trained tensors"),
    "other base model": ({"seed": 8}, "frozen base weights"),
    "other batch geometry": (
        {"arguments": {"per_device_train_batch_size": 2}},
        "batch size per device: 4 there, 2 now",
    ),
    "other accumulation": (
        {"arguments": {"gradient_accumulation_steps": 2}},
        "gradient accumulation steps: 1 there, 2 now",
    ),
    "other data order": ({"arguments": {"data_seed": 99}}, "data seed: 7 there, 99 now"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_run_in_the_same_place_is_refused(case: str, spec: JobSpec) -> None:
    changes, message = DIFFERENT[case]
    before = started_run(spec)
    result = live(dataclasses.replace(spec, **changes))
    assert result.exit_code == 1
    assert "holds a different run" in result.log
    assert message in result.log
    assert "another last component of `remote`" in result.log
    assert tree(Path(spec.folder, "local")) == before
    assert live(spec).exit_code == 0, "the run that lives there goes on"


def test_checkpoint_damaged_by_hand_is_reported_and_the_older_one_used(spec: JobSpec) -> None:
    started_run(spec)
    newest, older = catalog.names(local_of(spec))[:2]
    for tier in ("local", "remote"):
        for weights in Path(spec.folder, tier, "job", "checkpoints", str(newest)).rglob("adapter_model.safetensors"):
            damaged = bytearray(weights.read_bytes())
            damaged[-5] ^= 1
            weights.write_bytes(damaged)
    result = live(spec)
    assert result.exit_code == 0, result.log[-3000:]
    assert f"checkpoint {newest} is damaged, trying the next older one" in result.log
    assert f"resume: step {older.step} from" in result.log


def test_every_checkpoint_damaged_is_an_error_and_nothing_is_deleted(spec: JobSpec) -> None:
    started_run(spec)
    for optimizer in Path(spec.folder).rglob("optimizer.pt"):
        optimizer.write_bytes(optimizer.read_bytes()[:-1])
    before = tree(Path(spec.folder, "local"))
    result = live(spec)
    assert result.exit_code == 1
    assert "none is valid" in result.log
    assert "start over on purpose with resume=False" in result.log
    assert tree(Path(spec.folder, "local")) == before


def test_unreachable_remote_is_retried_then_an_error_and_never_a_fresh_start(spec: JobSpec) -> None:
    options = nothing_listens(start_timeout_s=3.0)
    result = live(dataclasses.replace(spec, options=options))
    assert result.exit_code == 1
    assert "could not be reached for 3 s" in result.log
    assert "Training was not started" in result.log
    assert not Path(spec.folder, "final.pt").exists()


def test_local_disk_smaller_than_a_checkpoint_is_refused(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from spot_core.store.posix import check_usable

    with pytest.raises(ConfigError, match="MB free, a checkpoint needs about"):
        check_usable(Path(spec.folder), 1 << 60)


@pytest.mark.parametrize("setting", ["auto_find_batch_size", "enable_jit_checkpoint"])
def test_a_setting_that_cannot_be_resumed_exactly_is_refused(setting: str, spec: JobSpec) -> None:
    result = live(dataclasses.replace(spec, arguments={setting: True}))
    assert result.exit_code == 1
    assert f"does not work with {setting}=True" in result.log
    assert not Path(spec.folder, "remote").exists()


def test_evaluating_without_training_needs_no_session(tmp_path: Path) -> None:
    from tests.hf.job import trainer_of

    trainer = trainer_of(JobSpec(folder=str(tmp_path), kind="full"))
    assert trainer.evaluate()["eval_loss"] > 0
    assert not Path(tmp_path, "remote").exists()


def test_two_callbacks_on_one_trainer_are_refused(tmp_path: Path) -> None:
    from tests.hf.job import trainer_of

    trainer = trainer_of(JobSpec(folder=str(tmp_path)))
    trainer.add_callback(SpotCallback(f"{tmp_path}/remote/other"))
    with pytest.raises(ConfigError, match="two SpotCallbacks"):
        trainer.train()


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_the_agent_loads_while_the_model_is_read_and_ends_where_that_fails(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_spot import resume as resuming
    from tests.hf.job import trainer_of

    spec = JobSpec(folder=str(tmp_path), options=options)
    assert_agent_is_early(monkeypatch, resuming, lambda: trainer_of(spec).train, is_first=bool(options))


def test_trained_tensors_outside_the_adapter_are_refused_by_name(tmp_path: Path) -> None:
    from tests.hf.job import trainer_of

    trainer = trainer_of(JobSpec(folder=str(tmp_path)))
    trainer.model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"norm\.weight.*modules_to_save"):
        trainer.train()
    assert not Path(tmp_path, "remote").exists()
