"""Numbers read the way people write them."""

from __future__ import annotations

import pytest

from spot_core.report import units


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.26, "0.3s"),
        (5, "5s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (89.9, "90s"),
        (90, "2m"),
        (600, "10m"),
        (89.4 * 60, "89m"),
        (89.6 * 60, "1h 30m"),
        (3600 * 5 + 180, "5h 03m"),
        (3600 * 47.99, "47h 59m"),
        (3600 * 48, "2d 00h"),
        (3600 * 100, "4d 04h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_600, "1.0 MB"),
        (61_234_567, "61.2 MB"),
        (1.5e12, "1.5 TB"),
        (2e15, "2000 TB"),
    ],
)
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert units.size(count) == text


def test_another_hosts_clock_may_be_ahead() -> None:
    assert units.ago(-30) == "now"
    assert units.ago(30) == "30s ago"


def test_one_of_a_kind_is_singular() -> None:
    assert [units.count(1, "life"), units.count(2, "life"), units.count(1200, "step")] == [
        "1 life",
        "2 lives",
        "1,200 steps",
    ]
