"""What the same command does when it is run again: after random kills, on a new machine, when it had finished."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from spot_core.store import catalog
from tests.lightning.job import JobSpec
from tests.lightning.modules import KINDS
from tests.lightning.runs import NEVER_BETTER, assert_trains_nothing_more, ends_of, forget_seen
from tests.lives.lives import (
    Life,
    assert_same_training,
    final,
    live,
    live_through_random_kills,
    live_to_the_end,
    local_of,
    lose_instance,
    remote_of,
    seen,
    uninterrupted,
    wait_for,
)

EVERY_FEW = {"limit_val_batches": 1.0, "val_check_interval": 3}
ACCUMULATED = {"accumulate_grad_batches": 3}
DEFAULTS = {"logger": True, "enable_checkpointing": True, "limit_val_batches": 1.0}
WORST = {"monitor": "val_loss", "mode": "max", "save_top_k": 1}  # the worst is "best": that of an early step


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(folder=str(tmp_path / "job"))


# -- killed from outside, on this machine or on a new one ------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (20, {"trainer": {**EVERY_FEW, "max_epochs": 12}}),
        (21, {"kind": "plateau", "workers": 2, "trainer": {**ACCUMULATED, **EVERY_FEW, "max_epochs": 12}}),
    ],
)
def test_killed_at_random_moments_ends_bit_equal(seed: int, changes: dict[str, Any], tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), **changes)
    reference = uninterrupted(spec, tmp_path / "reference")
    live_through_random_kills(spec, seed=seed, kills=8, longest_s=1.4)
    assert_same_training(spec, reference)


def test_new_machine_resumes_from_the_remote(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    # The agent finishes the drain after the trainer's death; only then is the instance lost.
    assert live(dataclasses.replace(spec, dies="step:9")).exit_code == -signal.SIGKILL
    newest = catalog.names(local_of(spec))[0]
    wait_for(lambda: catalog.names(remote_of(spec))[:1] == [newest])
    lose_instance(local_of(spec).root)
    shutil.rmtree(f"{spec.folder}/out", ignore_errors=True)
    (result,) = live_to_the_end(spec)
    assert f"resume: step {newest.step} from the remote tier" in result.log
    assert_same_training(spec, reference)


@pytest.mark.parametrize("kind", ["plain", "half_frozen"])
def test_best_model_survives_a_new_machine(kind: str, tmp_path: Path) -> None:
    """Also where our checkpoint, from which its file is written again, lacks the frozen base."""
    spec = JobSpec(folder=str(tmp_path / "job"), kind=kind, checkpoint=WORST, trainer=EVERY_FEW)
    reference = uninterrupted(spec, tmp_path / "reference")
    theirs = torch.load(final(reference)["best_model_path"], weights_only=False)
    assert 0 < theirs["global_step"] < 20, "the case needs an early best model"
    assert live(dataclasses.replace(spec, dies="step:25")).exit_code == -signal.SIGKILL
    wait_for(lambda: catalog.names(remote_of(spec)) and catalog.names(remote_of(spec))[0].step >= 20)
    lose_instance(local_of(spec).root)
    shutil.rmtree(f"{spec.folder}/out")
    (result,) = live_to_the_end(spec)
    assert "restoring the best model" in result.log
    assert_same_training(spec, reference)
    assert_best_is(theirs, spec)


def test_best_model_of_a_finished_run_is_there_on_a_new_machine(tmp_path: Path) -> None:
    """It is the last step's, which no step follows."""
    newest = {"monitor": "step", "mode": "max", "save_top_k": 1}
    spec = JobSpec(folder=str(tmp_path / "job"), checkpoint=newest, trainer={"limit_val_batches": 1.0})
    live_to_the_end(spec)
    best = torch.load(final(spec)["best_model_path"], weights_only=False)
    assert best["global_step"] == 30
    lose_instance(local_of(spec).root)
    shutil.rmtree(f"{spec.folder}/out")
    assert_trains_nothing_more(spec)
    assert_best_is(best, spec)


