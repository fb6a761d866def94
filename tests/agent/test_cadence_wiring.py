"""A real agent's part in the cadence: where the life runs, how long it lived, hints of danger, and the fleet."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spot_core.agent import fleet, lives
from spot_core.agent.client import AgentClient, OpenedRun
from spot_core.agent.fleet import FleetMember, read_pool
from spot_core.agent.journal import Journal
from spot_core.agent.lives import Life
from spot_core.agent.monitor import AgentMonitor
from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import End, Evidence
from spot_core.cadence.interval import Costs
from spot_core.cadence.record import CadenceRecord
from spot_core.config import SpotConfig
from spot_core.errors import SpotError
from spot_core.notice.instance import read_instance
from spot_core.store import layout
from spot_core.store.identity import RunIdentity
from spot_core.store.posix import PosixTier
from spot_core.store.tier import open_tier
from tests.agent.place import Place
from tests.agent.processes import eventually, wait_for_end
from tests.disk import mounted
from tests.metadata import AwsServer, Fault
from tests.servers import free_port, s3_options
from tests.trees import tree

POOL = "aws/us-east-1/us-east-1a/g5.xlarge"
RECORD = json.loads(
    json.dumps(CadenceRecord(Cadence(costs=Costs(stall_s=0.5, upload_s=4.0)), 60.0, 5.0, 0.0).to_json())
)
# What names a provider or a job, on the machine of whoever runs the tests.
_PROVIDERS = ("AWS_EC2_", "GCE_METADATA", "SPOT_", "RUNPOD_", "VAST_", "MODAL_", "TRAINING_JOB", "SLURM_")


@pytest.fixture(autouse=True)
def _nowhere_in_particular(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(_PROVIDERS)]:
        monkeypatch.delenv(name)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsServer]:
    """The instance of this test: a g5.xlarge, as its metadata service says."""
    with AwsServer() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        yield server


class Run:
    """A run whose trainer is this process: each life has an agent of its own."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.local, self.remote = PosixTier(folder / "local" / name), PosixTier(folder / "bucket" / name)
        options = {"remote": str(self.remote.root), "local": str(folder / "local"), **options}
        self._config = SpotConfig.resolve(options, fallback_local=".", environ={})
        self.clients: list[AgentClient] = []

    def open(self) -> OpenedRun:
        self.clients.append(AgentClient(self._config, RunIdentity("testing", {})))
        return self.client.open()

    @property
    def client(self) -> AgentClient:
        return self.clients[-1]

    @property
    def journal(self) -> Journal:
        return Journal(self.local.root, self.client.incarnation or 0)

    def life(self) -> Life:
        """The record of the present life, on the remote."""
        try:
            return Life.from_json(self.remote.read(layout.life(self.client.incarnation or 0)))
        except FileNotFoundError:
            return Life(incarnation=0, host="", boot_id="", started=0.0, heartbeat=0.0)

    def end(self, outcome: str = lives.STOPPED) -> Life:
        """The trainer leaves with that word, and its agent follows."""
        self.journal.write_outcome(outcome)
        eventually(lambda: self.client.exit_code() is not None, "the agent ends by itself")
        assert self.client.exit_code() == 0
        return self.life()

    def kill_agent(self) -> None:
        assert self.client._process is not None
        os.kill(self.client._process.pid, signal.SIGKILL)
        eventually(lambda: self.client.exit_code() is not None, "the agent is dead")

    def close(self) -> None:
        for client in self.clients:
            if client.exit_code() is None and client._process is not None:
                client._process.kill()
                client._process.wait()
            client.dismiss()


