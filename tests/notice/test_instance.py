"""Which instance this is: from every provider's own words, and from a service that is in trouble what else is known."""

from __future__ import annotations

import logging
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.notice.instance import Instance, read_instance, wall_unix_s
from tests.metadata import AwsServer, AzureServer, Fault, GcpServer, MetadataServer

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
NOWHERE = Path("/nowhere")
# What SLURM sets on a node, wherever the node is.
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_CLUSTER_NAME": "alps",
    "SLURM_JOB_PARTITION": "preemptible",
    "SLURMD_NODENAME": "nid001",
}
RUNPOD = {"RUNPOD_POD_ID": "g3xb", "RUNPOD_DC_ID": "CA-MTL-1", "RUNPOD_GPU_COUNT": "2", "RUNPOD_GPU_NAME": "NVIDIA+A40"}
RENTALS = [
    (RUNPOD, "g3xb", "runpod/ca-mtl-1/unknown/2x-nvidia-a40"),
    ({"RUNPOD_POD_ID": "g3xb"}, "g3xb", "runpod/unknown/unknown/unknown"),
    ({"VAST_CONTAINERLABEL": "C.123", "CONTAINER_ID": "123"}, "123", "vast/unknown/unknown/unknown"),
    ({"VAST_CONTAINERLABEL": "C.123"}, "C.123", "vast/unknown/unknown/unknown"),
    (
        {"MODAL_TASK_ID": "ta-01", "MODAL_REGION": "us-east-1", "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_AWS"},
        "ta-01",
        "modal/us-east-1/unknown/unknown",
    ),
    (
        {
            "TRAINING_JOB_NAME": "tune-1",
            "TRAINING_JOB_ARN": "arn:aws:sagemaker:us-west-2:123456789012:training-job/tune-1",
            "SM_CURRENT_HOST": "algo-1",
            "SM_CURRENT_INSTANCE_TYPE": "ml.p4d.24xlarge",
            "AWS_REGION": "us-west-2",
        },
        "tune-1/algo-1",
        "sagemaker/us-west-2/unknown/ml.p4d.24xlarge",
    ),
]


@pytest.fixture(params=[AwsServer, GcpServer, AzureServer])
def service(request: pytest.FixtureRequest) -> Iterator[MetadataServer]:
    with request.param() as server:
        yield server


@pytest.fixture
def aws() -> Iterator[AwsServer]:
    with AwsServer() as server:
        yield server


@pytest.fixture
def gcp() -> Iterator[GcpServer]:
    with GcpServer() as server:
        yield server


@pytest.fixture
def azure() -> Iterator[AzureServer]:
    with AzureServer() as server:
        yield server


def dmi_of(folder: Path, **files: str) -> Path:
    """A folder as /sys/class/dmi/id."""
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return folder


