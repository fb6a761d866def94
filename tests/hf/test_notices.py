"""A Trainer that is told of its preemption, by a provider or a signal. Real processes, real HTTP."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from spot_core.agent import lives
from spot_core.store import catalog, resume
from tests.hf.job import JobSpec
from tests.lives.announcer import LEAD_S, SOURCES, announcer
from tests.lives.lives import (
    Life,
    assert_same_training,
    begun,
    final,
    first_ended,
    left_step,
    live,
    local_of,
    lose_instance,
    remote_of,
    uninterrupted,
    wait_for,
)

# Long enough for a notice to come, be used and be over: about 25 ms a step.
STEPS = 600


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(str(tmp_path / "job"), interval_s=1.0, arguments={"max_steps": STEPS})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("reference")
    return uninterrupted(JobSpec(str(folder), arguments={"max_steps": STEPS}), folder / "plain")


def quiet(spec: JobSpec) -> JobSpec:
    """The same job where nothing is announced."""
    return dataclasses.replace(spec, options={}, environ={})


@pytest.mark.parametrize("source", SOURCES)
def test_a_notice_is_trained_through_and_costs_no_step(
    source: str, spec: JobSpec, reference: JobSpec, tmp_path: Path
) -> None:
    with announcer(source, tmp_path / "told") as told:
        spec = told.over(spec)
        life = begun(spec)
        deadline = told.announce(LEAD_S)
        wait_for(lambda: "once more just before the end" in life.log)
        seen = time.time()
        result = life.result()
        left = time.time()
    assert result.exit_code == 75, result.log[-3000:]
    assert left < deadline
    takes_s = float(re.search(r"saving once more: a checkpoint takes ([\d.]+) s", result.log)[1])  # type: ignore[index]
    assert left - seen >= 0.8 * (deadline - seen - takes_s), "it trained on for most of what a last checkpoint left"
    step = left_step(result.log)
    assert catalog.names(remote_of(spec))[0].step == step
    assert first_ended(spec, lives.PREEMPTED)["step"] == step, "not one step more was made than is durable"
    following = live(quiet(spec))
    assert f"resume: step {step}" in following.log
    assert_same_training(spec, reference)


def test_a_notice_that_is_withdrawn_changes_nothing(spec: JobSpec, reference: JobSpec, tmp_path: Path) -> None:
    with announcer("azure", tmp_path) as told:
        life = begun(told.over(spec))
        told.announce(LEAD_S)
        wait_for(lambda: "once more just before the end" in life.log)
        told.withdraw()
        result = life.result()
    assert result.exit_code == 0, result.log[-3000:]
    assert "azure withdrew its notice: training goes on as usual" in result.log
    assert_same_training(spec, reference)


def test_a_notice_too_short_for_a_checkpoint_leaves_the_one_before_whole(
    spec: JobSpec, reference: JobSpec, tmp_path: Path
) -> None:
    spec = dataclasses.replace(spec, interval_s=None, options={"interval_steps": 40})
    with announcer("webhook", tmp_path) as told:
        life = begun(told.over(spec))
        deadline = told.announce(1.5)
        time.sleep(max(0.0, deadline - time.time()))
        life.kill()
        assert life.result().exit_code == -signal.SIGKILL
        lose_instance(Path(spec.folder, "local/job"))
    assert re.search(r"until it is durable: \d\.\d s too many. The checkpoint before stands", life.log), life.log
    newest = catalog.names(remote_of(spec))[0]
    resume.verify(remote_of(spec), catalog.read_manifest(remote_of(spec), newest))
    following = live(dataclasses.replace(spec, options={}))
    assert f"resume: step {newest.step}" in following.log
    assert_same_training(spec, reference)


def test_a_signal_in_the_middle_of_a_notice_ends_the_job_at_once(spec: JobSpec, tmp_path: Path) -> None:
    """Google sends SIGTERM half a minute before the end, long after a notice that came early."""
    with announcer("gcp", tmp_path) as told:
        spec = told.over(spec)
        spec = dataclasses.replace(spec, options={**spec.options, "notice_lead_s": 600.0})
        life = begun(spec)
        told.announce(600.0)
        wait_for(lambda: "once more just before the end" in life.log)
        os.kill(life.pid, signal.SIGTERM)
        result = life.result()
    assert result.exit_code == 75
    assert catalog.names(remote_of(spec))[0].step == left_step(result.log)


def test_in_a_notebook_training_returns_and_the_process_lives_on(spec: JobSpec, reference: JobSpec) -> None:
    spec = dataclasses.replace(spec, options={"on_preempt": "return"})
    life = begun(spec)
    os.kill(life.pid, signal.SIGTERM)
    result = life.result()
    assert result.exit_code == 0, result.log[-3000:]
    assert final(spec)["step"] == left_step(result.log) < STEPS
    assert live(spec).exit_code == 0
    assert_same_training(spec, reference)


def test_a_signal_before_the_first_step_leaves_with_the_documented_code(spec: JobSpec) -> None:
    begun(spec).kill()
    for log in ("run job: local tier", "resume: step"):
        life = Life(spec)
        wait_for(lambda log=log, life=life: log in life.log)  # type: ignore[misc]
        os.kill(life.pid, signal.SIGTERM)
        result = life.result()
        assert result.exit_code == 75, result.log[-3000:]
        assert "run the same command again" in result.log


def test_a_signal_to_the_whole_group_with_workers(spec: JobSpec, tmp_path: Path) -> None:
    """Once, then twice in quick succession. It ends the workers, and PyTorch calls that an error wherever it is."""
    workers = {"dataloader_num_workers": 4, "dataloader_persistent_workers": True}
    spec = dataclasses.replace(spec, arguments={**spec.arguments, **workers})
    for signals in (1, 2):
        life = begun(spec, steps=signals * 100)
        for _ in range(signals):
            os.killpg(life.pid, signal.SIGTERM)
            time.sleep(0.02)
        result = life.result()
        assert result.exit_code == 75, result.log[-3000:]
        assert catalog.names(remote_of(spec))[0].step == left_step(result.log)
    assert live(spec).exit_code == 0
    assert_same_training(spec, uninterrupted(spec, tmp_path / "reference"))


@pytest.mark.parametrize("place", ["operation", "restore", "last step"])
def test_a_signal_where_files_are_written_or_training_ends(place: str, spec: JobSpec, tmp_path: Path) -> None:
    """In the middle of commits, each at another operation on a file; of a restore; and in the last step."""
    spec = dataclasses.replace(spec, arguments={}, interval_s=0.001)
    reference = uninterrupted(spec, tmp_path / "reference")
    if place == "last step":
        result = live(dataclasses.replace(spec, dies="term:29"))
        assert result.exit_code == 0, "there is nothing left to come back for"
    elif place == "restore":
        begun(spec, steps=5).kill()
        assert live(dataclasses.replace(spec, dies="term_operation:3")).exit_code == 75
    else:
        reached = 0
        for number in (70, 85, 100):
            result = live(dataclasses.replace(spec, dies=f"term_operation:{number}"))
            assert result.exit_code == 75, result.log[-3000:]
            assert left_step(result.log) > reached
            reached = left_step(result.log)
            assert catalog.names(remote_of(spec))[0].step == reached
    assert live(spec).exit_code == 0
    assert_same_training(spec, reference)


IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c")


def first_process_of(container: subprocess.Popen[bytes]) -> int:
    """Its pid as seen from outside, where a signal for a container comes from."""
    return int(psutil.Process(container.pid).children()[0].pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of its own needs root")
@pytest.mark.parametrize("script", ["exec COMMAND", "COMMAND; true"])
def test_a_signal_to_the_first_process_of_a_container(script: str, spec: JobSpec, tmp_path: Path) -> None:
    """A shell there keeps it to itself, as a training says when it starts: what was committed before stands."""
    spec = dataclasses.replace(spec, interval_s=0.2, arguments={"max_steps": 200})
    reference = uninterrupted(spec, tmp_path / "reference")
    described = json.dumps(dataclasses.asdict(spec))
    command = shlex.join([sys.executable, "-m", "tests.lives.once", "tests.hf.job", described])
    Path(spec.folder).mkdir(parents=True)
    log = Path(spec.folder, "log.txt")
    with log.open("wb") as file:
        container = subprocess.Popen([*IN_A_CONTAINER, script.replace("COMMAND", command)], stdout=file, stderr=file)
    wait_for(lambda: any(name.step >= 30 for name in catalog.names(remote_of(spec))), timeout_s=120.0)
    os.kill(first_process_of(container), signal.SIGTERM)
    if script.startswith("COMMAND"):
        time.sleep(0.5)
        assert container.poll() is None
        os.kill(first_process_of(container), signal.SIGKILL)  # the grace period is over
        container.wait(timeout=30)
        assert "the first process is a shell" in log.read_text()
        step = max(name.step for tier in (local_of(spec), remote_of(spec)) for name in catalog.names(tier))
    else:
        assert container.wait(timeout=30) == 75, log.read_text()[-3000:]
        assert "the first process is a shell" not in log.read_text()
        step = left_step(log.read_text())
        assert catalog.names(remote_of(spec))[0].step == step
    following = live(spec)
    assert f"resume: step {step} from the" in following.log
    assert_same_training(spec, reference)


# -- while training hangs ----------------------------------------------------------------------------------------

EVALUATES = {"eval_strategy": "steps", "eval_steps": 9}


@pytest.mark.parametrize("source", ["signal", "webhook"])
@pytest.mark.parametrize(("dies", "step"), [("hang_reading:16", 16), ("hang_evaluation:18", 18)])
def test_an_end_announced_while_training_hangs_for_longer_saves_the_last_step(
    dies: str, step: int, source: str, tmp_path: Path
) -> None:
    """A minute in the middle of a batch or of an evaluation, ten seconds of warning, and no checkpoint of that step."""
    spec = JobSpec(str(tmp_path / "job"), interval_s=1000.0, data="augmented", arguments=EVALUATES)
    reference = uninterrupted(spec, tmp_path / "reference")
    with announcer("webhook", tmp_path) as told:
        hanging = dataclasses.replace(told.over(spec), dies=dies)
        life = Life(dataclasses.replace(hanging, options={**hanging.options, "grace_s": LEAD_S}))
        wait_for(lambda: "hanging at" in life.log)
        deadline = time.time() + LEAD_S
        if source == "signal":
            os.kill(life.pid, signal.SIGTERM)
        else:
            told.announce(LEAD_S)
        result = life.result()
        assert time.time() < deadline, "it left before the end"
    assert result.exit_code == 75, result.log[-3000:]
    assert left_step(result.log) == step
    assert catalog.names(remote_of(spec))[0].step == step
    following = live(spec)
    assert following.exit_code == 0, following.log[-3000:]
    assert f"resume: step {step} " in following.log
    if "reading" in dies:
        assert_same_training(spec, reference)
    else:
        assert f"not bit-exact: the evaluation of step {step} was cut off by a preemption" in following.log
        assert final(spec)["step"] == final(reference)["step"]