class Runs:
    """Makes runs in one folder, and ends them with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[Run] = []

    def __call__(self, name: str = "run", **options: Any) -> Run:
        self._made.append(Run(self.folder, name, **options))
        return self._made[-1]

    def close(self) -> None:
        for run in self._made:
            run.close()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path)
    yield runs
    runs.close()


# -- the life's record -------------------------------------------------------------------------------------------


def test_a_record_says_where_the_life_runs_and_since_when(runs: Runs, aws: AwsServer) -> None:
    run = runs()
    opened = run.open()
    eventually(lambda: run.life().incarnation, "the first heartbeat is written")
    life = run.life()
    assert (life.instance, life.pool) == ("i-0123456789abcdef0", POOL)
    assert life.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (opened.instance.id, opened.instance.pool, opened.instance.is_spot) == (life.instance, POOL, True)
    assert life.began_s == pytest.approx(run.client.started_unix_s - opened.instance.booted, abs=0.01)
    assert life.began_s > 0 and life.started == run.client.started_unix_s
    assert life.outcome == lives.RUNNING and life.lived_s is not None
    assert 0 < life.lived_s <= time.monotonic() - run.client.began
    assert Life.from_json(run.local.read(layout.life(1))) == life


def test_without_a_provider_a_record_says_what_the_machine_knows(runs: Runs) -> None:
    here = read_instance(os.environ)
    run = runs()
    run.open()
    life = run.end()
    assert (life.instance, life.boot_id, life.pool) == (here.id, here.boot_id, here.pool)
    assert life.instance and life.boot_id


@pytest.mark.parametrize("fault", [Fault.HANGS, Fault.BROKEN, Fault.IS_NO_JSON])
def test_a_metadata_service_in_trouble_keeps_no_training_from_its_start(
    runs: Runs, aws: AwsServer, fault: Fault
) -> None:
    aws.fault = fault
    run = runs()
    opened = run.open()
    assert opened.incarnation == 1
    assert opened.instance.id not in {"", "i-0123456789abcdef0"}


def test_what_training_wrote_of_its_cadence_is_in_the_record_and_known_to_the_next_life(runs: Runs) -> None:
    run = runs()
    assert run.open().lives == []
    run.journal.write_cadence(RECORD)
    life = run.end(lives.PREEMPTED)
    assert life.cadence == RECORD
    (before,) = run.open().lives
    assert before == life
    second = run.end()
    assert (second.incarnation, second.cadence) == (2, None), "each life has its own"


def test_an_agent_that_is_started_again_keeps_the_lives_place_and_age(runs: Runs, aws: AwsServer) -> None:
    run = runs()
    run.open()
    run.journal.write_cadence(RECORD)
    eventually(lambda: run.life().incarnation, "the first heartbeat is written")
    first = run.life()
    run.kill_agent()
    run.client.restart()
    life = run.end()
    place = (life.instance, life.pool, life.boot_id, life.began_s, life.cadence)
    assert place == (first.instance, first.pool, first.boot_id, first.began_s, RECORD)
    assert life.lived_s is not None and life.lived_s > (first.lived_s or 0.0), "since the life began, not the agent"


def test_how_long_a_life_lived_ends_with_its_trainer_and_not_with_the_drain(place: Place) -> None:
    trainer = place.opened()
    checkpoints = place.remote.path(layout.CHECKPOINTS)
    checkpoints.write_bytes(b"a file where the folder belongs: every upload fails")
    trainer.do("commit", 10)
    eventually(lambda: place.status().failures, "an upload fails")
    trainer.kill()
    ended_unix_s, failures = time.time(), place.status().failures
    eventually(lambda: place.status().failures >= failures + 2, "uploads are tried again after the trainer's end")
    drained_from_unix_s = time.time()
    checkpoints.unlink()
    wait_for_end(trainer)
    life = place.life()
    assert life.outcome == lives.DIED and life.lived_s is not None
    waited_s = drained_from_unix_s - ended_unix_s
    assert life.heartbeat - life.started - life.lived_s > waited_s / 2, "the drain went on that much longer"
    assert life.duration_s == life.lived_s


# -- hints of danger ---------------------------------------------------------------------------------------------


def test_a_rebalance_recommendation_reaches_the_trainer(runs: Runs, aws: AwsServer) -> None:
    run = runs()
    run.open()
    monitor = AgentMonitor(run.client, run.journal)
    monitor.start()
    try:
        eventually(lambda: aws.rebalance in aws.paths, "the agent asks")
        assert monitor.hinted_unix_s is None
        aws.documents[aws.rebalance] = {"noticeTime": "2026-11-20T09:00:00Z"}
        eventually(lambda: monitor.hinted_unix_s, "the trainer knows")
    finally:
        monitor.close()
    status = run.journal.read_status()
    assert status is not None
    assert status.hinted_unix_s == monitor.hinted_unix_s == 1_795_165_200.0


# -- the fleet ---------------------------------------------------------------------------------------------------


def warnings(caplog: pytest.LogCaptureFixture, run: Run) -> list[str]:
    """What was told, by way of the trainer while the run was opened and in the agent's own log after that."""
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    log = run.journal.log_path
    return told + [line for line in log.read_text().splitlines() if " INFO " not in line and " DEBUG " not in line]


def test_a_new_run_on_the_same_pool_starts_with_what_the_first_one_saw(runs: Runs, aws: AwsServer) -> None:
    shared = str(runs.folder / "fleet")
    first, second = runs("first", fleet=shared), runs("second", fleet=shared)
    assert first.open().fleet == Evidence(), "nobody was here before"
    life = first.end(lives.PREEMPTED)
    assert lives.end_of(life) is End.LOST
    learnt = second.open().fleet
    assert learnt.losses == 1.0
    assert life.lived_s is not None
    assert learnt.exposure_h[0] == pytest.approx(life.lived_s / 3600, rel=0.01)
    assert first.open().fleet == Evidence(), "a run does not count itself"


