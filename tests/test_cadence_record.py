"""The cadence's record: what is read back decides the same, and nothing a stranger wrote does harm."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.cadence.cadence import Cadence
from spot_core.cadence.hazard import SHAPES, End, Evidence, LifeSpan
from spot_core.cadence.interval import Costs, Limits
from spot_core.cadence.record import CadenceRecord
from spot_core.report.decided import sentence

LOSS = Evidence.of([LifeSpan(3600.0, End.LOST)])

spans = st.builds(LifeSpan, st.floats(0.0, 1e7), st.sampled_from(End), st.floats(0.0, 1e7))
evidences = st.lists(spans, max_size=50).map(Evidence.of)
seconds = st.floats(0.0, 1e6)
pins = st.sampled_from([{}, {"pinned_s": 60.0}, {"pinned_steps": 100}])
cadences = st.builds(
    Cadence,
    evidence=evidences,
    fleet=evidences.map(lambda evidence: evidence.scaled(0.5)),
    limits=st.builds(
        lambda shortest, more, overhead, pin: Limits(
            shortest_s=shortest, longest_s=shortest + more, most_overhead=overhead, **pin
        ),
        st.floats(0.1, 1e5),
        st.floats(0.0, 1e6),
        st.floats(1e-3, 1.0),
        pins,
    ),
    costs=st.builds(
        Costs, st.none() | seconds, st.none() | seconds, st.none() | seconds, st.none() | seconds, st.floats(0.0, 1e4)
    ),
    lead_s=seconds,
    began_s=seconds,
    walls_s=st.lists(seconds, max_size=3).map(tuple),
    prior_per_hour=st.floats(1e-3, 3600.0),
)
records = st.builds(CadenceRecord, cadences, seconds.map(lambda age_s: round(age_s, 3)), seconds, seconds.map(round))


@given(records, seconds)
def test_what_is_read_back_decides_the_same(record: CadenceRecord, older_s: float) -> None:
    read = CadenceRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    for times in (0.5, 1.0, 2.0):
        assert read.decision(older_s=older_s, times=times) == record.decision(older_s=older_s, times=times)
    assert read.cadence.walls_s == record.cadence.walls_s


def test_a_record_stays_small_however_many_lives_there_were() -> None:
    ends = [LifeSpan(1234.56789 + number, list(End)[number % 4], began_s=number / 7) for number in range(5000)]
    many = Evidence.of(ends)
    costs = Costs(1 / 3, 1 / 7, 1 / 9, 1 / 11, 1 / 13)
    cadence = Cadence(many, many, Limits(pinned_s=1 / 3), costs, 1 / 3, 1 / 7, (1 / 3, 1 / 7, 1 / 9), 1 / 17)
    body = CadenceRecord(cadence, 1e6 / 3, 1e6 / 7, 1e6 / 9).to_json()
    assert CadenceRecord.from_json(body).cadence.evidence == many
    assert len(json.dumps(body)) < 4096


GOOD = CadenceRecord(
    Cadence(LOSS, LOSS, Limits(), Costs(1.0, 2.0, 3.0, 4.0), 25.0, 10.0, (500.0, 600.0)), 60.0, 5.0, 0.0
).to_json()
GOOD = json.loads(json.dumps(GOOD))
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        [-1, -0.001, 1e12, 1e13, 1e300, -1e300, 5e-324, 1e-200, 10**400, math.nan, math.inf, -math.inf, ""]
    ),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(sorted(GOOD)), inner, max_size=6),
    max_leaves=10,
)


def places_in(body: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    return [above, *(place for key, value in inside for place in places_in(value, (*above, key)))][not above :]


def with_value(body: Any, place: tuple[Any, ...], value: Any) -> Any:
    copied = json.loads(json.dumps(body))
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copied


def judge(body: Any) -> None:
    """It is refused with a ValueError, or it can be asked all that is asked of a record."""
    try:
        record = CadenceRecord.from_json(body)
    except ValueError:
        return
    for older_s in (0.0, 1e9):
        for times in (0.5, 1.0, 2.0):
            decided = record.decision(older_s=older_s, times=times)
            assert math.isfinite(decided.interval_s) and decided.interval_s >= 0
            assert 0 < decided.hazard.losses < math.inf and 0 <= decided.hazard.rescued <= 1
            assert sentence(decided)


@given(st.sampled_from(places_in(GOOD)), junk)
def test_a_record_with_one_hostile_value_is_refused_or_harmless(place: tuple[Any, ...], value: Any) -> None:
    judge(with_value(GOOD, place, value))


@given(junk | st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, junk)))
def test_a_hostile_record_is_refused_or_harmless(body: Any) -> None:
    judge(body)


@pytest.mark.parametrize("place", places_in(GOOD), ids=lambda place: ".".join(map(str, place)))
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1e-3, True, "1", [[]], 10**400], ids=lambda value: f"{value!r:.8}"
)
def test_no_value_of_a_record_may_be_anything(place: tuple[Any, ...], value: Any) -> None:
    if place[-1] in range(len(SHAPES)) and place[-2] == "log_g" and value == -1e-3:
        return  # rounding
    with pytest.raises(ValueError, match=r"."):
        CadenceRecord.from_json(with_value(GOOD, place, value))


@pytest.mark.parametrize("value", [0, 5e-324, 1e-200, 1e-3, 1e12], ids=repr)
@pytest.mark.parametrize("place", places_in(GOOD), ids=lambda place: ".".join(map(str, place)))
def test_the_smallest_and_largest_values_are_refused_or_harmless(place: tuple[Any, ...], value: float) -> None:
    judge(with_value(GOOD, place, value))


def test_only_what_may_be_unknown_may_be_none() -> None:
    unknown = {"stall_s", "upload_s", "idle_step_s", "busy_step_s", "pinned_s", "pinned_steps"}
    for place in places_in(GOOD):
        body = with_value(GOOD, place, None)
        if place[-1] in unknown:
            judge(body)
            assert CadenceRecord.from_json(body)
            continue
        with pytest.raises(ValueError, match=r"."):
            CadenceRecord.from_json(body)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_record_without_one_of_its_parts_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CadenceRecord.from_json({key: value for key, value in GOOD.items() if key != name})


def test_a_cost_or_bound_that_another_release_does_not_know_is_no_damage() -> None:
    costs = {"stall_s": 7.0, "of_a_later_release": "x"}
    record = CadenceRecord.from_json({**GOOD, "costs": costs, "limits": {}, "of_a_later_release": []})
    assert (record.cadence.costs, record.cadence.limits) == (Costs(stall_s=7.0), Limits())


@pytest.mark.parametrize("name", ["exposure_h", "log_g"])
@pytest.mark.parametrize("length", [0, 1, len(SHAPES) - 1, len(SHAPES) + 1, 10_000])
def test_sums_for_other_shapes_are_refused(name: str, length: int) -> None:
    whole = [*GOOD["evidence"][name], *[0.0] * length][:length]
    with pytest.raises(ValueError, match="shapes"):
        CadenceRecord.from_json(with_value(GOOD, ("evidence", name), whole))


def test_the_parts_of_a_record_are_those_of_the_values_they_are_read_into() -> None:
    assert GOOD["costs"] == asdict(Costs(1.0, 2.0, 3.0, 4.0))
    assert GOOD["limits"] == asdict(Limits())
