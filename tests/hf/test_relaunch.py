"""What the same command does when it is run again: after random kills, on a new machine, when it had finished."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from spot_core.agent import lives
from spot_core.store import catalog
from tests.hf.job import JobSpec
from tests.lives.lives import (
    Life,
    assert_same_training,
    final,
    first_ended,
    live,
    live_through_random_kills,
    live_to_the_end,
    local_of,
    lose_instance,
    remote_of,
    uninterrupted,
    wait_for,
)

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the worst loss is "best": that of an early step
}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(folder=str(tmp_path / "job"))


def test_killed_at_random_moments_ends_bit_equal(tmp_path: Path) -> None:
    spec = JobSpec(
        folder=str(tmp_path / "job"), arguments={"eval_strategy": "steps", "eval_steps": 4, "num_train_epochs": 9}
    )
    reference = uninterrupted(spec, tmp_path / "reference")
    live_through_random_kills(spec, seed=20, kills=15, longest_s=1.6)
    assert_same_training(spec, reference)


def test_killed_during_a_save_resumes_from_the_newest_complete_step(spec: JobSpec) -> None:
    """Storage operations all over a job's second save: the next life resumes from the newest manifest, nobody helps.

    Every single operation is tried in tests/store, where a life costs less.
    """
    live(dataclasses.replace(spec, dies="operation:0"))
    ends = [int(line) for line in Path(spec.folder, "operations.txt").read_text().split()]
    first, second = ends[0], ends[1]
    resumed_from = set()
    for number in [*range(first, second, max(1, (second - first) // 8)), second + 12]:
        spec = dataclasses.replace(spec, folder=f"{spec.folder}-{number}")
        life = live(dataclasses.replace(spec, dies=f"operation:{number}"))
        assert life.exit_code == -signal.SIGKILL
        newest = max(catalog.names(local_of(spec)), default=None)
        following = live(dataclasses.replace(spec, dies="step:29"))
        if newest is not None:
            assert f"resume: step {newest.step} from the local tier" in following.log
            resumed_from.add(newest.step)
    assert len(resumed_from) > 1, "some died before the second commit, some after"


def test_new_machine_resumes_from_the_remote(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    # The agent finishes the drain after the trainer's death; only then is the instance lost.
    life = Life(dataclasses.replace(spec, dies="step:9"))
    assert life.result().exit_code == -signal.SIGKILL
    newest = catalog.names(local_of(spec))[0]
    wait_for(lambda: catalog.names(remote_of(spec))[:1] == [newest])
    lose_instance(local_of(spec).root)
    shutil.rmtree(f"{spec.folder}/out", ignore_errors=True)
    result = live(spec)
    assert f"resume: step {newest.step} from the remote tier" in result.log
    assert_same_training(spec, reference)


def test_best_model_survives_a_new_machine(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), arguments=BEST)
    reference = uninterrupted(spec, tmp_path / "reference")
    best_step = json.loads(next(Path(reference.folder, "out").glob("checkpoint-30/trainer_state.json")).read_text())
    assert 0 < best_step["best_global_step"] < 20, "the case needs an early best model"
    assert live(dataclasses.replace(spec, dies="step:23")).exit_code == -signal.SIGKILL
    wait_for(lambda: catalog.names(remote_of(spec)) and catalog.names(remote_of(spec))[0].step >= 16)
    lose_instance(local_of(spec).root)
    shutil.rmtree(f"{spec.folder}/out", ignore_errors=True)
    result = live(spec)
    assert result.exit_code == 0, result.log[-3000:]
    assert "restoring the best model" in result.log
    assert_same_training(spec, reference)


def test_finished_run_exits_at_once_and_commits_nothing(spec: JobSpec) -> None:
    live_to_the_end(spec)
    before = {path: path.read_bytes() for path in remote_of(spec).root.rglob("*") if path.is_file()}
    trained = final(spec)
    Path(spec.folder, "seen.jsonl").unlink()
    again = live(spec)
    assert again.exit_code == 0, again.log[-3000:]
    assert {path: path.read_bytes() for path in remote_of(spec).root.rglob("*") if path.is_file()} == before
    assert Path(spec.folder, "seen.jsonl").read_text() == ""
    assert all(torch.equal(tensor, final(spec)["tensors"][name]) for name, tensor in trained["tensors"].items())


def test_run_that_was_stopped_early_stays_stopped(tmp_path: Path) -> None:
    spec = JobSpec(folder=str(tmp_path / "job"), stop_at=15)
    live_to_the_end(spec)
    assert final(spec)["step"] == 15
    Path(spec.folder, "seen.jsonl").unlink()
    again = live(spec)
    assert again.exit_code == 0, again.log[-3000:]
    assert final(spec)["step"] == 15
    assert Path(spec.folder, "seen.jsonl").read_text() == ""


def test_finished_run_with_more_epochs_trains_on(spec: JobSpec) -> None:
    live_to_the_end(spec)
    longer = dataclasses.replace(spec, arguments={"num_train_epochs": 4})
    result = live(longer)
    assert result.exit_code == 0, result.log[-3000:]
    assert "resume: step 30 from the local tier" in result.log
    assert final(longer)["step"] == 40


def test_false_starts_afresh_and_is_what_the_next_life_continues(spec: JobSpec) -> None:
    assert live(dataclasses.replace(spec, dies="step:20")).exit_code == -signal.SIGKILL
    fresh = live(dataclasses.replace(spec, resume=False, dies="step:12"))
    assert "fresh start as incarnation 2: resume is off" in fresh.log
    following = live(spec)
    assert "checkpoint 000002-" in following.log
    assert following.exit_code == 0


def test_explicit_path_wins(spec: JobSpec, tmp_path: Path) -> None:
    own_saves = {"save_strategy": "steps", "save_steps": 5}
    other = JobSpec(folder=str(tmp_path / "other"), has_callback=False, arguments=own_saves)
    assert live(dataclasses.replace(other, dies="step:13")).exit_code == -signal.SIGKILL
    live(dataclasses.replace(spec, dies="step:20"))
    result = live(dataclasses.replace(spec, resume=f"{other.folder}/out/checkpoint-10"))
    assert result.exit_code == 0, result.log[-3000:]
    first = json.loads(Path(spec.folder, "seen.jsonl").read_text().splitlines()[-20])
    assert first[1] == 10
    assert "wins over what is stored" in result.log


def test_sigterm_commits_the_step_and_exits_75(spec: JobSpec, tmp_path: Path) -> None:
    reference = uninterrupted(spec, tmp_path / "reference")
    result = live(dataclasses.replace(spec, dies="term:17", interval_s=1000.0))
    assert result.exit_code == 75, result.log[-3000:]
    assert catalog.names(remote_of(spec))[0].step == 18, "the step in which the signal came is durable on the remote"
    first_ended(spec, lives.PREEMPTED)
    following = live(spec)
    assert "resume: step 18" in following.log
    assert_same_training(spec, reference)


def test_stale_incarnation_that_wakes_up_commits_nothing_and_stops(spec: JobSpec) -> None:
    stale = Life(dataclasses.replace(spec, arguments={"num_train_epochs": 60}))
    wait_for(lambda: len(catalog.names(remote_of(spec))) > 0)
    os.kill(stale.pid, signal.SIGSTOP)
    local_of(spec).create("incarnations/000002.json", b"{}")
    remote_of(spec).create("incarnations/000002.json", b"{}")
    before = catalog.names(local_of(spec))
    os.kill(stale.pid, signal.SIGCONT)
    result = stale.result()
    assert result.exit_code == 1
    assert "incarnation 1 is fenced: incarnation 2 of this run exists" in result.log
    # The commit in flight when it was stopped may have been past its last check; nothing after it.
    assert len(set(catalog.names(local_of(spec))) - set(before)) <= 1


def test_stream_in_its_second_pass_goes_on_to_the_last_step_and_says_what_it_lost(spec: JobSpec) -> None:
    """The Trainer takes a stream for one endless epoch: skipping into its second pass would end training early."""
    stream = dataclasses.replace(spec, data="stream", arguments={"max_steps": 24})
    assert live(dataclasses.replace(stream, dies="step:16")).exit_code == -signal.SIGKILL
    result = live(stream)
    assert result.exit_code == 0, result.log[-3000:]
    assert "not bit-exact" in result.log
    assert "it starts over" in result.log
    assert final(stream)["step"] == 24


def test_a_resumed_life_continues_the_tracker_run(spec: JobSpec) -> None:
    """Weights & Biases, offline: both lives write the same run."""
    tracked = dataclasses.replace(spec, arguments={"report_to": "wandb"}, tracks=True)
    assert live(dataclasses.replace(tracked, dies="step:15")).exit_code == -signal.SIGKILL
    assert live(tracked).exit_code == 0
    runs = [path.name.rpartition("-") for path in Path(spec.folder, "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len({run_id for _, _, run_id in runs}) == 1


def test_the_summary_speaks_of_this_life_and_not_of_the_sum_of_all(spec: JobSpec) -> None:
    assert live(dataclasses.replace(spec, dies="step:22")).exit_code == -signal.SIGKILL
    assert live(spec).exit_code == 0
    logged = [entry["loss"] for entry in final(spec)["log"] if "loss" in entry]
    (summary,) = final(spec)["summaries"]
    assert min(logged) - 0.05 < summary["train_loss"] < max(logged) + 0.05
