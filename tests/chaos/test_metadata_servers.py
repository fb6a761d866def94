"""The rehearsal's metadata services speak as the providers' do: before, during and after an announcement."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from spot_core.chaos.metadata_servers import SERVERS, AwsServer, AzureServer, GcpServer
from spot_core.chaos.metadata_service import MetadataServer
from spot_core.errors import ConfigError
from spot_core.notice.instance import read_instance

ACTION = "/latest/meta-data/spot/instance-action"
TERMINATION = "/latest/meta-data/spot/termination-time"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
RECURSIVE = "/computeMetadata/v1/instance/?recursive=true"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
COMPUTE = "/metadata/instance/compute?api-version=2021-02-01"
GOOGLE = {"Metadata-Flavor": "Google"}
AZURE = {"Metadata": "true"}
FOREVER_S = 120.0


class Got:
    """One answer. status, headers, text: as they came."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.text = response.status, response.headers, response.read().decode()

    def json(self) -> Any:
        return json.loads(self.text)


def ask(server: MetadataServer, path: str, headers: dict[str, str], method: str = "GET", body: str = "") -> Got:
    connection = http.client.HTTPConnection(server.host, timeout=FOREVER_S)
    try:
        connection.request(method, path, body=body or None, headers=headers)
        return Got(connection.getresponse())
    finally:
        connection.close()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def aws(told: list[str]) -> Iterator[AwsServer]:
    with AwsServer(tell=told.append) as server:
        yield server


@pytest.fixture
def gcp(told: list[str]) -> Iterator[GcpServer]:
    with GcpServer(tell=told.append) as server:
        yield server


@pytest.fixture
def azure(told: list[str]) -> Iterator[AzureServer]:
    with AzureServer(tell=told.append) as server:
        yield server