def assert_best_is(theirs: dict[str, Any], spec: JobSpec) -> None:
    """The file that the Trainer says is the best model loads with stock tools, and is this one."""
    path = final(spec)["best_model_path"]
    assert path.startswith(f"{spec.folder}/out/")
    ours = torch.load(path, weights_only=False)
    assert ours["global_step"] == theirs["global_step"]
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    module = KINDS[spec.kind].load_from_checkpoint(path, seen=None)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, theirs["state_dict"][name]), name


def test_sigterm_during_accumulation_with_another_exit_code(tmp_path: Path) -> None:
    spec = JobSpec(
        folder=str(tmp_path / "job"), interval_s=1000.0, trainer=ACCUMULATED, options={"preempt_exit_code": 99}
    )
    reference = uninterrupted(spec, tmp_path / "reference")
    result = live(dataclasses.replace(spec, dies="term_backward:6"))
    assert result.exit_code == 99, result.log[-3000:]
    assert [name.step for name in catalog.names(remote_of(spec))] == [7]
    (following,) = live_to_the_end(spec)
    assert "resume: step 7 " in following.log
    assert_same_training(spec, reference)


@pytest.mark.parametrize("least", [{"min_epochs": 3}, {"min_steps": 28}, {}])
def test_sigterm_commits_one_checkpoint_of_that_very_step_and_exits_75(least: dict[str, int], tmp_path: Path) -> None:
    """Although the Trainer was told not to stop so early."""
    spec = JobSpec(folder=str(tmp_path / "job"), interval_s=1000.0, trainer=least)
    reference = uninterrupted(spec, tmp_path / "reference")
    result = live(dataclasses.replace(spec, dies="term:16"))
    assert result.exit_code == 75, result.log[-3000:]
    assert [name.step for name in catalog.names(remote_of(spec))] == [17]
    assert catalog.names(local_of(spec)) == catalog.names(remote_of(spec))
    assert ends_of(spec) == [set(), set()]
    (following,) = live_to_the_end(spec)
    assert "resume: step 17 " in following.log
    assert_same_training(spec, reference)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_lightnings_own_checkpoints_may_be_on_or_off(is_enabled: bool, tmp_path: Path) -> None:
    """On is Lightning's default: the newest epoch's model, next to the logs."""
    trainer = {"enable_checkpointing": is_enabled, "logger": is_enabled}
    spec = JobSpec(folder=str(tmp_path / "job"), trainer=trainer)
    reference = uninterrupted(spec, tmp_path / "reference")
    live_to_the_end(spec, ["step:13"])
    assert_same_training(spec, reference)
    files = list(Path(spec.folder, "out").rglob("*.ckpt"))
    assert bool(files) == is_enabled
    if is_enabled:
        best = Path(final(spec)["best_model_path"])
        assert best.name == Path(final(reference)["best_model_path"]).name
        assert best.exists()


def test_patience_counts_on_across_lives(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), early_stopping=NEVER_BETTER, trainer={**EVERY_FEW, "max_epochs": 9})
    reference = uninterrupted(spec, tmp_path / "reference")
    assert final(reference)["step"] == 13, "the fourth validation without a better loss: after 3, 6, 9 and 13 batches"
    results = live_to_the_end(spec, ["step:5", "step:8", "step:12"])
    assert [result.exit_code for result in results[:-1]] == [-signal.SIGKILL] * 3
    assert_same_training(spec, reference)


# -- asked for something else ----------------------------------------------------------------------------------


def test_false_starts_afresh_and_is_what_the_next_life_continues(spec: JobSpec, tmp_path: Path) -> None:
    assert live(dataclasses.replace(spec, dies="step:20")).exit_code == -signal.SIGKILL
    fresh = live(dataclasses.replace(spec, options={"resume": False}, dies="step:12"))
    assert "fresh start as incarnation 2: resume is off" in fresh.log
    (following,) = live_to_the_end(spec)
    assert "checkpoint 000002-" in following.log
    assert_same_training(spec, uninterrupted(spec, tmp_path / "reference"))


