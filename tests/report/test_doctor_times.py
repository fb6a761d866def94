"""`spot doctor` and time: the clock beside the store's, and whether a save fits into the grace period."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spot_core.config import SpotConfig
from spot_core.report.checks import clock
from spot_core.report.checks.clock import Stamp
from spot_core.report.checks.finding import Finding
from spot_core.report.checks.grace import Measured, check_grace
from spot_core.report.checks.remote import RemoteProbe
from spot_core.store.posix import PosixTier
from spot_core.store.tier import open_tier
from tests.report.examined import Examine, found, probed
from tests.servers import S3Server
from tests.sftpserver import SftpServer

# -- the clock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by_s", "side"), [(3600.0, "behind"), (-3600.0, "ahead of")])
def test_a_clock_that_is_off_is_told(by_s: float, side: str, tmp_path: Path) -> None:
    class Elsewhere(PosixTier):
        """On a server with a clock of its own."""

        def modified_unix_s(self, path: str) -> float | None:
            return (super().modified_unix_s(path) or 0.0) + by_s

    probe = RemoteProbe(Elsewhere(tmp_path / "run"))
    probed(probe)
    told = clock.check_clock(probe.stamp)
    assert told.status == "warning"
    assert f"60m {side} the store's" in told.detail
    assert "NTP" in told.fix
    assert told.measured["skew_s"] == pytest.approx(-by_s, abs=60)


@pytest.mark.parametrize("scheme", ["s3", "sftp", "memory", "file"])
def test_stores_tell_when_a_file_was_written(
    scheme: str, s3_server: S3Server, sftp_server: SftpServer, tmp_path: Path
) -> None:
    places: dict[str, tuple[Callable[[], str], dict[str, Any]]] = {
        "s3": (lambda: f"s3://{s3_server.new_bucket()}/run", s3_server.options),
        "sftp": (sftp_server.new_url, sftp_server.options),
        "memory": (lambda: f"memory://{uuid.uuid4().hex}/run", {}),
        "file": (lambda: f"{tmp_path}/run", {}),
    }
    url, options = places[scheme]
    probe = RemoteProbe(open_tier(url(), options))
    probed(probe)
    assert clock.check_clock(probe.stamp).status == "ok"


def test_a_store_that_does_not_tell_is_no_fault() -> None:
    assert clock.check_clock(Stamp(began=1e9, ended=1e9, stored=None)).status == "skipped"
    assert clock.check_clock(None).status == "skipped"


@pytest.mark.parametrize(
    ("stored", "skew_s"), [(999.0, 0.0), (1000.5, 0.0), (1003.0, 0.0), (1043.0, -40.0), (959.0, 40.0)]
)
def test_whole_seconds_and_a_slow_answer_are_no_skew(stored: float, skew_s: float) -> None:
    assert Stamp(began=1000.0, ended=1002.0, stored=stored).skew_s == skew_s


# -- the grace period --------------------------------------------------------------------------------------------


def test_a_save_that_does_not_fit_says_how_many_seconds_are_missing(doctor: Examine) -> None:
    result = doctor("--grace-s", 1)
    told = found(result)["grace period", "save"]
    measured = told["measured"]
    assert (result.code, told["status"]) == (0, "warning")
    assert measured["missing_s"] == pytest.approx(measured["save_s"] + 2.0 - 1.0, abs=0.01)
    assert "more are needed" in told["detail"]
    assert "SPOT_GRACE_S=" in told["fix"]


def test_a_save_that_fits_is_fine(doctor: Examine) -> None:
    told = found(doctor("--grace-s", 1000))["grace period", "save"]
    assert told["status"] == "ok"
    assert told["measured"]["grace_s"] == 1000


def graced(environ: dict[str, str], *, torchrun_waits_s: float | None = None, **more: Any) -> dict[str, Finding]:
    config = SpotConfig(remote="s3://bucket/run", grace_s=60.0)
    sizes = {"state_bytes": 4_000_000_000, "sample_bytes": 1_000_000_000}
    measured = Measured(**{**sizes, "write_s": 1.0, "upload_s": 7.0, "read_s": 2.0, **more})
    found = check_grace(config, measured, environ, torchrun_waits_s=torchrun_waits_s)
    return {each.what: each for each in found}


def test_a_sample_stands_for_the_whole() -> None:
    told = graced({})["save"]
    assert told.measured["save_s"] == pytest.approx(2.0 + 4 * 10.0)
    assert "by a sample of 1.0 GB" in told.detail
    assert told.status == "ok"
    assert graced({}, upload_s=13.0)["save"].measured["missing_s"] == pytest.approx(2.0 + 4 * 16.0 + 2.0 - 60.0)


def test_what_torchrun_gives_counts_if_it_is_less() -> None:
    told = graced({}, torchrun_waits_s=30.0)["save"]
    assert (told.status, told.measured["missing_s"]) == ("warning", pytest.approx(14.0))
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=44" in told.fix
    assert graced({}, torchrun_waits_s=90.0)["save"].status == "ok"


def test_what_nobody_inside_can_see_is_said() -> None:
    told = graced({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "gpu"})
    assert "terminationGracePeriodSeconds" in told["Kubernetes"].detail and "65" in told["Kubernetes"].fix
    assert "GraceTime" in told["SLURM"].detail and "scontrol show partition gpu" in told["SLURM"].fix
    assert {told["Kubernetes"].status, told["SLURM"].status} == {"skipped"}
    assert not {"Kubernetes", "SLURM"} & graced({}).keys()
