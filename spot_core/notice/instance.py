"""Which instance this process runs on: from the environment, DMI, and the metadata service of the cloud.

A rented container (RunPod, Vast, Modal, SageMaker) goes before the cloud below it, a cloud before SLURM on it. The
network is asked only where DMI names that cloud or its variable names a service. Nothing raises: what cannot be found
out stays empty.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from spot_core.notice.metadata import Answer, ask, aws_metadata, azure_endpoint, body_of, gcp_endpoint

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DMI = Path("/sys/class/dmi/id")
_GPUS = Path("/proc/driver/nvidia/gpus")
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
# What a name of a metadata service or a variable may have, at most: they end up in records and in paths.
_LONGEST = 200
# SLURM gives a job without a time limit an end in a year: nobody plans a checkpoint for what is this far away.
_FARTHEST_WALL_S = 90 * 86_400.0

Environ = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What is rented and may be taken away. Empty strings: unknown.

    id: of the cloud's instance; of a container with its start, or of a SLURM job with its restarts, so that one that
    was preempted and comes back is another one; else the boot id. A stopped cloud instance comes back with its old id
    and a new boot_id. booted: Unix seconds when it came up. is_spot: None where that is unknown.
    """

    id: str
    boot_id: str
    booted: float
    provider: str = ""
    region: str = ""
    zone: str = ""
    type: str = ""
    is_spot: bool | None = None

    @property
    def pool(self) -> str:
        """Where instances share a fate: `aws/us-east-1/us-east-1a/g5.xlarge`; empty if the provider is unknown."""
        if not self.provider:
            return ""
        return "/".join(_path_part(part) for part in (self.provider, self.region, self.zone, self.type))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one source knows."""

    provider: str = ""
    id: str = ""
    region: str = ""
    zone: str = ""
    type: str = ""
    is_spot: bool | None = None
    booted: float | None = None


def read_instance(environ: Environ, *, dmi: Path = _DMI, gpus: Path = _GPUS, budget_s: float = 2.0) -> Instance:
    """The instance of this process, within about `budget_s` seconds. Raises nothing."""
    boot_id = this_boot()
    job = _slurm(environ)
    found = _rental(environ) or _cloud(environ, dmi, time.monotonic() + budget_s) or job
    return Instance(
        id=found.id or job.id or boot_id,
        boot_id=boot_id,
        booted=_machine_booted() if found.booted is None else found.booted,
        provider=found.provider,
        region=found.region,
        zone=found.zone,
        type=found.type or _gpu_type(gpus),
        is_spot=found.is_spot,
    )


def this_boot() -> str:
    """Identity of this boot of this machine, empty where the system gives none."""
    return _text(_BOOT_ID)


def wall_unix_s(environ: Environ) -> float | None:
    """When the scheduler will end this job, in Unix seconds; None if it will not, or does not say."""
    end = _seconds(environ, "SLURM_JOB_END_TIME")
    return end if end is not None and 0.0 < end - time.time() < _FARTHEST_WALL_S else None


# -- from the environment ------------------------------------------------------------------------------------------


def _rental(environ: Environ) -> _Found | None:
    """A container that is rented without the machine around it."""
    if environ.get("RUNPOD_POD_ID"):
        count, model = _value(environ, "RUNPOD_GPU_COUNT") or "1", _value(environ, "RUNPOD_GPU_NAME")
        gpus = f"{count}x {model}" if model else ""
        return _container("runpod", _value(environ, "RUNPOD_POD_ID"), _value(environ, "RUNPOD_DC_ID"), gpus)
    if environ.get("VAST_CONTAINERLABEL"):
        return _container("vast", _value(environ, "CONTAINER_ID") or _value(environ, "VAST_CONTAINERLABEL"))
    if environ.get("MODAL_TASK_ID"):
        region = _value(environ, "MODAL_REGION") or _value(environ, "MODAL_CLOUD_PROVIDER")
        return _container("modal", _value(environ, "MODAL_TASK_ID"), region)
    if environ.get("TRAINING_JOB_NAME") and (environ.get("TRAINING_JOB_ARN") or environ.get("SM_CURRENT_HOST")):
        job = "/".join(filter(None, (_value(environ, "TRAINING_JOB_NAME"), _value(environ, "SM_CURRENT_HOST"))))
        return _container("sagemaker", job, _value(environ, "AWS_REGION"), _value(environ, "SM_CURRENT_INSTANCE_TYPE"))
    return None


def _container(provider: str, name: str, region: str = "", kind: str = "") -> _Found:
    # A pod that was outbid, or a job that was interrupted, comes back under its old name: the start tells them apart.
    # It is in clock ticks, which no correction of the clock changes.
    ticks = _text(Path("/proc/1/stat")).rpartition(")")[2].split()[19:20]
    booted = None
    with contextlib.suppress(psutil.Error, OSError):
        booted = psutil.Process(1).create_time()
    return _Found(provider=provider, id="/".join((name, *ticks)), region=region, type=kind, booted=booted)


def _slurm(environ: Environ) -> _Found:
    """The job, whose allocation is what a scheduler takes away; nothing outside of SLURM."""
    if not environ.get("SLURM_JOB_ID"):
        return _Found()
    cluster, node = _value(environ, "SLURM_CLUSTER_NAME"), _value(environ, "SLURMD_NODENAME")
    restarts = _value(environ, "SLURM_RESTART_COUNT") or "0"
    started = _seconds(environ, "SLURM_JOB_START_TIME")
    return _Found(
        provider="slurm",
        id="/".join(filter(None, (cluster, f"{_value(environ, 'SLURM_JOB_ID')}.{restarts}", node))),
        region=cluster,
        zone=_value(environ, "SLURM_JOB_PARTITION"),
        booted=started if started is not None and _machine_booted() <= started <= time.time() else None,
    )


def _value(environ: Environ, name: str) -> str:
    return _plain(environ.get(name))


def _seconds(environ: Environ, name: str) -> float | None:
    text = _value(environ, name)
    return float(text) if text.isdecimal() else None


# -- from a cloud --------------------------------------------------------------------------------------------------


def _cloud(environ: Environ, dmi: Path, until_s: float) -> _Found | None:
    for variable, read_dmi, read_service in _CLOUDS:
        machine = read_dmi(dmi)
        if machine is None and not environ.get(variable):
            continue
        try:
            return read_service(environ, until_s)
        except (OSError, ValueError, RecursionError) as error:
            logger.debug("metadata service (%s): %.300r", variable, error)
        if machine is not None:
            return machine
    return None


def _aws_dmi(dmi: Path) -> _Found | None:
    # Instances on Xen (p2, p3, g3) tell by their BIOS only.
    if _text(dmi / "sys_vendor") != "Amazon EC2" and "amazon" not in _text(dmi / "bios_version"):
        return None
    tag, product = _text(dmi / "board_asset_tag"), _text(dmi / "product_name")
    return _Found(
        provider="aws",
        id=tag if re.fullmatch("i-[0-9a-f]{8,17}", tag) else "",
        type=product if re.fullmatch(r"[a-z0-9-]+\.[a-z0-9-]+", product) else "",
    )


def _aws_service(environ: Environ, until_s: float) -> _Found:
    service = aws_metadata(environ)
    document = _document(service.get("/latest/dynamic/instance-identity/document", until_s))
    is_spot = None
    try:
        life_cycle = body_of(service.get("/latest/meta-data/instance-life-cycle", until_s)).decode(errors="replace")
        is_spot = {"spot": True, "on-demand": False, "scheduled": False, "capacity-block": False}.get(life_cycle)
    except OSError as error:
        logger.debug("metadata service (life cycle): %.300r", error)
    return _Found(
        provider="aws",
        id=_id(document, "instanceId"),
        region=_plain(document.get("region")),
        zone=_plain(document.get("availabilityZone")),
        type=_plain(document.get("instanceType")),
        is_spot=is_spot,
    )


def _gcp_dmi(dmi: Path) -> _Found | None:
    return _Found(provider="gcp") if _text(dmi / "product_name") == "Google Compute Engine" else None


def _gcp_service(environ: Environ, until_s: float) -> _Found:
    url = f"{gcp_endpoint(environ)}/computeMetadata/v1/instance/?recursive=true"
    document = _document(ask(url, headers={"Metadata-Flavor": "Google"}, until_s=until_s))
    zone = _plain(document.get("zone")).rpartition("/")[2]
    scheduling = document.get("scheduling")
    preemptible = _plain(scheduling.get("preemptible")) if isinstance(scheduling, dict) else ""
    return _Found(
        provider="gcp",
        id=_id(document, "id"),
        region=zone.rpartition("-")[0],
        zone=zone,
        type=_plain(document.get("machineType")).rpartition("/")[2],
        is_spot={"TRUE": True, "FALSE": False}.get(preemptible),
    )


def _azure_dmi(dmi: Path) -> _Found | None:
    return _Found(provider="azure") if _text(dmi / "chassis_asset_tag") == _AZURE_TAG else None


def _azure_service(environ: Environ, until_s: float) -> _Found:
    url = f"{azure_endpoint(environ)}/metadata/instance/compute?api-version=2021-02-01"
    document = _document(ask(url, headers={"Metadata": "true"}, until_s=until_s))
    return _Found(
        provider="azure",
        id=_id(document, "vmId"),
        region=_plain(document.get("location")),
        zone=_plain(document.get("zone")),
        type=_plain(document.get("vmSize")),
        is_spot={"Spot": True, "Low": True, "Regular": False}.get(_plain(document.get("priority"))),
    )


# The variable that names the service, what DMI knows, and what the service does.
_CLOUDS: tuple[
    tuple[str, Callable[[Path], _Found | None], Callable[[Environ, float], _Found]],
    ...,
] = (
    ("AWS_EC2_METADATA_SERVICE_ENDPOINT", _aws_dmi, _aws_service),
    ("GCE_METADATA_HOST", _gcp_dmi, _gcp_service),
    ("SPOT_AZURE_METADATA_ENDPOINT", _azure_dmi, _azure_service),
)


def _document(answer: Answer) -> dict[str, Any]:
    """Raises OSError for a refusal, ValueError or RecursionError for what is not a JSON object."""
    document = json.loads(body_of(answer))
    if not isinstance(document, dict):
        raise ValueError("the answer is not an object")
    return document


def _id(document: dict[str, Any], name: str) -> str:
    found = _plain(document.get(name))
    if not found:
        raise ValueError(f"the answer has no {name}")
    return found


def _plain(value: object) -> str:
    """A name of reasonable size, as text; empty for anything else."""
    text = str(value).strip() if type(value) in {str, int} else ""
    return text if len(text) <= _LONGEST and text.isprintable() else ""


# -- from the machine ----------------------------------------------------------------------------------------------


def _machine_booted() -> float:
    with contextlib.suppress(psutil.Error, OSError, RuntimeError):
        return float(psutil.boot_time())
    return time.time()  # the young die more often: the cautious guess


def _gpu_type(gpus: Path) -> str:
    """Such as `8x NVIDIA H200`, for providers that name no type; empty without the NVIDIA driver."""
    texts = (_text(file) for file in sorted(gpus.glob("*/information")))
    models = [match[1] for text in texts if (match := re.search(r"^Model:\s*(\S.*)$", text, re.MULTILINE))]
    return _plain(f"{len(models)}x {models[0]}") if models else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _path_part(name: str) -> str:
    part = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-_")
    return part or "unknown"