def test_in_another_pool_it_counts_less_or_nothing(runs: Runs, aws: AwsServer) -> None:
    shared = str(runs.folder / "fleet")
    first = runs("first", fleet=shared)
    first.open()
    first.end(lives.PREEMPTED)
    aws.documents[aws.identity]["availabilityZone"] = "us-east-1b"
    assert 0 < runs("second", fleet=shared).open().fleet.losses < 1
    aws.documents[aws.identity]["instanceType"] = "p5.48xlarge"
    assert runs("third", fleet=shared).open().fleet.losses == 0


def test_what_a_life_could_not_share_is_shared_by_the_next_one(runs: Runs, aws: AwsServer) -> None:
    """Its agent went with the instance. The next life knows by then how it ended."""
    shared = open_tier(str(runs.folder / "fleet"))
    run = runs(fleet=shared.url)
    run.open()
    eventually(lambda: run.life().incarnation, "the first heartbeat is written")
    run.kill_agent()
    assert read_pool(shared, POOL, but_run_id="other").losses == 0
    aws.documents[aws.identity]["instanceId"] = "i-0fedcba9876543210"
    run.open()
    eventually(lambda: read_pool(shared, POOL, but_run_id="other").losses, "the loss is shared")
    assert read_pool(shared, POOL, but_run_id="other").losses == 1.0


def test_without_a_fleet_nothing_is_shared(runs: Runs, aws: AwsServer, caplog: pytest.LogCaptureFixture) -> None:
    run = runs()
    assert run.open().fleet == Evidence()
    run.end(lives.PREEMPTED)
    assert warnings(caplog, run) == []
    assert sorted(file.name for file in runs.folder.iterdir()) == ["bucket", "local"]


def test_a_fleet_in_order_is_not_worth_a_warning(runs: Runs, aws: AwsServer, caplog: pytest.LogCaptureFixture) -> None:
    run = runs(fleet=str(runs.folder / "fleet"))
    run.open()
    run.end()
    assert warnings(caplog, run) == []


def one_warning(caplog: pytest.LogCaptureFixture, run: Run) -> str:
    """Of a life that starts and ends as any other."""
    opened = run.open()
    assert (opened.incarnation, opened.fleet) == (1, Evidence())
    assert run.end(lives.PREEMPTED).outcome == lives.PREEMPTED
    (told,) = warnings(caplog, run)
    assert "fleet" in told and "Training is not affected" in told
    return told


def test_a_fleet_that_is_no_folder_is_told_once(runs: Runs, aws: AwsServer, caplog: pytest.LogCaptureFixture) -> None:
    (runs.folder / "fleet").write_text("a file")
    assert "is not known" in one_warning(caplog, runs(fleet=str(runs.folder / "fleet")))
    assert (runs.folder / "fleet").read_text() == "a file"


def test_a_read_only_fleet_is_told_once_and_still_read(
    runs: Runs, aws: AwsServer, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted(runs.folder / "disk", "ro") as disk:
        assert "is not shared" in one_warning(caplog, runs(fleet=str(disk / "fleet")))


def test_a_fleet_that_does_not_answer_is_told_once(
    runs: Runs, aws: AwsServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    assert "is not known" in one_warning(caplog, runs(fleet="s3://bucket/fleet"))


def test_a_fleet_that_neither_answers_nor_refuses_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start, the heartbeats and the agent's end wait for it. Its client would try again for many minutes."""
    monkeypatch.setattr(fleet, "_PATIENCE_S", 0.2)
    life = Life(incarnation=1, host="node", boot_id="boot", started=0.0, heartbeat=60.0, pool=POOL, lived_s=60.0)
    silent = AwsServer()
    silent.fault = Fault.HANGS
    with silent:
        tier = open_tier("s3://bucket/fleet", s3_options(int(silent.host.rpartition(":")[2])))
        member = FleetMember(tier, "run", [life], replace(life, incarnation=2))
        began = time.monotonic()
        assert member.learn() == Evidence()
        member.share_all()
        member.share(life)
        took_s = time.monotonic() - began
        threads = [thread for thread in threading.enumerate() if thread.name == "bounded"]
    assert took_s < 10, "a read takes 20 s to time out"
    (told,) = caplog.records
    assert "no answer within 0.2 s" in told.getMessage()
    assert threads and all(thread.daemon for thread in threads), "the process ends without them"


def test_where_the_provider_is_unknown_nothing_is_shared_and_that_is_told_once(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    if read_instance(os.environ).provider:
        pytest.skip("this machine is a cloud's instance, and tells so")
    assert "not known which provider" in one_warning(caplog, runs(fleet=str(runs.folder / "fleet")))
    assert not (runs.folder / "fleet").exists() or not tree(runs.folder / "fleet")


def test_a_fleet_of_an_unknown_kind_is_refused_before_training(runs: Runs, aws: AwsServer) -> None:
    """A typing error, unlike a folder that does not answer today."""
    with pytest.raises(SpotError, match="s4"):
        runs(fleet="s4://bucket/fleet").open()