def test_explicit_path_wins_and_is_what_the_next_life_continues(spec: JobSpec, tmp_path: Path) -> None:
    own = {"dirpath": f"{tmp_path}/other", "filename": "own", "every_n_epochs": 1}
    other = JobSpec(folder=str(tmp_path / "other"), has_callback=False, checkpoint=own)
    assert live(dataclasses.replace(other, dies="step:13")).exit_code == -signal.SIGKILL
    live(dataclasses.replace(spec, dies="step:17"))
    forget_seen(spec)
    explicit = dataclasses.replace(spec, ckpt_path=f"{tmp_path}/other/own.ckpt")
    result = live(dataclasses.replace(explicit, dies="step:15"))
    assert result.exit_code == -signal.SIGKILL, result.log[-3000:]
    assert min(seen(spec)) == 10
    (following,) = live_to_the_end(spec)
    assert "checkpoint 000002-" in following.log
    forget_seen(spec)
    # It is the user's to say: again where their file is, even though the run is complete.
    again = live(explicit)
    assert again.exit_code == 0, again.log[-3000:]
    assert min(seen(spec)) == 10


# -- what it prints --------------------------------------------------------------------------------------------


def warnings_in(log: str) -> set[str]:
    """Of Python too, which Lightning prints as `file.py:12: text`."""
    return {line for line in log.splitlines() if "warning" in line.lower() or re.search(r"\.py:\d+: ", line)}


@pytest.mark.parametrize("trainer", [DEFAULTS, {**DEFAULTS, **EVERY_FEW}])
def test_resume_warns_of_nothing_that_the_first_life_did_not(trainer: dict[str, Any], tmp_path: Path) -> None:
    """The Trainer as it is by default: its logger, its ModelCheckpoint."""
    spec = JobSpec(folder=str(tmp_path / "job"), trainer=trainer)
    first = live(dataclasses.replace(spec, dies="step:25"))
    assert first.exit_code == -signal.SIGKILL
    (second,) = live_to_the_end(spec)
    assert "resume: step" in second.log
    assert "WARNING" not in second.log
    assert warnings_in(second.log) <= warnings_in(first.log)
    third = live(spec)
    assert warnings_in(third.log) <= warnings_in(first.log)


def test_stale_incarnation_that_wakes_up_commits_nothing_and_stops(spec: JobSpec) -> None:
    stale = Life(dataclasses.replace(spec, trainer={"max_epochs": 60}))
    wait_for(lambda: len(catalog.names(remote_of(spec))) > 0)
    local_of(spec).create("incarnations/000002.json", b"{}")
    remote_of(spec).create("incarnations/000002.json", b"{}")
    result = stale.result()
    assert result.exit_code == 1
    assert "incarnation 1 is fenced: incarnation 2 of this run exists" in result.log


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_resumed_life_continues_the_tracker_run(tracker: str, spec: JobSpec) -> None:
    tracked = dataclasses.replace(spec, tracker=tracker, environ={"MLFLOW_ALLOW_FILE_STORE": "true"})
    assert live(dataclasses.replace(tracked, dies="step:15")).exit_code == -signal.SIGKILL
    live_to_the_end(tracked)
    if tracker == "wandb":
        runs = [path.name.rpartition("-")[2] for path in Path(spec.folder, "wandb").glob("offline-run-*")]
        assert len(runs) == 2, "each life writes a folder of its own"
    else:
        runs = [path.parent.name for path in Path(spec.folder, "mlruns").glob("*/*/metrics")]
    assert len(set(runs)) == 1


def test_explicit_path_that_wins_is_logged(spec: JobSpec, tmp_path: Path) -> None:
    live(dataclasses.replace(spec, dies="step:17"))
    checkpoint = next(local_of(spec).root.glob("checkpoints/*/step-*.ckpt"))
    own = shutil.copy(checkpoint, tmp_path / "own.ckpt")
    result = live(dataclasses.replace(spec, ckpt_path=str(own), dies="step:19"))
    assert "own.ckpt was given and wins over what is stored" in result.log
