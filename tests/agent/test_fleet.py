"""What runs tell each other about a pool: enough to start informed, too little to stay wrong."""

from __future__ import annotations

import json
import logging
import math
import random
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.agent import fleet
from spot_core.agent.fleet import publish, read_pool
from spot_core.cadence.hazard import End, Evidence, LifeSpan, hazard_now
from spot_core.cadence.record import evidence_from_json
from spot_core.errors import TierError
from spot_core.store.tier import Tier, open_tier
from spot_core.testing.faults import Fault, FaultPlan, FaultyTier

HOUR = 3600.0
POOL = "aws/us-east-1/us-east-1a/g5.xlarge"
OTHER_ZONE = "aws/us-east-1/us-east-1b/g5.xlarge"
OTHER_REGION = "aws/eu-west-1/eu-west-1a/g5.xlarge"
OWN = "own"
LOSS = Evidence.of([LifeSpan(HOUR, End.LOST)])
RECORD = {"format_version": 1, "run_id": "a", "updated": 1.8e9, "evidence": asdict(LOSS)}


@pytest.fixture(params=["folder", "memory"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    if request.param == "folder":
        yield open_tier(str(tmp_path / "fleet"))
        return
    root = f"/fleet-{uuid.uuid4().hex}"
    yield open_tier(f"memory:/{root}")
    memory = fsspec.filesystem("memory")
    if memory.exists(root):
        memory.rm(root, recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> Tier:
    return open_tier(str(tmp_path / "fleet"))


def lives_at(per_hour: float, *, seed: int, count: int = 12) -> Evidence:
    source = random.Random(seed)
    return Evidence.of([LifeSpan(source.expovariate(per_hour) * HOUR, End.LOST) for _ in range(count)])


def fleet_at(tier: Tier, per_hour: float, pool: str = POOL, runs: int = 20) -> None:
    for seed in range(runs):
        publish(tier, pool, f"run-{seed}", lives_at(per_hour, seed=seed))


def rate(evidence: Evidence) -> float:
    """Expected losses per hour on an instance of one hour whose process has just started."""
    return hazard_now(evidence, age_s=HOUR, began_s=HOUR).losses


def file_of(pool: str, run_id: str) -> str:
    return f"pools/{pool}/{run_id}.json"


# -- what a new run learns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_hour", [0.2, 0.4, 1.5])
def test_a_new_run_starts_informed(tier: Tier, per_hour: float) -> None:
    """Nearer to the pool's rate than the prior is, and within the half of it that the prior still holds it back."""
    fleet_at(tier, per_hour)
    informed = rate(read_pool(tier, POOL, but_run_id=OWN))
    assert abs(math.log(informed / per_hour)) < min(abs(math.log(rate(Evidence()) / per_hour)), math.log(1.5))


@pytest.mark.parametrize(("said", "true"), [(0.1, 1.0), (0.02, 1.0), (10.0, 1.0), (10.0, 0.5)])
def test_ten_own_losses_outweigh_a_wrong_fleet(tier: Tier, said: float, true: float) -> None:
    fleet_at(tier, said)
    taken = read_pool(tier, POOL, but_run_id=OWN)
    own = Evidence.of([LifeSpan(HOUR / true, End.LOST)] * 10)
    start, end = (abs(math.log(rate(evidence) / true)) for evidence in (taken, taken + own))
    assert end < abs(math.log(said / true)) / 2
    assert end < start


def test_the_first_run_of_a_pool_learns_nothing(tier: Tier) -> None:
    assert read_pool(tier, POOL, but_run_id=OWN) == Evidence()


def test_a_run_never_counts_itself(tier: Tier) -> None:
    publish(tier, POOL, OWN, lives_at(5.0, seed=1))
    assert read_pool(tier, POOL, but_run_id=OWN) == Evidence()
    publish(tier, POOL, "other", LOSS)
    assert read_pool(tier, POOL, but_run_id=OWN) == replace(LOSS, process_h=0.0)


def test_a_run_replaces_what_it_wrote(tier: Tier) -> None:
    for losses in range(1, 4):
        publish(tier, POOL, "other", LOSS.scaled(losses))
    assert read_pool(tier, POOL, but_run_id=OWN).losses == 3.0


def test_crashes_are_a_programs_own_affair(tier: Tier) -> None:
    publish(tier, POOL, "other", Evidence.of([LifeSpan(60.0, End.CRASHED)] * 9))
    found = read_pool(tier, POOL, but_run_id=OWN)
    assert (found.crashes, found.process_h) == (0.0, 0.0)
    assert found.exposure_h[0] == pytest.approx(9 / 60, rel=0.3)


def test_a_fleet_counts_as_few_losses_and_few_hours(tier: Tier) -> None:
    fleet_at(tier, 4.0)
    busy = read_pool(tier, POOL, but_run_id=OWN)
    assert busy.losses == pytest.approx(10.0)
    assert busy.losses / busy.exposure_h[0] == pytest.approx(4.0, rel=0.2)
    publish(tier, OTHER_ZONE, "quiet", Evidence.of([LifeSpan(4000 * HOUR, End.QUIET)]))
    assert read_pool(tier, OTHER_ZONE, but_run_id=OWN).exposure_h[0] == pytest.approx(30.0)


# -- neighbours ----------------------------------------------------------------------------------------------------


def test_a_pool_that_nobody_knows_asks_its_neighbours(tier: Tier) -> None:
    publish(tier, POOL, "here", LOSS)
    publish(tier, OTHER_ZONE, "beside", LOSS.scaled(2))
    publish(tier, OTHER_REGION, "far", LOSS.scaled(4))
    assert read_pool(tier, POOL, but_run_id=OWN).losses == pytest.approx(1 + 2 * 0.5 + 4 * 0.25)


def test_other_regions_are_not_asked_where_the_zones_suffice(tier: Tier) -> None:
    publish(tier, OTHER_ZONE, "beside", LOSS.scaled(12))
    publish(tier, OTHER_REGION, "far", LOSS.scaled(4))
    assert read_pool(tier, POOL, but_run_id=OWN).losses == pytest.approx(6)


@pytest.mark.parametrize("here", [LOSS.scaled(5), Evidence.of([LifeSpan(21 * HOUR, End.QUIET)])])
def test_a_pool_that_is_known_does_not_ask(tier: Tier, here: Evidence) -> None:
    publish(tier, POOL, "here", here)
    publish(tier, OTHER_ZONE, "beside", LOSS.scaled(9))
    assert read_pool(tier, POOL, but_run_id=OWN).losses == here.losses


def test_other_types_and_other_clouds_are_no_neighbours(tier: Tier) -> None:
    publish(tier, "aws/us-east-1/us-east-1a/p4d.24xlarge", "other", LOSS)
    publish(tier, "gcp/us-east-1/us-east-1b/g5.xlarge", "other", LOSS)
    assert read_pool(tier, POOL, but_run_id=OWN) == Evidence()


def test_what_is_unknown_has_no_neighbours(tier: Tier) -> None:
    publish(tier, "vast/unknown/a/unknown", "other", LOSS)
    assert read_pool(tier, "vast/unknown/b/unknown", but_run_id=OWN) == Evidence()
    publish(tier, "", "other", LOSS)
    assert read_pool(tier, "", but_run_id=OWN) == Evidence()


def test_a_run_does_not_count_itself_in_another_zone(tier: Tier) -> None:
    publish(tier, OTHER_ZONE, OWN, LOSS)
    publish(tier, OTHER_REGION, OWN, LOSS)
    assert read_pool(tier, POOL, but_run_id=OWN) == Evidence()


# -- damage and strangers ------------------------------------------------------------------------------------------


def changed(**fields: Any) -> dict[str, Any]:
    return {**RECORD, **fields}


def evidence_with(**fields: Any) -> dict[str, Any]:
    return changed(evidence={**asdict(LOSS), **fields})


DAMAGED: list[object] = [
    [],
    "text",
    None,
    {},
    changed(format_version=0),
    changed(format_version="1"),
    changed(run_id="b"),
    changed(updated="today"),
    changed(updated=math.nan),
    changed(evidence=None),
    evidence_with(losses=-1.0),
    evidence_with(losses=math.nan),
    evidence_with(losses=10**400),
    evidence_with(losses=True),
    evidence_with(losses=1e6, log_g=[0.0] * 4),
    evidence_with(losses="1"),
    evidence_with(rescued=1.5),
    evidence_with(rescued=-0.5),
    evidence_with(crashes=-1.0),
    evidence_with(crashes=1e6),
    evidence_with(process_h=-1.0),
    evidence_with(process_h=1e9),
    evidence_with(exposure_h=[]),
    evidence_with(exposure_h=[1.0, 1.0, 1.0]),
    evidence_with(exposure_h=[1.0] * 5, log_g=[0.0] * 5),
    evidence_with(exposure_h=[1.0, 1.0, 1.0, math.inf]),
    evidence_with(exposure_h=[-1.0] * 4),
    evidence_with(exposure_h=[1e9] * 4),
    evidence_with(exposure_h=[1.0, 1.0, 1.0, 0.0]),
    evidence_with(exposure_h=[1.0, 1.0, 1.0, 50.0]),
    evidence_with(log_g=[1.0, 0.0, 0.0, 0.0]),
    evidence_with(log_g=[0.0, 0.0, 0.0, 99.0]),
    evidence_with(log_g=7),
    changed(more="x" * 5000),
]


@pytest.mark.parametrize("body", DAMAGED)
def test_a_record_that_cannot_be_is_left_out_with_one_line(
    folder: Tier, body: object, caplog: pytest.LogCaptureFixture
) -> None:
    publish(folder, POOL, "good", LOSS)
    folder.replace(file_of(POOL, "a"), json.dumps(body).encode())
    assert read_pool(folder, POOL, but_run_id=OWN).losses == 1.0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 2 records" in caplog.text


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"{", b"[" * 4000])
def test_what_is_no_json_is_left_out(tier: Tier, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    publish(tier, POOL, "good", LOSS)
    for run_id in ("a", "b", "c"):
        tier.replace(file_of(POOL, run_id), data)
    assert read_pool(tier, POOL, but_run_id=OWN).losses == 1.0
    assert len(caplog.records) == 1


def test_a_newer_format_is_left_out_quietly(tier: Tier, caplog: pytest.LogCaptureFixture) -> None:
    tier.replace(file_of(POOL, "a"), json.dumps({"format_version": 2, "run_id": "a"}).encode())
    with caplog.at_level(logging.DEBUG, logger="spot_core"):
        assert read_pool(tier, POOL, but_run_id=OWN) == Evidence()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_strangers_files_are_no_records(tier: Tier, caplog: pytest.LogCaptureFixture) -> None:
    publish(tier, POOL, "good", LOSS)
    for path in ("pools/aws/README", f"pools/{POOL}/notes.txt", f"pools/{POOL}/a.b.json", "pools/aws/us-east-1/x"):
        tier.replace(path, b"not ours")
    tier.replace(f"pools/{POOL}/below/a.json", b"not ours")
    assert read_pool(tier, POOL, but_run_id=OWN).losses == 1.0
    assert not caplog.records


def test_records_that_somebody_else_signed_are_left_out(tmp_path: Path) -> None:
    url = str(tmp_path / "fleet")
    ours, theirs, unsigned = open_tier(url, None, ("a" * 32,)), open_tier(url, None, ("b" * 32,)), open_tier(url)
    publish(ours, POOL, "ours", LOSS)
    publish(theirs, POOL, "theirs", LOSS)
    publish(unsigned, POOL, "unsigned", LOSS)
    assert read_pool(ours, POOL, but_run_id=OWN).losses == 1.0
    assert read_pool(unsigned, POOL, but_run_id=OWN).losses == 3.0


def test_a_crowd_is_read_in_part(folder: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_MOST_RECORDS", 3)
    for seed in range(9):
        publish(folder, POOL, f"run-{seed}", Evidence(losses=1.0, exposure_h=(float(seed + 1),) * 4))
    hours = {read_pool(folder, POOL, but_run_id=f"run-{seed}").exposure_h[0] for seed in range(9)}
    assert read_pool(folder, POOL, but_run_id=OWN).losses == 3.0
    assert len(hours) > 5


def test_a_fleet_that_does_not_answer_is_told(folder: Tier) -> None:
    plan = FaultPlan(Fault(operation="list"))
    with pytest.raises(TierError):
        read_pool(FaultyTier(folder, plan), POOL, but_run_id=OWN)
    assert plan.fired


def test_neighbours_that_do_not_answer_are_left_out(folder: Tier) -> None:
    publish(folder, POOL, "here", LOSS)
    publish(folder, OTHER_ZONE, "beside", LOSS.scaled(2))
    publish(folder, OTHER_REGION, "far", LOSS.scaled(4))
    plan = FaultPlan(Fault(operation="list", path="pools/aws/us-east-1", first=2, count=None))
    assert read_pool(FaultyTier(folder, plan), POOL, but_run_id=OWN).losses == 1 + 4 * 0.25
    assert plan.fired


def test_a_record_that_does_not_answer_is_left_out(folder: Tier, caplog: pytest.LogCaptureFixture) -> None:
    publish(folder, POOL, "here", LOSS)
    publish(folder, POOL, "there", LOSS)
    plan = FaultPlan(Fault(operation="read"))
    assert read_pool(FaultyTier(folder, plan), POOL, but_run_id=OWN).losses == 1.0
    assert "1 of 2 records" in caplog.text


@pytest.mark.parametrize(
    "pool", ["aws", "../../../etc", "aws/a/b/..", "aws//b/c", "aws/a/b/c/d", "aws/a*/b/c", "A/b/c/d"]
)
def test_what_is_no_pool_is_refused(tier: Tier, pool: str) -> None:
    with pytest.raises(ValueError, match="is not a pool"):
        publish(tier, pool, "run", LOSS)
    with pytest.raises(ValueError, match="is not a pool"):
        read_pool(tier, pool, but_run_id=OWN)


@pytest.mark.parametrize("run_id", ["", "../run", "a/b", ".tmp-a", "a" * 200])
def test_what_is_no_run_id_is_refused(tier: Tier, run_id: str) -> None:
    with pytest.raises(ValueError, match="is not a run id"):
        publish(tier, POOL, run_id, LOSS)


def test_evidence_that_cannot_be_is_not_published(tier: Tier) -> None:
    publish(tier, POOL, "run", LOSS)
    with pytest.raises(ValueError, match="none can have"):
        publish(tier, POOL, "run", replace(LOSS, losses=-1.0))
    assert read_pool(tier, POOL, but_run_id=OWN).losses == 1.0


# -- every history fits --------------------------------------------------------------------------------------------

SPANS = st.lists(st.builds(LifeSpan, st.floats(0.0, 1e7), st.sampled_from(End), st.floats(0.0, 1e7)), max_size=60)


@given(SPANS)
def test_the_evidence_of_any_lives_survives_the_way_through_a_small_record(spans: list[LifeSpan]) -> None:
    evidence = Evidence.of(spans)
    text = json.dumps(asdict(evidence), indent=1)
    assert evidence_from_json(json.loads(text)) == evidence
    assert len(text) < 2048


# -- a real object store -------------------------------------------------------------------------------------------


def test_a_fleet_in_an_object_store(s3_server: Any) -> None:
    tier = open_tier(f"s3://{s3_server.new_bucket()}/fleet", s3_server.options)
    assert read_pool(tier, POOL, but_run_id=OWN) == Evidence()
    publish(tier, POOL, "here", LOSS)
    publish(tier, POOL, OWN, LOSS.scaled(3))
    publish(tier, OTHER_ZONE, "beside", LOSS.scaled(2))
    publish(tier, OTHER_REGION, "far", LOSS.scaled(4))
    tier.replace("pools/aws/README", b"not ours")
    assert read_pool(tier, POOL, but_run_id=OWN).losses == pytest.approx(1 + 2 * 0.5 + 4 * 0.25)