def token_of(aws: AwsServer) -> dict[str, str]:
    got = ask(aws, "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    assert got.headers["X-Aws-Ec2-Metadata-Token-Ttl-Seconds"] == "60"
    return {"X-aws-ec2-metadata-token": got.text}


# -- AWS -----------------------------------------------------------------------------------------------------------


def test_aws_knows_no_interruption_until_it_is_announced(aws: AwsServer, told: list[str]) -> None:
    token = token_of(aws)
    for path in (ACTION, TERMINATION, REBALANCE):
        assert ask(aws, path, token).status == 404
    assert not told, "to ask for what may come is in order"


def test_aws_announces_in_whole_seconds_and_never_too_early(aws: AwsServer, told: list[str]) -> None:
    token = token_of(aws)
    before = time.time()
    deadline = aws.announce(90.25)
    assert before + 90.25 <= deadline <= time.time() + 91.25
    action = ask(aws, ACTION, token).json()
    assert action == {"action": "terminate", "time": ask(aws, TERMINATION, token).text}
    assert datetime.strptime(action["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp() == deadline
    assert len(told) == 1 and told[0].startswith("aws: preemption announced")


def test_aws_can_withdraw(aws: AwsServer) -> None:
    token = token_of(aws)
    aws.announce(120.0)
    aws.withdraw()
    assert (ask(aws, ACTION, token).status, ask(aws, TERMINATION, token).status) == (404, 404)


def test_aws_recommends_to_rebalance(aws: AwsServer) -> None:
    aws.recommend()
    noticed = ask(aws, REBALANCE, token_of(aws)).json()["noticeTime"]
    assert datetime.strptime(noticed, "%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", ACTION, {}, 401),
        ("GET", ACTION, {"X-aws-ec2-metadata-token": "made-up"}, 401),
        ("PUT", "/latest/api/token", {}, 400),
        ("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21601"}, 400),
        ("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "6", "X-Forwarded-For": "10.0.0.1"}, 403),
        ("GET", "/latest/api/token", {}, 405),
    ],
)
def test_aws_refuses_and_says_why(
    aws: AwsServer, told: list[str], method: str, path: str, headers: dict[str, str], status: int
) -> None:
    aws.announce(120.0)
    assert ask(aws, path, headers, method).status == status
    assert f"{status} to {method} '{path}': " in told[-1]


def test_an_aws_token_runs_out(aws: AwsServer) -> None:
    token = token_of(aws)
    assert ask(aws, aws.identity, token).status == 200
    aws.tokens[token["X-aws-ec2-metadata-token"]] = time.monotonic()
    assert ask(aws, aws.identity, token).status == 401


def test_a_path_that_is_not_served_is_told(aws: AwsServer, told: list[str]) -> None:
    path = "/latest/meta-data/iam/security-credentials/"
    assert ask(aws, path, token_of(aws)).status == 404
    assert path in told[-1]


# -- GCP -----------------------------------------------------------------------------------------------------------


def test_gcp_says_true_from_announcement_to_withdrawal(gcp: GcpServer) -> None:
    def said() -> tuple[str, str]:
        return ask(gcp, PREEMPTED, GOOGLE).text, ask(gcp, RECURSIVE, GOOGLE).json()["preempted"]

    assert said() == ("FALSE", "FALSE")
    before = time.time()
    deadline = gcp.announce(30.0)
    assert before + 30.0 <= deadline <= time.time() + 30.0
    assert said() == ("TRUE", "TRUE")
    gcp.withdraw()
    assert said() == ("FALSE", "FALSE")


def test_gcp_answers_as_google_and_only_to_those_who_mean_it(gcp: GcpServer, told: list[str]) -> None:
    got = ask(gcp, PREEMPTED, GOOGLE)
    assert (got.headers["Metadata-Flavor"], got.headers["Content-Type"]) == ("Google", "application/text")
    assert got.headers["ETag"]
    assert ask(gcp, PREEMPTED, {}).status == 403
    assert ask(gcp, PREEMPTED, {**GOOGLE, "X-Forwarded-For": "10.0.0.1"}).status == 403
    assert ask(gcp, PREEMPTED + "?wait_for_change=true&timeout_sec=soon", GOOGLE).status == 400
    assert ask(gcp, "/computeMetadata/v1/instance/no-such", GOOGLE).status == 404
    assert len(told) == 4


def test_gcp_lists_what_there_is(gcp: GcpServer) -> None:
    names = ask(gcp, "/computeMetadata/v1/instance/", GOOGLE).text.splitlines()
    assert {"attributes/", "machine-type", "preempted"} <= set(names)
    assert ask(gcp, "/computeMetadata/v1/instance/machine-type", GOOGLE).text.endswith("/a2-highgpu-1g")


def waiting(server: MetadataServer, path: str) -> Callable[[], Got]:
    """Asks in a thread; what is returned waits for the answer."""
    answers: queue.Queue[Got] = queue.Queue()
    threading.Thread(target=lambda: answers.put(ask(server, path, GOOGLE)), daemon=True).start()
    return lambda: answers.get(timeout=FOREVER_S)


@pytest.mark.parametrize("query", ["", "&timeout_sec=3600", "&last_etag={etag}"])
def test_a_change_ends_the_wait_at_gcp(gcp: GcpServer, query: str) -> None:
    for change, text in ((lambda: gcp.announce(30.0), "TRUE"), (gcp.withdraw, "FALSE")):
        etag = ask(gcp, PREEMPTED, GOOGLE).headers["ETag"]
        answer = waiting(gcp, f"{PREEMPTED}?wait_for_change=true{query.format(etag=etag)}")
        wait_until(lambda: is_waited_for(gcp))
        change()
        assert answer().text == text


def test_an_older_etag_ends_the_wait_at_once(gcp: GcpServer) -> None:
    older = ask(gcp, PREEMPTED, GOOGLE).headers["ETag"]
    gcp.announce(30.0)
    got = ask(gcp, f"{PREEMPTED}?wait_for_change=true&timeout_sec=3600&last_etag={older}", GOOGLE)
    assert got.text == "TRUE" and got.headers["ETag"] != older
    assert ask(gcp, f"{PREEMPTED}?wait_for_change=true&last_etag=0", GOOGLE).text == "TRUE"


def test_a_wait_that_is_over_answers_what_has_not_changed(gcp: GcpServer) -> None:
    etag = ask(gcp, PREEMPTED, GOOGLE).headers["ETag"]
    began = time.monotonic()
    got = ask(gcp, f"{PREEMPTED}?wait_for_change=true&timeout_sec=1&last_etag={etag}", GOOGLE)
    assert time.monotonic() - began >= 1.0
    assert (got.status, got.text, got.headers["ETag"]) == (200, "FALSE", etag)


def test_the_end_of_the_service_ends_the_wait() -> None:
    with GcpServer() as gcp:
        answer = waiting(gcp, f"{PREEMPTED}?wait_for_change=true")
        wait_until(lambda: is_waited_for(gcp))
    assert answer().text == "FALSE"


def is_waited_for(server: MetadataServer) -> bool:
    with server.changed:
        return bool(server.changed._waiters)  # type: ignore[attr-defined]


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + FOREVER_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- Azure ---------------------------------------------------------------------------------------------------------


def events_of(azure: AzureServer) -> tuple[int, list[dict[str, Any]]]:
    document = ask(azure, EVENTS, AZURE).json()
    assert document.keys() == {"DocumentIncarnation", "Events"}
    return document["DocumentIncarnation"], document["Events"]


def test_azure_schedules_the_end_of_this_vm_and_takes_it_back(azure: AzureServer) -> None:
    first, none = events_of(azure)
    assert none == []
    before = time.time()
    deadline = azure.announce(30.5)
    assert before + 30.5 <= deadline <= time.time() + 31.5
    second, (event,) = events_of(azure)
    assert parsedate_to_datetime(event.pop("NotBefore")).timestamp() == deadline
    assert len(event.pop("EventId")) == 36
    assert event == {
        "EventType": "Preempt",
        "ResourceType": "VirtualMachine",
        "Resources": [ask(azure, COMPUTE, AZURE).json()["name"]],
        "EventStatus": "Scheduled",
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    }
    azure.withdraw()
    third, none = events_of(azure)
    assert none == []
    assert first < second < third
    assert events_of(azure)[0] == third, "what has not changed keeps its number"


def test_azure_may_start_at_once_what_was_acknowledged(azure: AzureServer, told: list[str]) -> None:
    azure.announce(3600.0)
    number, (event,) = events_of(azure)
    assert azure.acknowledged_unix_s is None
    before = time.time()
    body = json.dumps({"StartRequests": [{"EventId": event["EventId"]}]})
    assert ask(azure, EVENTS, AZURE, "POST", body).status == 200
    assert azure.acknowledged_unix_s is not None and before <= azure.acknowledged_unix_s <= time.time()
    later, (started,) = events_of(azure)
    assert later > number
    assert started == {**event, "EventStatus": "Started", "NotBefore": ""}
    assert "acknowledged" in told[-1]


def test_azure_starts_by_itself_when_the_time_has_come(azure: AzureServer) -> None:
    azure.announce(-1.0)
    _, (event,) = events_of(azure)
    assert event["EventStatus"] == "Started"
    assert azure.acknowledged_unix_s is None


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{", '{"StartRequests": []}', '{"StartRequests": [{"EventId": "another"}]}', '{"StartRequests": [7]}'],
)
def test_azure_starts_nothing_that_is_not_scheduled(azure: AzureServer, told: list[str], body: str) -> None:
    azure.announce(3600.0)
    assert ask(azure, EVENTS, AZURE, "POST", body).status == 400
    assert azure.acknowledged_unix_s is None
    assert events_of(azure)[1][0]["EventStatus"] == "Scheduled"
    assert "400 to POST" in told[-1]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (EVENTS, {}, 400),
        (EVENTS, {**AZURE, "X-Forwarded-For": "10.0.0.1"}, 400),
        ("/metadata/scheduledevents", AZURE, 400),
        ("/metadata/scheduledevents?api-version=2021-02-01", AZURE, 400),
        ("/metadata/instance/compute?api-version=2020-07-02", AZURE, 400),
        ("/metadata/no-such?api-version=2021-02-01", AZURE, 404),
    ],
)
def test_azure_refuses_and_says_why(
    azure: AzureServer, told: list[str], path: str, headers: dict[str, str], status: int
) -> None:
    assert ask(azure, path, headers).status == status
    assert f"{status} to GET" in told[-1]


