"""Trainer and agent as real processes, killed and restarted: what was committed locally gets to the remote."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from spot_core.agent import lives
from spot_core.agent.lives import Life
from spot_core.store import catalog, incarnation, layout
from spot_core.store.layout import CheckpointName
from spot_core.store.posix import PosixTier
from spot_core.store.remote import FsspecTier
from spot_core.testing.invariants import assert_run_invariants
from tests.agent.place import Place
from tests.agent.processes import Refused, eventually, is_running, wait_for_end
from tests.servers import S3Server, s3_options
from tests.trees import tree

LARGE = 24 << 20


# -- how a life ends -------------------------------------------------------------------------------------------


def test_a_killed_trainers_last_commit_is_drained_and_its_death_recorded(place: Place) -> None:
    trainer = place.opened()
    name = CheckpointName.parse(trainer.do("commit", 10, LARGE))
    trainer.kill()
    wait_for_end(trainer)
    assert name == CheckpointName(1, 10)
    assert catalog.names(place.remote) == [name]
    assert_run_invariants(place.local, place.remote, durable=name)
    life = place.life()
    assert (life.outcome, life.step, life.useful_s, life.newest_durable) == (lives.DIED, 10, 1.0, str(name))
    assert Life.from_json(place.local.read(layout.life(1))) == life
    assert place.status().is_finished and str(name) in place.status().drained


def test_milestones_stay_on_the_remote_of_a_life_and_of_the_next_one(place: Place) -> None:
    options = {"keep_local": 1, "keep_remote": 1, "keep_every": 100}
    for steps in ((95, 105, 130), (199, 204, 299)):
        trainer = place.opened(**options)
        for step in steps:
            name = CheckpointName.parse(trainer.do("commit", step))
            eventually(lambda name=name: catalog.names(place.remote)[:1] == [name], f"{name} is durable")  # type: ignore[misc]
        trainer.do("outcome", lives.PREEMPTED)
        wait_for_end(trainer)
    assert [name.step for name in catalog.names(place.remote)] == [299, 204, 105]
    assert [name.step for name in catalog.names(place.local)] == [299]
    assert_run_invariants(place.local, place.remote)


def test_a_completed_life_says_so_and_its_end_is_drained(place: Place) -> None:
    trainer = place.opened()
    trainer.do("commit", 10)
    trainer.do("complete", 10)
    trainer.do("outcome", lives.COMPLETED)
    wait_for_end(trainer)
    assert trainer.do("exit_code") == 0
    assert catalog.completions(place.remote) == {CheckpointName(1, 10): 10}
    assert place.life().outcome == lives.COMPLETED


@pytest.mark.parametrize("word", [lives.PREEMPTED, lives.STOPPED, lives.FAILED])
def test_a_life_ends_with_the_word_its_trainer_left(place: Place, word: str) -> None:
    trainer = place.opened()
    trainer.do("commit", 10)
    trainer.do("outcome", word)
    trainer.kill()
    wait_for_end(trainer)
    assert place.life().outcome == word
    assert catalog.names(place.remote) == [CheckpointName(1, 10)]


def test_a_trainer_that_dies_before_its_first_commit_leaves_an_agent_that_ends(place: Place) -> None:
    trainer = place.opened()
    trainer.kill()
    wait_for_end(trainer)
    assert place.life().outcome == lives.DIED
    assert catalog.names(place.remote) == []


def test_what_crashes_left_on_the_remote_is_swept_before_the_first_drain(place: Place) -> None:
    for _ in range(2):
        trainer = place.opened()
        trainer.kill()
        wait_for_end(trainer)
    place.remote.create(f"{layout.checkpoint(CheckpointName(1, 5))}/half", b"half")
    trainer = place.opened()
    trainer.do("commit", 10)
    eventually(lambda: catalog.names(place.remote) == [CheckpointName(3, 10)], "the checkpoint is durable")
    assert place.remote.list(layout.CHECKPOINTS) == [str(CheckpointName(3, 10))]


def test_the_agent_of_a_fenced_life_stops_and_says_why(place: Place) -> None:
    old = place.opened()
    new = place.trainer()
    assert new.open(**{**place.options(), "local": str(place.folder / "another-instance")})["incarnation"] == 2
    old.do("commit", 10)
    wait_for_end(old)
    assert old.do("exit_code") == 4
    assert "incarnation 2" in str(place.status().fence)
    assert place.life().outcome == lives.FENCED
    assert catalog.names(place.remote) == []
    assert is_running(new.agent)


# -- signals and restarts --------------------------------------------------------------------------------------


def test_a_killed_agent_is_started_again_and_drains(place: Place) -> None:
    trainer = place.opened()
    os.kill(trainer.agent, signal.SIGKILL)
    eventually(lambda: trainer.do("exit_code") is not None, "the trainer sees that its agent is gone")
    assert trainer.do("exit_code") == -signal.SIGKILL
    trainer.do("commit", 10)
    assert catalog.names(place.remote) == []
    trainer.restart_agent()
    eventually(lambda: place.status().newest_durable, "the new agent drains")
    trainer.do("commit", 20)
    trainer.kill()
    wait_for_end(trainer)
    assert catalog.names(place.remote) == [CheckpointName(1, 20), CheckpointName(1, 10)]
    assert place.life().outcome == lives.DIED


def test_an_agent_started_while_the_remote_is_down_waits_for_it(place: Place) -> None:
    trainer = place.opened()
    os.kill(trainer.agent, signal.SIGKILL)
    eventually(lambda: trainer.do("exit_code") is not None, "the agent is gone")
    place.remote.create(layout.MANIFESTS, b"a file where the folder belongs: listing it fails")
    trainer.do("commit", 10)
    trainer.restart_agent()
    eventually(lambda: place.status().failures, "the failure is counted")
    trainer.kill()
    place.remote.delete([layout.MANIFESTS])
    wait_for_end(trainer)
    assert catalog.names(place.remote) == [CheckpointName(1, 10)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_agent_does_not_stop_the_drain(place: Place, signum: signal.Signals) -> None:
    trainer = place.opened()
    eventually(lambda: place.status().pid, "the agent works")
    for step in (10, 20, 30):
        trainer.do("commit", step, LARGE)
        os.kill(trainer.agent, signum)
    eventually(lambda: place.status().newest_durable == str(CheckpointName(1, 30)), "the newest is drained")
    trainer.do("outcome", lives.COMPLETED)
    wait_for_end(trainer)
    assert trainer.do("exit_code") == 0
    assert place.life().outcome == lives.COMPLETED


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_the_trainers_group_ends_the_trainer_and_not_the_drain(
    place: Place, signum: signal.Signals
) -> None:
    trainer = place.opened()
    trainer.do("commit", 10, LARGE)
    trainer.signal_group(signum)
    assert trainer.wait() == -signum
    wait_for_end(trainer)
    assert catalog.names(place.remote) == [CheckpointName(1, 10)]
    assert place.life().outcome == lives.DIED


def test_a_remote_that_fails_and_returns_is_drained_to_after_the_trainers_end(place: Place) -> None:
    trainer = place.opened()
    checkpoints = place.remote.path(layout.CHECKPOINTS)
    checkpoints.write_bytes(b"a file where the folder belongs: every upload fails")
    for step in (10, 20):
        trainer.do("commit", step)
    eventually(lambda: place.status().failures >= 2, "the failures are counted")
    assert "checkpoints" in str(place.status().last_failure)
    trainer.kill()
    checkpoints.unlink()
    wait_for_end(trainer)
    assert catalog.names(place.remote) == [CheckpointName(1, 20), CheckpointName(1, 10)]
    assert place.status().last_failure is None
    assert_run_invariants(place.local, place.remote, durable=CheckpointName(1, 20))


# -- the next life ---------------------------------------------------------------------------------------------


def test_the_next_life_resumes_and_knows_the_one_before(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10)
    first.do("commit", 20)
    first.kill()
    wait_for_end(first)
    opened = place.trainer().open(**place.options())
    assert (opened["incarnation"], opened["restored"], opened["source"]) == (2, str(CheckpointName(1, 20)), "local")
    assert opened["lives"] == [[1, lives.DIED]]


def test_the_next_life_on_a_new_instance_restores_from_the_remote(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10, LARGE)
    first.kill()
    wait_for_end(first)
    opened = place.trainer().open(**{**place.options(), "local": str(place.folder / "another-instance")})
    assert (opened["restored"], opened["source"]) == (str(CheckpointName(1, 10)), "remote")


def test_the_next_life_may_start_while_the_last_ones_agent_still_drains(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10, LARGE)
    first.kill()
    second = place.trainer()
    opened = second.open(**place.options())
    assert (opened["incarnation"], opened["restored"]) == (2, str(CheckpointName(1, 10)))
    wait_for_end(first)
    second.do("commit", 20)
    second.do("outcome", lives.COMPLETED)
    wait_for_end(second)
    assert CheckpointName(2, 20) in catalog.names(place.remote)
    assert_run_invariants(place.local, place.remote, durable=CheckpointName(2, 20))
    assert place.life(1).outcome in {lives.DIED, lives.FENCED}


def test_a_fresh_start_on_purpose_leaves_what_is_there(place: Place) -> None:
    first = place.opened()
    first.do("commit", 10)
    first.kill()
    wait_for_end(first)
    opened = place.trainer().open(**place.options(resume=False))
    assert (opened["incarnation"], opened["restored"]) == (2, "None")
    assert catalog.names(place.remote) == [CheckpointName(1, 10)]


def _finish(place: Place) -> None:
    trainer = place.opened()
    trainer.do("commit", 10)
    trainer.do("complete", 10)
    trainer.do("outcome", lives.COMPLETED)
    wait_for_end(trainer)


def test_a_finished_run_is_opened_without_a_life_and_nothing_is_written(place: Place) -> None:
    _finish(place)
    before = tree(place.folder)
    trainer = place.trainer()
    opened = trainer.open(**place.options())
    assert (opened["incarnation"], opened["restored"], opened["max_steps"]) == (None, str(CheckpointName(1, 10)), 10)
    trainer.do("dismiss")
    wait_for_end(trainer)
    assert trainer.do("exit_code") == 0
    assert tree(place.folder) == before


def test_a_finished_run_can_be_trained_further(place: Place) -> None:
    _finish(place)
    trainer = place.trainer()
    assert trainer.open(**place.options())["incarnation"] is None
    assert trainer.do("claim") == 2
    trainer.do("commit", 20)
    trainer.do("outcome", lives.COMPLETED)
    wait_for_end(trainer)
    assert catalog.names(place.remote) == [CheckpointName(2, 20), CheckpointName(1, 10)]


def test_an_agent_that_was_killed_before_it_was_to_claim_is_started_again(place: Place) -> None:
    _finish(place)
    trainer = place.trainer()
    trainer.open(**place.options())
    os.kill(trainer.agent, signal.SIGKILL)
    eventually(lambda: not is_running(trainer.agent), "the agent is dead")
    assert trainer.do("claim") == 2
    name = CheckpointName.parse(trainer.do("commit", 20))
    eventually(lambda: catalog.names(place.remote)[0] == name, "the new agent drains")


def test_an_agent_that_is_killed_while_it_claims_is_started_again(place: Place) -> None:
    _finish(place)
    trainer = place.trainer()
    trainer.open(**place.options())
    os.kill(trainer.agent, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        claimed = pool.submit(trainer.do, "claim")
        os.kill(trainer.agent, signal.SIGKILL)
        assert claimed.result() == 2
    assert incarnation.newest(place.remote) == 2


def test_what_kills_every_agent_is_told_with_what_to_do(place: Place) -> None:
    trainer = place.trainer()
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(trainer.open, **place.options())
        while not opened.done():
            for agent in psutil.Process(trainer.pid).children():
                agent.kill()
        with pytest.raises(Refused, match=r"code -9.*, as did those before it.*run the same command again") as caught:
            opened.result()
    assert caught.value.kind == "AgentError"


def test_a_finished_run_that_went_on_elsewhere_is_not_claimed_with_the_old_state(place: Place) -> None:
    _finish(place)
    trainer = place.trainer()
    trainer.open(**place.options())
    other = place.trainer()
    other.open(**place.options())
    assert other.do("claim") == 2
    other.do("commit", 20)
    other.do("outcome", lives.COMPLETED)
    eventually(lambda: place.status(2).is_finished, "the other life is over")
    os.kill(trainer.agent, signal.SIGKILL)
    eventually(lambda: not is_running(trainer.agent), "the agent is dead")
    with pytest.raises(
        Refused, match=r"000001-000000000010 and is 000002-000000000020 now.*nothing was deleted"
    ) as caught:
        trainer.do("claim")
    assert caught.value.kind == "AgentError"


# -- what the processes are made of ----------------------------------------------------------------------------


def test_the_agent_imports_no_torch_and_the_trainer_no_fsspec(place: Place, s3_server: S3Server) -> None:
    trainer = place.trainer()
    trainer.open(**place.options(remote=f"s3://{s3_server.new_bucket()}/run", storage_options=s3_server.options))
    mapped = [entry.path for entry in psutil.Process(trainer.agent).memory_maps()]
    assert not [path for path in mapped if "torch" in path]
    assert [path for path in mapped if "aiohttp" in path], "this must see the agent's libraries"
    assert trainer.do("imported") == []


def test_secrets_are_neither_in_the_process_list_nor_in_any_file(place: Place, lenient_server: S3Server) -> None:
    secret = "c2VjcmV0LW9mLXRoZS10ZXN0"
    bucket = lenient_server.new_bucket()
    storage = s3_options(lenient_server.port, secret=secret)
    trainer = place.trainer()
    trainer.open(**place.options(remote=f"s3://{bucket}/run", storage_options=storage))
    agent = psutil.Process(trainer.agent)
    assert "spot_core.agent" in agent.cmdline()
    for text in (*agent.cmdline(), *map(str, agent.environ().items())):
        assert secret not in text
    trainer.do("commit", 10)
    trainer.do("outcome", lives.COMPLETED)
    wait_for_end(trainer)
    remote = FsspecTier(f"s3://{bucket}/run", storage)
    assert catalog.names(remote) == [CheckpointName(1, 10)]
    files = {path: content for path, content in tree(place.folder).items() if content is not None}
    assert any(path.endswith("agent.log") and content for path, content in files.items())
    for path in remote._fs.find(remote._root):
        files[path] = remote._fs.cat_file(path)
    assert not [path for path, content in files.items() if secret.encode() in content]


def test_a_run_on_s3_goes_through_kill_and_resume(place: Place, s3_server: S3Server) -> None:
    remote_url = f"s3://{s3_server.new_bucket()}/team/run"
    storage = s3_server.options
    first = place.trainer()
    first.open(**place.options(remote=remote_url, storage_options=storage))
    first.do("commit", 10, LARGE)
    first.kill()
    wait_for_end(first)
    second = place.trainer()
    options = {**place.options(remote=remote_url, storage_options=storage), "local": str(place.folder / "new")}
    opened = second.open(**options)
    assert (opened["incarnation"], opened["restored"], opened["source"]) == (2, str(CheckpointName(1, 10)), "remote")
    assert opened["lives"] == [[1, lives.DIED]]
    assert_run_invariants(
        PosixTier(place.folder / "new" / "run"), FsspecTier(remote_url, storage), durable=CheckpointName(1, 10)
    )
