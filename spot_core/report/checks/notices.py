"""Whether a preemption of this instance would be announced to a training here, and by whom."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from spot_core.config import SpotConfig
from spot_core.notice.instance import Instance
from spot_core.notice.metadata import LINK_LOCAL, ask, aws_metadata
from spot_core.notice.notice import Notice
from spot_core.notice.watch import FAILURES, WatchOptions, watchers
from spot_core.report.checks.finding import Area, Finding
from spot_core.report.units import duration

AREA = Area("notices")

# A metadata service answers within milliseconds.
_PATIENCE_S = 1.0
_HOP_LIMIT = (
    "raise the hop limit, from outside: aws ec2 modify-instance-metadata-options --instance-id {id} "
    "--http-tokens required --http-put-response-hop-limit 2"
)
_OFF = ". On an instance that nobody takes away set SPOT_NOTICE=off"


def check_notices(config: SpotConfig, instance: Instance, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Takes a second or two for each cloud that is to be asked and does not answer, and asks none off-cloud."""
    yield _instance(instance)
    clouds = WatchOptions(config.notice).cloud_names(instance)
    for cloud in clouds:
        yield _cloud(cloud, config, instance, environ)
    if not clouds:
        yield _no_cloud(config, instance)
    if config.notice_file is not None:
        yield _file(Path(config.notice_file))
    if config.notice_webhook is not None:
        yield _webhook(config.notice_webhook)


def _instance(instance: Instance) -> Finding:
    if not instance.provider:
        return AREA.ok("instance", "of no cloud that is known here")
    kind = {True: "spot", False: "on-demand", None: "spot or on-demand is unknown"}[instance.is_spot]
    parts = (instance.provider, instance.region, instance.zone, instance.type, instance.id)
    return AREA.ok("instance", f"{' '.join(filter(None, parts))}, {kind}")


def _no_cloud(config: SpotConfig, instance: Instance) -> Finding:
    what = "metadata service"
    if config.notice == "off":
        if instance.is_spot:
            return AREA.warning(
                what, "SPOT_NOTICE=off: no notice is watched on a spot instance", "unset SPOT_NOTICE, or set it to auto"
            )
        return AREA.ok(what, "not asked: SPOT_NOTICE=off")
    if instance.is_spot is False:
        return AREA.ok(what, "not asked: this instance is on-demand, nothing announces its end")
    return AREA.ok(what, f"there is none here that announces a preemption: {config.signals} does, and what is below")


def _cloud(cloud: str, config: SpotConfig, instance: Instance, environ: Mapping[str, str]) -> Finding:
    options = WatchOptions(cloud, config.notice_lead_s, grace_s=config.grace_s)
    unseen = f"no notice of {cloud} can be seen"
    if cloud == "aws" and (why := _unseen_on_aws(instance, environ)) is not None:
        return AREA.problem(cloud, f"{unseen}: {why[0]}", why[1])
    (watcher,) = watchers(options, instance, environ, since_unix_s=0.0)
    began = time.monotonic()
    try:
        notice = watcher.look()
    except FAILURES as error:
        return AREA.problem(
            cloud,
            f"{unseen}: its metadata service gives none ({type(error).__name__}: {error!s:.200})",
            f"let this process reach {LINK_LOCAL}, past firewalls, proxies and network policies{_OFF}",
        )
    answer_s = time.monotonic() - began
    if notice is not None:
        return _standing(notice, answer_s)
    return AREA.ok(
        cloud,
        f"its notices are seen: the metadata service answers within {duration(answer_s)}, and is asked every "
        f"{duration(watcher.every_s)}",
        answer_s=round(answer_s, 4),
    )


def _standing(notice: Notice, answer_s: float) -> Finding:
    left_s = max(0.0, notice.deadline_unix_s - time.time())
    return AREA.warning(
        notice.source,
        f"a preemption is announced now: this instance goes in {duration(left_s)}",
        "start on another instance",
        answer_s=round(answer_s, 4),
    )


def _unseen_on_aws(instance: Instance, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Why IMDSv2 gives no token, and what to do; None if it gives one."""
    try:
        service = aws_metadata(environ)
    except OSError as error:
        return str(error), f"unset AWS_EC2_METADATA_DISABLED for the training{_OFF}"
    try:
        status = service.token_status(time.monotonic() + _PATIENCE_S)
    except OSError as error:
        return _why_silent(error, instance, environ)
    if status == 200:
        return None
    reason = f"the metadata service refuses a token with status {status}"
    if status in {401, 403}:
        fix = (
            "turn the service on: aws ec2 modify-instance-metadata-options "
            f"--instance-id {_id(instance)} --http-endpoint enabled; and let no proxy stand in between"
        )
        return reason, fix + _OFF
    return reason, f"see what answers at {service.endpoint}: it is not the metadata service of EC2{_OFF}"


def _why_silent(error: OSError, instance: Instance, environ: Mapping[str, str]) -> tuple[str, str]:
    """The answer to a PUT has a limit of hops, and is lost on the way into a container; that to a GET has none."""
    service = aws_metadata(environ)
    try:
        ask(f"{service.endpoint}/latest/meta-data/", headers={}, until_s=time.monotonic() + _PATIENCE_S)
    except OSError:
        fix = f"let this process reach {service.endpoint}, past firewalls, proxies and network policies"
        return f"the metadata service does not answer ({error!s:.200})", f"{fix}; in a container, {_hops(instance)}"
    return "the metadata service answers, but its token is lost on the way: the hop limit is 1", _hops(instance)


def _hops(instance: Instance) -> str:
    return _HOP_LIMIT.format(id=_id(instance)) + _OFF


def _id(instance: Instance) -> str:
    return instance.id if instance.id.startswith("i-") else "INSTANCE"


def _file(file: Path) -> Finding:
    what = "message file"
    if not file.parent.is_dir():
        return AREA.warning(
            what, f"{file} can announce nothing: there is no folder {file.parent}", f"mkdir -p {file.parent}"
        )
    return AREA.ok(what, f"{file} announces a preemption by being touched")


def _webhook(address: str) -> Finding:
    what = "webhook"
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return AREA.warning(
            what,
            f"{address} cannot be served: {error.strerror or error}",
            "fine if a training here serves it already; else set SPOT_NOTICE_WEBHOOK to a free address of this machine",
        )
    return AREA.ok(what, f"{address} can be served")