# -- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SERVERS.values())
def test_another_instance_has_an_id_of_its_own_and_no_notice(kind: type[MetadataServer]) -> None:
    with kind() as server:
        first = read_instance(server.environ, budget_s=FOREVER_S)
        server.announce(30.0)
        calm = kind().documents
        server.new_instance()
        second = read_instance(server.environ, budget_s=FOREVER_S)
        assert (second.provider, second.pool) == (kind.provider, first.pool)
        assert second.id != first.id
        if isinstance(server, AzureServer):
            assert server.documents[server.events]["Events"] == []
        else:
            assert server.documents.keys() == calm.keys()


@pytest.mark.parametrize("kind", SERVERS.values())
def test_only_this_machine_is_served(kind: type[MetadataServer]) -> None:
    with kind() as server:
        assert server.host.startswith("127.0.0.1:")
        assert all(server.host in value for value in server.environ.values())
        with pytest.raises(ConfigError, match="cannot be served"), kind(port=int(server.host.split(":")[1])):
            pass


@pytest.mark.parametrize("length", ["-1", "many", str(1 << 20)])
def test_a_body_of_no_sensible_length_is_not_read(azure: AzureServer, length: str) -> None:
    assert ask(azure, EVENTS, {**AZURE, "Content-Length": length}, "POST", "{}").status == 413
