"""The metadata services of AWS, GCP and Azure: paths, headers, refusals and payloads are the providers' own.

So what works here works there. Times are announced in whole seconds, as there, and rounded up: nothing ends before it
was announced to end.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
import uuid
from datetime import datetime, timezone
from email.utils import format_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from spot_core.chaos.metadata_service import MetadataServer, Reply, Request, Tell, iso, nobody


class AwsServer(MetadataServer):
    """IMDSv2 of a g5.xlarge. tokens: each with the monotonic time when it expires."""

    provider = "aws"
    usual_lead_s = 120.0
    identity = "/latest/dynamic/instance-identity/document"
    life_cycle = "/latest/meta-data/instance-life-cycle"
    action = "/latest/meta-data/spot/instance-action"
    termination = "/latest/meta-data/spot/termination-time"
    rebalance = "/latest/meta-data/events/recommendations/rebalance"

    def __init__(self, *, port: int = 0, tell: Tell = nobody) -> None:
        super().__init__(port=port, tell=tell)
        self.tokens: dict[str, float] = {}

    @property
    def environ(self) -> dict[str, str]:
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{self.host}/"}

    def recommend(self) -> None:
        """Recommend to rebalance: a preemption has become more likely."""
        with self.changed:
            self.documents[self.rebalance] = {"noticeTime": iso(time.time())}
            self.changed.notify_all()
        self.tell(f"{self.provider}: rebalance recommended")

    def answer(self, request: Request) -> Reply:
        if "x-forwarded-for" in request.headers:
            return Reply(403, refusal="X-Forwarded-For is not allowed")
        if request.path == "/latest/api/token":
            return self._new_token(request)
        if self.tokens.get(request.headers.get("x-aws-ec2-metadata-token", ""), 0.0) <= time.monotonic():
            return Reply(401, refusal="no valid X-aws-ec2-metadata-token; PUT /latest/api/token gives one")
        if request.method != "GET":
            return Reply(405, refusal="only GET")
        return self.found(request.path, may_come=(self.action, self.termination, self.rebalance))

    def _new_token(self, request: Request) -> Reply:
        if request.method != "PUT":
            return Reply(405, refusal="only PUT")
        ttl_s = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if not (ttl_s.isdecimal() and 1 <= int(ttl_s) <= 21_600):
            return Reply(400, refusal="X-aws-ec2-metadata-token-ttl-seconds must be 1 to 21600")
        token = uuid.uuid4().hex
        self.tokens[token] = time.monotonic() + int(ttl_s)
        headers = {"Content-Type": "text/plain", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds": ttl_s}
        return Reply(200, token.encode(), headers=headers)

    def _first_documents(self) -> dict[str, Any]:
        return {
            self.identity: {
                "accountId": "123456789012",
                "architecture": "x86_64",
                "availabilityZone": "us-east-1a",
                "billingProducts": None,
                "imageId": "ami-0abcdef1234567890",
                "instanceId": "i-0123456789abcdef0",
                "instanceType": "g5.xlarge",
                "pendingTime": "2026-11-20T08:00:00Z",
                "privateIp": "10.0.0.12",
                "region": "us-east-1",
                "version": "2017-09-30",
            },
            self.life_cycle: "spot",
        }

    def _announce(self, deadline: float) -> float:
        whole = math.ceil(deadline)
        self.documents[self.action] = {"action": "terminate", "time": iso(whole)}
        self.documents[self.termination] = iso(whole)
        return whole

    def _withdraw(self) -> None:
        self.documents.pop(self.action, None)
        self.documents.pop(self.termination, None)

    def _rename(self) -> None:
        self.documents.pop(self.rebalance, None)
        self.documents[self.identity]["instanceId"] = f"i-{uuid.uuid4().hex[:17]}"


class GcpServer(MetadataServer):
    """The metadata server of a Spot VM with an A100. It says that the VM is preempted, not when that ends."""

    provider = "gcp"
    usual_lead_s = 30.0
    instance = "/computeMetadata/v1/instance/"
    preempted = "/computeMetadata/v1/instance/preempted"

    @property
    def environ(self) -> dict[str, str]:
        return {"GCE_METADATA_HOST": self.host}

    def answer(self, request: Request) -> Reply:
        reply = self._answer(request)
        headers = {**reply.headers, "Metadata-Flavor": "Google"}
        if reply.status == HTTPStatus.OK:
            headers["ETag"] = _etag(reply)
        return Reply(reply.status, reply.body, reply.refusal, headers)

    def _answer(self, request: Request) -> Reply:
        address = urlsplit(request.path)
        query = parse_qs(address.query, keep_blank_values=True)
        if request.headers.get("metadata-flavor") != "Google":
            return Reply(403, refusal="Metadata-Flavor: Google is missing")
        if "x-forwarded-for" in request.headers:
            return Reply(403, refusal="X-Forwarded-For is not allowed")
        if request.method != "GET":
            return Reply(405, refusal="only GET")
        if query.get("wait_for_change") == ["true"]:
            return self._wait(address.path, query)
        return self._read(address.path, query)

    def _wait(self, path: str, query: dict[str, list[str]]) -> Reply:
        """The answer as soon as it is another than last_etag's, or than now's; by timeout_sec, if given, as it is."""
        timeout_s = query.get("timeout_sec", ["0"])[0]
        if not timeout_s.isdecimal():
            return Reply(400, refusal="timeout_sec must be a whole number")
        with self.changed:
            now = self._read(path, query)
            if now.status != HTTPStatus.OK:
                return now
            last = query.get("last_etag", [_etag(now)])[0]
            self.changed.wait_for(
                lambda: self.is_closing.is_set() or _etag(self._read(path, query)) != last,
                min(int(timeout_s), threading.TIMEOUT_MAX) or None,
            )
            return self._read(path, query)

    def _read(self, path: str, query: dict[str, list[str]]) -> Reply:
        if query.get("recursive") == ["true"]:
            return self.found(path)
        with self.changed:
            values = {_kebab(name): value for name, value in self.documents.get(self.instance, {}).items()}
        names = [f"{name}/" if isinstance(value, dict) else name for name, value in values.items()]
        leaves = {self.instance + name: str(value) for name, value in values.items() if not isinstance(value, dict)}
        text = {**leaves, self.instance: "".join(f"{name}\n" for name in names)}.get(path)
        if text is None:
            return Reply(404, refusal="this rehearsal does not serve this path")
        return Reply(200, text.encode(), headers={"Content-Type": "application/text"})

    def _first_documents(self) -> dict[str, Any]:
        return {
            self.instance: {
                "attributes": {"startup-script": "#" * 200_000},
                "id": 6012345678901234567,
                "machineType": "projects/123456789012/machineTypes/a2-highgpu-1g",
                "preempted": "FALSE",
                "scheduling": {"automaticRestart": "FALSE", "onHostMaintenance": "TERMINATE", "preemptible": "TRUE"},
                "zone": "projects/123456789012/zones/us-central1-a",
            },
        }

    def _announce(self, deadline: float) -> float:
        self.documents[self.instance]["preempted"] = "TRUE"
        return deadline

    def _withdraw(self) -> None:
        self.documents[self.instance]["preempted"] = "FALSE"

    def _rename(self) -> None:
        self.documents[self.instance]["id"] = uuid.uuid4().int >> 65


class AzureServer(MetadataServer):
    """IMDS and Scheduled Events of a Spot VM with an A100.

    acknowledged_unix_s: when somebody let the announced event start, after which the VM may go at once.
    """

    provider = "azure"
    usual_lead_s = 30.0
    compute = "/metadata/instance/compute"
    events = "/metadata/scheduledevents"
    versions = ("2021-02-01", "2021-12-13", "2023-07-01")
    event_versions = ("2017-08-01", "2017-11-01", "2019-01-01", "2019-04-01", "2019-08-01", "2020-07-01")

    def __init__(self, *, port: int = 0, tell: Tell = nobody) -> None:
        super().__init__(port=port, tell=tell)
        self.acknowledged_unix_s: float | None = None
        self._deadline = math.inf

    @property
    def environ(self) -> dict[str, str]:
        return {"SPOT_AZURE_METADATA_ENDPOINT": f"http://{self.host}"}

    def answer(self, request: Request) -> Reply:
        address = urlsplit(request.path)
        is_events = address.path == self.events
        versions = self.event_versions if is_events else self.versions
        if request.headers.get("metadata") != "true":
            return _bad_request("Required metadata header not specified")
        if "x-forwarded-for" in request.headers:
            return _bad_request("X-Forwarded-For header is not allowed")
        if parse_qs(address.query).get("api-version", [""])[0] not in versions:
            return _bad_request("api-version is missing or unknown", newest_versions=versions)
        if is_events and request.method == "POST":
            return self._acknowledge(request.body)
        if request.method != "GET":
            return Reply(405, refusal="only GET")
        self._start_what_is_due()
        return self.found(address.path)

    def _acknowledge(self, body: bytes) -> Reply:
        try:
            wanted = [each["EventId"] for each in json.loads(body)["StartRequests"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            return _bad_request("StartRequests must be a list of objects with an EventId")
        with self.changed:
            events = self.documents[self.events]["Events"]
            if not wanted or any(name not in [event["EventId"] for event in events] for name in wanted):
                return _bad_request("there is no such event")
            self.acknowledged_unix_s = time.time()
            self._start()
        self.tell(f"{self.provider}: acknowledged; the VM may go at once")
        return Reply(200)

    def _start_what_is_due(self) -> None:
        with self.changed:
            if time.time() >= self._deadline:
                self._start()

    def _start(self) -> None:
        self._deadline = math.inf
        started = [
            {**event, "EventStatus": "Started", "NotBefore": ""} for event in self.documents[self.events]["Events"]
        ]
        self._schedule(started)

    def _schedule(self, events: list[dict[str, Any]]) -> None:
        known = self.documents[self.events]
        if known["Events"] != events:
            self.documents[self.events] = {"DocumentIncarnation": known["DocumentIncarnation"] + 1, "Events": events}

    def _first_documents(self) -> dict[str, Any]:
        return {
            self.compute: {
                "azEnvironment": "AzurePublicCloud",
                "evictionPolicy": "Deallocate",
                "location": "westeurope",
                "name": "trainer-1",
                "priority": "Spot",
                "vmId": "02aab8a4-74ef-476e-8182-f6d2ba4166a6",
                "vmSize": "Standard_NC24ads_A100_v4",
                "zone": "2",
            },
            self.events: {"DocumentIncarnation": 1, "Events": []},
        }

    def _announce(self, deadline: float) -> float:
        self.acknowledged_unix_s, self._deadline = None, math.ceil(deadline)
        event = {
            "EventId": str(uuid.uuid4()).upper(),
            "EventType": "Preempt",
            "ResourceType": "VirtualMachine",
            "Resources": [self.documents[self.compute]["name"]],
            "EventStatus": "Scheduled",
            "NotBefore": format_datetime(datetime.fromtimestamp(self._deadline, timezone.utc), usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }
        self._schedule([event])
        return self._deadline

    def _withdraw(self) -> None:
        self._deadline = math.inf
        self._schedule([])

    def _rename(self) -> None:
        self.documents[self.compute]["vmId"] = str(uuid.uuid4())


SERVERS: dict[str, type[MetadataServer]] = {kind.provider: kind for kind in (AwsServer, GcpServer, AzureServer)}


def _etag(reply: Reply) -> str:
    return hashlib.blake2b(reply.body, digest_size=8).hexdigest()


def _kebab(name: str) -> str:
    """As GCP's paths spell what its documents call machineType."""
    return re.sub(r"[A-Z]", lambda letter: f"-{letter[0].lower()}", name)


def _bad_request(reason: str, *, newest_versions: tuple[str, ...] = ()) -> Reply:
    body: dict[str, Any] = {"error": f"Bad request. {reason}"}
    if newest_versions:
        body["newest-versions"] = newest_versions
    return Reply(400, json.dumps(body).encode(), reason, {"Content-Type": "application/json"})