def dmi_of_cloud(folder: Path, provider: str) -> Path:
    files = {
        "aws": {"sys_vendor": "Amazon EC2", "board_asset_tag": "i-0123456789abcdef0", "product_name": "g5.xlarge"},
        "gcp": {"sys_vendor": "Google", "product_name": "Google Compute Engine"},
        "azure": {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"},
    }
    return dmi_of(folder, **files[provider])


def read(environ: dict[str, str], dmi: Path = NOWHERE, gpus: Path = NOWHERE, budget_s: float = 30.0) -> Instance:
    return read_instance(environ, dmi=dmi, gpus=gpus, budget_s=budget_s)


# -- clouds --------------------------------------------------------------------------------------------------------


def test_aws_tells_the_whole_pool(aws: AwsServer) -> None:
    assert read(aws.environ) == Instance(
        id="i-0123456789abcdef0",
        boot_id=BOOT_ID,
        booted=psutil.boot_time(),
        provider="aws",
        region="us-east-1",
        zone="us-east-1a",
        type="g5.xlarge",
        is_spot=True,
    )
    assert read(aws.environ).pool == "aws/us-east-1/us-east-1a/g5.xlarge"


def test_gcp_tells_the_whole_pool_however_long_its_startup_script(gcp: GcpServer) -> None:
    instance = read(gcp.environ)
    assert (instance.id, instance.is_spot) == ("6012345678901234567", True)
    assert instance.pool == "gcp/us-central1/us-central1-a/a2-highgpu-1g"


def test_azure_tells_the_whole_pool(azure: AzureServer) -> None:
    instance = read(azure.environ)
    assert (instance.id, instance.is_spot) == ("02aab8a4-74ef-476e-8182-f6d2ba4166a6", True)
    assert instance.pool == "azure/westeurope/2/standard_nc24ads_a100_v4"


@pytest.mark.parametrize(("life_cycle", "is_spot"), [("on-demand", False), ("spot", True), ("a-new-word", None)])
def test_aws_says_whether_it_is_spot(aws: AwsServer, life_cycle: str, is_spot: bool | None) -> None:
    aws.documents[aws.life_cycle] = life_cycle
    assert read(aws.environ).is_spot is is_spot


def test_without_a_life_cycle_the_rest_is_known(aws: AwsServer) -> None:
    del aws.documents[aws.life_cycle]
    instance = read(aws.environ)
    assert (instance.id, instance.is_spot) == ("i-0123456789abcdef0", None)


@pytest.mark.parametrize(("preemptible", "is_spot"), [("FALSE", False), ("TRUE", True), (None, None)])
def test_gcp_says_whether_it_is_spot(gcp: GcpServer, preemptible: str | None, is_spot: bool | None) -> None:
    gcp.documents[gcp.instance]["scheduling"] = {"preemptible": preemptible} if preemptible else None
    assert read(gcp.environ).is_spot is is_spot


@pytest.mark.parametrize(("priority", "is_spot"), [("Regular", False), ("Low", True), ("", None)])
def test_azure_says_whether_it_is_spot(azure: AzureServer, priority: str, is_spot: bool | None) -> None:
    azure.documents[azure.compute]["priority"] = priority
    assert read(azure.environ).is_spot is is_spot


def test_a_proxy_is_not_asked(service: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with AwsServer() as proxy:
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, f"http://{proxy.host}")
        monkeypatch.setenv("no_proxy", "")
        assert read(service.environ).provider == service.provider
    assert not proxy.requests


@pytest.mark.parametrize("fault", Fault)
def test_a_service_in_trouble_leaves_what_else_is_known(
    service: MetadataServer, fault: Fault, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.fault = fault
    dmi = dmi_of_cloud(tmp_path, service.provider)
    waits = fault in {Fault.HANGS, Fault.DRIPS}
    with caplog.at_level(logging.DEBUG, logger="spot_core"):
        instance = read({**service.environ, **JOB}, dmi, budget_s=0.3 if waits else 30.0)
    assert service.requests
    assert instance.provider == service.provider
    known = {"aws": "i-0123456789abcdef0"}.get(service.provider, "alps/4711.2/nid001")
    assert instance.id == known
    assert instance.is_spot is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "127.0.0.1", "ftp://127.0.0.1", "http://[", "http://a:b", ""]
)
def test_an_address_of_nothing_leaves_the_boot_id(address: str) -> None:
    for variable in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST", "SPOT_AZURE_METADATA_ENDPOINT"):
        instance = read({variable: address}, budget_s=2.0)
        assert (instance.id, instance.provider, instance.pool) == (BOOT_ID, "", "")


def test_no_service_is_asked_that_the_user_has_turned_off(aws: AwsServer, tmp_path: Path) -> None:
    environ = {**aws.environ, "AWS_EC2_METADATA_DISABLED": "TRUE"}
    assert read(environ).provider == ""
    instance = read(environ, dmi_of_cloud(tmp_path, "aws"))
    assert not aws.requests
    assert (instance.id, instance.pool) == ("i-0123456789abcdef0", "aws/unknown/unknown/g5.xlarge")


def test_an_older_aws_instance_is_known_by_its_bios(aws: AwsServer, tmp_path: Path) -> None:
    dmi = dmi_of(tmp_path, sys_vendor="Xen", bios_version="4.11.amazon", product_name="HVM domU", board_asset_tag="No")
    instance = read({"AWS_EC2_METADATA_DISABLED": "true"}, dmi)
    assert (instance.id, instance.pool) == (BOOT_ID, "aws/unknown/unknown/unknown")


