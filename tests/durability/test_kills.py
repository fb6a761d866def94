"""SIGKILLs at random moments of whole lives: of the trainer, of the agent alone, of both at once.

A run is killed and run again until it finishes, with the weights of an uninterrupted run. Whenever no process of it is
left, what lies on the tiers keeps the promises, and what was durable once is still there, or something newer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spot_core.store import catalog, layout
from tests.durability.job import JobSpec
from tests.durability.runs import Run, kill_agents, kill_life
from tests.durability.scale import times
from tests.faultproxy import Fault, FaultProxy
from tests.lives.lives import Life, uninterrupted, wait_for
from tests.servers import S3Server

EPOCHS = 9
KILLS_OF_A_RUN = 8
KILLS_OF_A_LIFE = 2  # of the agent: the second one hits what was started in its place
LONGEST_S = 2.5  # a life takes about a second to start: some kills hit that, some training
LOST_INSTANCES = 0.3  # share of killed lives whose instance is lost as well

NewRun = Callable[[], Run]
FOLDER, BUCKET = times(2, 37), times(1, 30)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("reference")
    return uninterrupted(_spec(folder), folder / "job")  # type: ignore[return-value]


def _spec(folder: Path, options: dict[str, Any] | None = None) -> JobSpec:
    arguments = {"num_train_epochs": EPOCHS}
    return JobSpec(folder=str(folder / "job"), arguments=arguments, options=options or {})


@pytest.fixture(params=[pytest.param(FOLDER, id="folder"), pytest.param(BUCKET, id="s3")])
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def new_run(kills: int, tmp_path: Path, s3_server: S3Server) -> NewRun:
    """Makes runs that drain to a folder, or to a bucket of their own over HTTP."""
    runs: list[Run] = []

    def new() -> Run:
        folder = tmp_path / f"run-{len(runs)}"
        if kills == FOLDER:
            runs.append(Run(_spec(folder)))
        else:
            storage = s3_server.options
            options = {"remote": f"s3://{s3_server.new_bucket()}/team/job", "storage_options": storage}
            runs.append(Run(_spec(folder, options), storage))
        return runs[-1]

    return new


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["trainer", "both"])
def test_killed_lives_are_continued_to_the_weights_of_an_uninterrupted_run(
    kind: str, kills: int, new_run: NewRun, reference: JobSpec
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw, killed, lives, lost = random.Random(seed), 0, 0, 0
    while killed < kills:
        run, until, is_finished = new_run(), min(kills, killed + KILLS_OF_A_RUN), False
        while killed < until and not is_finished:
            life = Life(run.spec)
            lives += 1
            time.sleep(draw.uniform(0.02, LONGEST_S))
            killed += kill_life(run, life, kind, draw)
            is_finished = Path(run.spec.folder, "final.pt").exists()
            if draw.random() < 0.5:
                run.settle()
            if draw.random() < LOST_INSTANCES:
                run.lose_instance()
                lost += 1
        run.finish(reference)
    print(f"{killed} kills of {kind} landed in {lives} lives, {lost} instances lost")
    assert killed >= kills


@pytest.mark.timeout(3600)
def test_a_run_whose_agent_is_killed_gets_another_and_loses_nothing(
    kills: int, new_run: NewRun, reference: JobSpec
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw, killed, lives = random.Random(seed), 0, 0
    while killed < kills:
        run = new_run()
        landed, result = kill_agents(
            run, Life(run.spec), draw, most=min(KILLS_OF_A_LIFE, kills - killed), longest_s=LONGEST_S
        )
        lives += 1
        killed += landed
        assert result.log.count("ended with code -9") >= landed, result.log[-3000:]
        assert "not on the remote" not in result.log
        run.assert_finished(result, reference)
    print(f"{killed} kills of agents landed in {lives} lives")
    assert killed >= kills


def test_an_end_that_both_died_before_draining_is_drained_by_the_next_command(
    tmp_path: Path, reference: JobSpec
) -> None:
    """Training is complete on the local tier, and nothing has told the remote."""
    run = Run(_spec(tmp_path))
    life = Life(run.spec)
    wait_for(lambda: run.agents() and catalog.names(run.remote))
    (agent,) = run.agents()
    agent.suspend()
    wait_for(lambda: catalog.completions(run.local))
    assert kill_life(run, life, "both", random.Random(1))
    assert catalog.completions(run.remote) == {}
    # The trainer's own script had not come to its end: it writes what it does after training once more.
    run.finish(reference)
    assert "had not been drained" in Path(run.spec.folder, "log.txt").read_text()


def test_an_agent_whose_trainer_was_killed_at_the_start_claims_no_life(
    tmp_path: Path, s3_server: S3Server, proxy: FaultProxy
) -> None:
    """The next life may have claimed its own by then, and would be fenced by it."""
    options = {"remote": f"s3://{s3_server.new_bucket()}/team/job", "storage_options": proxy.options}
    run = Run(_spec(tmp_path, options), s3_server.options)
    proxy.chooses = lambda request: Fault(delay_s=1.0) if len(proxy.fired) < 2 else None
    life = Life(run.spec)
    wait_for(lambda: proxy.seen)
    assert kill_life(run, life, "trainer", random.Random(1))
    run.settle()
    assert run.remote.list(layout.INCARNATIONS) == []
