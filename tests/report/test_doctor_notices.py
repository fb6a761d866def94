"""`spot doctor` and notices: the services of the clouds as they answer, refuse, hang, or are turned off."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from spot_core.chaos.metadata_service import Handler, Reply
from spot_core.chaos.metadata_service import Request as Asked
from spot_core.config import SpotConfig
from spot_core.notice.instance import Instance
from spot_core.report.checks import signals
from spot_core.report.checks.finding import Finding
from spot_core.report.checks.notices import check_notices
from tests.metadata import AwsServer, AzureServer, Fault, GcpServer, MetadataServer
from tests.report.conftest import Result, Spot
from tests.report.examined import SMALL_MB, found

SERVERS: list[type[MetadataServer]] = [AwsServer, GcpServer, AzureServer]
ON_DEMAND = {
    "aws": lambda server: server.documents.update({server.life_cycle: "on-demand"}),
    "gcp": lambda server: server.documents[server.instance]["scheduling"].update(preemptible="FALSE"),
    "azure": lambda server: server.documents[server.compute].update(priority="Regular"),
}


class LostTokens(AwsServer):
    """As behind a hop limit of 1: what answers a PUT does not arrive."""

    def respond(self, handler: Handler, request: Asked) -> None:
        if request.method == "PUT":
            self.is_closing.wait()
        super().respond(handler, request)


class Refusing(AwsServer):
    """An endpoint that is turned off."""

    status = 403

    def answer(self, request: Asked) -> Reply:
        return Reply(self.status)


class Proxy(Refusing):
    status = 401


class Stranger(Refusing):
    status = 404


def checked(server: MetadataServer | None = None, *, is_spot: bool | None = True, **more: object) -> dict[str, Finding]:
    """What is found on an instance that DMI, or else the service, says to be one of that cloud."""
    config = SpotConfig(remote="s3://bucket/run", **more)  # type: ignore[arg-type]
    provider = server.provider if server is not None else ""
    instance = Instance(id="i-0abc", boot_id="b", booted=time.time(), provider=provider, is_spot=is_spot)
    environ = server.environ if server is not None else {}
    return {each.what: each for each in check_notices(config, instance, environ)}


def examined(spot: Spot, tmp_path: Path) -> Result:
    return spot("doctor", "--local", tmp_path / "nvme", "--state-mb", SMALL_MB, "--json")


@pytest.fixture(params=SERVERS, ids=lambda kind: kind.provider)
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    with request.param() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_spot_instance_whose_notices_are_seen_is_fine(service: MetadataServer, spot: Spot, tmp_path: Path) -> None:
    result = examined(spot, tmp_path)
    told = found(result)
    assert result.code == 0
    assert told["notices", "instance"]["detail"].startswith(f"{service.provider} ")
    assert told["notices", "instance"]["detail"].endswith(", spot")
    assert told["notices", service.provider]["status"] == "ok"
    assert told["notices", service.provider]["measured"]["answer_s"] > 0


def test_on_demand_there_is_nothing_to_watch(service: MetadataServer, spot: Spot, tmp_path: Path) -> None:
    ON_DEMAND[service.provider](service)
    result = examined(spot, tmp_path)
    assert result.code == 0
    assert found(result)["notices", "instance"]["detail"].endswith(", on-demand")
    assert "on-demand" in found(result)["notices", "metadata service"]["detail"]


def test_a_preemption_that_is_announced_now_is_told(service: MetadataServer, spot: Spot, tmp_path: Path) -> None:
    service.announce(100.0)
    told = found(examined(spot, tmp_path))["notices", service.provider]
    assert told["status"] == "warning"
    assert "a preemption is announced now" in told["detail"]


@pytest.mark.parametrize("kind", SERVERS, ids=lambda kind: kind.provider)
@pytest.mark.parametrize("fault", [Fault.HANGS, Fault.RESETS, Fault.BROKEN, Fault.IS_NO_HTTP])
def test_a_spot_instance_where_no_notice_can_be_seen_is_a_problem(kind: type[MetadataServer], fault: Fault) -> None:
    with kind() as server:
        server.fault = fault
        told = checked(server)[server.provider]
    assert told.status == "problem"
    assert f"no notice of {server.provider} can be seen" in told.detail
    assert "SPOT_NOTICE=off" in told.fix


def test_a_token_that_is_lost_on_the_way_is_the_hop_limit() -> None:
    with LostTokens() as server:
        told = checked(server, is_spot=None)["aws"]
    assert told.status == "problem"
    assert "the hop limit is 1" in told.detail
    assert "aws ec2 modify-instance-metadata-options --instance-id i-0abc" in told.fix
    assert "--http-put-response-hop-limit 2" in told.fix


@pytest.mark.parametrize(
    ("kind", "words"), [(Refusing, "--http-endpoint enabled"), (Proxy, "proxy"), (Stranger, "it is not")]
)
def test_a_token_that_is_refused_is_told_with_its_status(kind: type[Refusing], words: str) -> None:
    with kind() as server:
        told = checked(server)["aws"]
    assert told.status == "problem"
    assert f"with status {kind.status}" in told.detail
    assert words in told.fix


def test_a_metadata_service_that_is_turned_off_is_told(
    spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOT_NOTICE", "aws")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    result = examined(spot, tmp_path)
    told = found(result)["notices", "aws"]
    assert (result.code, told["status"]) == (1, "problem")
    assert "AWS_EC2_METADATA_DISABLED is set" in told["detail"]
    assert "unset AWS_EC2_METADATA_DISABLED" in told["fix"]


def test_notices_turned_off_on_a_spot_instance_are_told() -> None:
    with AwsServer() as server:
        assert checked(server, notice="off")["metadata service"].status == "warning"
        assert checked(server, notice="off", is_spot=False)["metadata service"].status == "ok"
        assert server.requests == []


def test_off_cloud_nobody_is_asked() -> None:
    with AwsServer() as server:
        config = SpotConfig(remote="s3://bucket/run")
        instance = Instance(id="b", boot_id="b", booted=time.time())
        told = {each.what: each for each in check_notices(config, instance, server.environ)}
        assert server.requests == []
    assert {what: each.status for what, each in told.items()} == {"instance": "ok", "metadata service": "ok"}


def test_a_webhook_is_tried_without_serving_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = checked(notice_webhook=f"127.0.0.1:{port}")["webhook"]
        assert told.status == "warning"
        assert "cannot be served" in told.detail
    assert checked(notice_webhook=f"127.0.0.1:{port}")["webhook"].status == "ok"
    assert checked(notice_webhook="203.0.113.7:8099")["webhook"].status == "warning"


def test_a_message_file_needs_its_folder(tmp_path: Path) -> None:
    assert checked(notice_file=str(tmp_path / "notice"))["message file"].status == "ok"
    told = checked(notice_file=str(tmp_path / "none" / "notice"))["message file"]
    assert (told.status, told.fix) == ("warning", f"mkdir -p {tmp_path}/none")


# -- processes that cannot be made here ---------------------------------------------------------------------------


def proc_of(folder: Path, processes: dict[int, tuple[int, str, int]]) -> Path:
    """A /proc. processes: number -> parent, command line, signals that are caught. 99 is this one."""
    for pid, (parent, command, caught) in processes.items():
        place = folder / ("self" if pid == 99 else str(pid))
        place.mkdir(parents=True)
        place.joinpath("status").write_text(
            f"Name:\tx\nPid:\t{pid}\nPPid:\t{parent}\nSigBlk:\t{0:016x}\nSigIgn:\t{0:016x}\nSigCgt:\t{caught:016x}\n"
        )
        place.joinpath("cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")
    return folder


def signalled(proc: Path, environ: dict[str, str] | None = None, **more: object) -> dict[str, Finding]:
    config = SpotConfig(remote="s3://bucket/run", **more)  # type: ignore[arg-type]
    return {each.what: each for each in signals.check_signals(config, environ or {}, proc)}


TERM = 1 << 14


@pytest.mark.parametrize(
    ("processes", "first", "shells"),
    [
        ({1: (0, "/sbin/tini -- python", TERM), 99: (1, "spot", 0)}, "ok", "ok"),
        ({1: (0, "/bin/sh -c python", 0), 99: (1, "spot", 0)}, "warning", "ok"),
        ({1: (0, "bash /entry.sh", TERM), 99: (1, "spot", 0)}, "ok", "ok"),
        ({1: (0, "sleep infinity", 0), 7: (0, "bash", 0), 99: (7, "spot", 0)}, "warning", "ok"),
        ({1: (0, "init", TERM), 7: (1, "-bash", 0), 99: (7, "spot", 0)}, "ok", "ok"),
        ({1: (0, "init", TERM), 7: (1, "bash -l", 0), 99: (7, "spot", 0)}, "ok", "ok"),
        ({1: (0, "init", TERM), 7: (1, "bash train.sh", 0), 99: (7, "spot", 0)}, "ok", "warning"),
        ({1: (0, "init", TERM), 7: (1, "bash train.sh", TERM), 99: (7, "spot", 0)}, "ok", "ok"),
        ({1: (0, "busybox sh -c x", 0), 7: (1, "dash -ec x", 0), 99: (7, "spot", 0)}, "warning", "warning"),
        ({99: (1, "spot", 0)}, None, "ok"),
    ],
)
def test_who_stands_between_a_signal_and_the_training(
    processes: dict[int, tuple[int, str, int]], first: str | None, shells: str, tmp_path: Path
) -> None:
    told = signalled(proc_of(tmp_path, processes))
    assert (told["first process"].status if "first process" in told else None, told["shells above"].status) == (
        first,
        shells,
    )


@pytest.mark.parametrize(
    ("command", "environ", "waits_s"),
    [
        ("python /venv/bin/torchrun train.py", {}, 30.0),
        ("/venv/bin/torchrun train.py", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90.0),
        ("python -m torch.distributed.run --shutdown_timeout 120 train.py", {}, 120.0),
        ("python -m torch.distributed.run --shutdown_timeout=45 x", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 45.0),
        ("torchrun x", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon"}, 30.0),
        ("python train.py --with torchrun", {}, None),
    ],
)
def test_torchrun_is_known_by_its_command_line(
    command: str, environ: dict[str, str], waits_s: float | None, tmp_path: Path
) -> None:
    proc = proc_of(tmp_path, {1: (0, command, TERM), 99: (1, "spot", 0)})
    assert signals.torchrun_waits_s(environ, proc) == waits_s
    told = signalled(proc, environ, grace_s=60.0)
    if waits_s is None:
        assert "torchrun" not in told
    else:
        assert told["torchrun"].status == ("ok" if waits_s >= 60 else "warning")


def test_a_system_without_proc_is_no_fault(tmp_path: Path) -> None:
    told = signalled(tmp_path)
    assert {what: each.status for what, each in told.items()} == {"signals": "skipped"}
    assert signals.torchrun_waits_s({}, tmp_path) is None