def test_no_network_is_asked_on_a_machine_of_no_cloud(tmp_path: Path) -> None:
    """On the audit hook of the interpreter: nothing connects, and no name is resolved."""
    dmi = dmi_of(tmp_path, sys_vendor="Dell Inc.", product_name="PowerEdge", chassis_asset_tag="")
    script = f"""
import sys
from pathlib import Path
from spot_core.notice.instance import read_instance
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event.startswith("socket.") else None)
instance = read_instance({{}}, dmi=Path({str(dmi)!r}))
assert not asked, asked
assert instance.id == instance.boot_id and instance.provider == ""
import socket
socket.socket()
assert asked
assert not {{"torch", "httpx", "requests", "fsspec"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# -- containers and schedulers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environ", "name", "pool"), RENTALS)
def test_a_rented_container_is_known_by_its_name_and_its_start(environ: dict[str, str], name: str, pool: str) -> None:
    ticks = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
    instance = read(environ)
    assert instance.id == f"{name}/{ticks}"
    assert instance.pool == pool
    assert instance.booted == psutil.Process(1).create_time()
    assert instance.is_spot is None


def test_a_rented_container_is_not_its_host(aws: AwsServer, tmp_path: Path) -> None:
    instance = read({**RUNPOD, **aws.environ, **JOB}, dmi_of_cloud(tmp_path, "aws"))
    assert instance.provider == "runpod"
    assert not aws.requests


def test_a_name_in_the_environment_is_no_sagemaker() -> None:
    assert read({"TRAINING_JOB_NAME": "mine"}).provider == ""


def test_a_slurm_job_is_another_after_each_requeue() -> None:
    first, second = read({**JOB, "SLURM_RESTART_COUNT": "0"}), read(JOB)
    assert (first.id, second.id) == ("alps/4711.0/nid001", "alps/4711.2/nid001")
    assert second.pool == "slurm/alps/preemptible/unknown"
    never_requeued = {name: value for name, value in JOB.items() if name != "SLURM_RESTART_COUNT"}
    assert read(never_requeued).id == first.id


def test_a_slurm_job_is_as_old_as_its_allocation() -> None:
    started = int((psutil.boot_time() + time.time()) / 2)
    assert read({**JOB, "SLURM_JOB_START_TIME": str(started)}).booted == started


@pytest.mark.parametrize("started", ["0", "9" * 12, "soon", "-1", "²", "9" * 400])
def test_a_start_that_cannot_be_is_not_believed(started: str) -> None:
    assert read({**JOB, "SLURM_JOB_START_TIME": started}).booted == psutil.boot_time()


def test_a_slurm_job_in_a_cloud_is_of_the_clouds_pool(aws: AwsServer) -> None:
    instance = read({**aws.environ, **JOB})
    assert (instance.id, instance.provider) == ("i-0123456789abcdef0", "aws")
    assert instance.booted == psutil.boot_time()


def test_gpus_are_the_type_where_no_other_is_known(aws: AwsServer, tmp_path: Path) -> None:
    for bus in ("0000:0f:00.0", "0000:2d:00.0"):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\n")
    assert read(JOB, gpus=tmp_path).pool == "slurm/alps/preemptible/2x-nvidia-h100-80gb-hbm3"
    assert read(aws.environ, gpus=tmp_path).type == "g5.xlarge"


# -- the pool ------------------------------------------------------------------------------------------------------


@given(region=st.text(), zone=st.text(), kind=st.text())
def test_a_pool_is_a_path_of_four_plain_names(region: str, zone: str, kind: str) -> None:
    instance = Instance(id="a", boot_id="a", booted=0.0, provider="aws", region=region, zone=zone, type=kind)
    parts = instance.pool.split("/")
    assert len(parts) == 4
    for part in parts:
        assert set(part) <= set(string.ascii_lowercase + string.digits + "._-")
        assert part.strip(".-_") == part != ""


# -- the wall ------------------------------------------------------------------------------------------------------


def test_the_wall_is_the_end_that_slurm_names() -> None:
    end = int(time.time()) + 7200
    assert wall_unix_s({"SLURM_JOB_END_TIME": str(end)}) == end


def test_no_scheduler_no_wall() -> None:
    assert wall_unix_s({}) is None


@pytest.mark.parametrize("wait_s", [-60, 364 * 86_400])
def test_a_wall_behind_or_a_year_ahead_is_none(wait_s: int) -> None:
    assert wall_unix_s({"SLURM_JOB_END_TIME": str(int(time.time()) + wait_s)}) is None


@pytest.mark.parametrize("text", ["", "0", "Unknown", "nan", "inf", "1e9", "9" * 400, "٣"])
def test_a_wall_that_is_no_time_is_none(text: str) -> None:
    assert wall_unix_s({"SLURM_JOB_END_TIME": text}) is None
