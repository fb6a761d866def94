"""Watchers against the real thing over HTTP, and what they make of services that are away or talk nonsense."""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spot_core.notice import gcp
from spot_core.notice.instance import Instance
from spot_core.notice.message_file import MessageFile
from spot_core.notice.notice import Notice, Watcher
from spot_core.notice.watch import Watch, WatchOptions, watchers
from spot_core.notice.webhook import Webhook
from tests.lives.announcer import SOURCES, announcer
from tests.metadata import AwsServer, AzureServer, Fault, GcpServer, MetadataServer
from tests.servers import free_port


def instance(provider: str, *, is_spot: bool | None = True) -> Instance:
    return Instance(id="i", boot_id="b", booted=0.0, provider=provider, is_spot=is_spot)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watcher_of(server: MetadataServer, **options: Any) -> Watcher:
    (found,) = watchers(
        WatchOptions(clouds=server.provider, **options), instance(""), server.environ, since_unix_s=time.time()
    )
    return found


@pytest.fixture
def watching() -> Iterator[Callable[..., Watch]]:
    started: list[Watch] = []

    def start(*watched: Watcher, changes: list[Notice | None] | None = None) -> Watch:
        watch = Watch(watched)
        watch.start(changes.append if changes is not None else lambda _: None)
        started.append(watch)
        return watch

    yield start
    for watch in started:
        watch.close()


# -- which -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clouds", "provider", "is_spot", "expected"),
    [
        ("auto", "aws", True, ("aws",)),
        ("auto", "gcp", None, ("gcp",)),
        ("auto", "azure", False, ()),
        ("auto", "runpod", None, ()),
        ("auto", "", None, ()),
        ("off", "aws", True, ()),
        ("gcp", "aws", True, ("gcp",)),
        ("aws, azure", "", None, ("aws", "azure")),
    ],
)
def test_the_clouds_that_are_asked(clouds: str, provider: str, is_spot: bool | None, expected: tuple[str, ...]) -> None:
    assert WatchOptions(clouds).cloud_names(instance(provider, is_spot=is_spot)) == expected


def test_what_cannot_be_watched_is_told_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with AwsServer() as server:
        address = server.host  # taken
        options = WatchOptions("aws,gcp", webhook=address)
        found = watchers(options, instance(""), {"AWS_EC2_METADATA_DISABLED": "true"}, since_unix_s=0.0)
    assert [watcher.source for watcher in found] == ["gcp"]
    assert "AWS_EC2_METADATA_DISABLED is set" in caplog.text
    assert f"notices are not taken at {address}" in caplog.text


# -- each ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_a_notice_comes_stands_is_withdrawn_and_comes_again(
    source: str, tmp_path: Path, watching: Callable[..., Watch]
) -> None:
    with announcer(source, tmp_path) as told:
        names = {"notice_file": "file", "notice_webhook": "webhook", "notice_lead_s": "lead_s"}
        options = {names[name]: value for name, value in told.options.items()}
        clouds = source if source in {"aws", "gcp", "azure"} else "off"
        found = watchers(WatchOptions(clouds, **options), instance(""), told.environ, since_unix_s=time.time() - 1.0)
        for watcher in found:
            watcher.every_s = 0.05
        changes: list[Notice | None] = []
        watch = watching(*found, changes=changes)
        time.sleep(0.2)
        assert watch.notice is None
        for _ in range(2):
            deadline = told.announce(10.0)
            until(lambda: watch.notice is not None)
            notice = watch.notice
            assert notice is not None
            assert notice.source == source
            assert notice.deadline_unix_s == pytest.approx(deadline, abs=1.0)
            assert notice.is_dated == (source != "gcp")
            time.sleep(0.2)
            assert watch.notice is notice, "it stays the same one"
            told.withdraw()
            until(lambda: watch.notice is None)
    assert [change is None for change in changes] == [False, True, False, True]


def test_of_several_notices_the_earliest_end_counts(tmp_path: Path, watching: Callable[..., Watch]) -> None:
    file = tmp_path / "file"
    hook = Webhook("127.0.0.1", 0, 30.0)
    watched = MessageFile(file, 30.0, since_unix_s=0.0)
    watched.every_s = hook.every_s = 0.05
    watch = watching(hook, watched)
    file.write_text('{"in_s": 60}')
    until(lambda: watch.notice is not None)
    request(hook.port, "POST", b'{"in_s": 20}')
    until(lambda: watch.notice is not None and watch.notice.source == "webhook")
    request(hook.port, "DELETE")
    until(lambda: watch.notice is not None and watch.notice.source == "file")
    hook.close()


def test_an_event_of_another_machine_of_the_set_is_not_ours(watching: Callable[..., Watch]) -> None:
    with AzureServer() as server:
        server.announce(60.0)
        watcher = watcher_of(server)
        assert watcher.look() is not None
        server.documents[AzureServer.compute]["name"] = "another-vm"
        assert watcher_of(server).look() is None


def test_a_token_that_expires_is_replaced() -> None:
    with AwsServer() as server:
        watcher = watcher_of(server)
        assert watcher.look() is None
        server.tokens.clear()
        server.announce(60.0)
        assert watcher.look() is not None


@pytest.mark.parametrize("kind", [AwsServer, GcpServer, AzureServer])
@pytest.mark.parametrize("fault", Fault)
def test_a_service_that_fails_is_told_once_asked_on_and_believed_again(
    kind: type[MetadataServer],
    fault: Fault,
    watching: Callable[..., Watch],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gcp, "_POLL_S", 1.0)
    if (kind, fault) == (AwsServer, Fault.NOT_FOUND):
        pytest.skip("404 is what it says when there is no notice")
    with kind() as server:
        watcher = watcher_of(server)
        watcher.every_s = 0.02
        server.fault = fault
        watch = watching(watcher)
        until(lambda: "trying on" in caplog.text)
        asked = len(server.requests)
        until(lambda: len(server.requests) > asked)
        assert caplog.text.count("cannot be read") == 1
        assert watch.notice is None
        server.fault = None
        server.announce(60.0)
        until(lambda: watch.notice is not None)
        server.fault = fault
        until(lambda: caplog.text.count("cannot be read") == 2)
        assert watch.notice is not None, "a service may go before the instance does"
        assert {record.levelno for record in caplog.records} == {logging.WARNING}


# -- file and webhook --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lead_s"), [("", 30.0), ("  \n", 30.0), ('{"in_s": 7.5}', 7.5), ('{"at": "2100-01-01T00:00:00Z"}', None)]
)
def test_what_a_message_says(text: str, lead_s: float | None, tmp_path: Path) -> None:
    file = tmp_path / "message"
    watcher = MessageFile(file, 30.0, since_unix_s=time.time() - 1.0)
    assert watcher.look() is None
    file.write_text(text)
    notice = watcher.look()
    assert notice is not None
    expected = 4102444800.0 if lead_s is None else file.stat().st_mtime + lead_s
    assert notice.deadline_unix_s == expected
    assert notice.is_dated == bool(text.strip())
    assert watcher.look() is notice


def test_a_file_of_an_earlier_life_says_nothing_until_it_is_touched(tmp_path: Path) -> None:
    file = tmp_path / "message"
    file.touch()
    watcher = MessageFile(file, 30.0, since_unix_s=time.time() + 5.0)
    assert watcher.look() is None
    later = time.time() + 10.0
    os.utime(file, (later, later))
    assert watcher.look() is not None


BAD = [b"soon", b"[1]", b'{"in_s": -1}', b'{"in_s": true}', b'{"in_s": "60"}', b'{"at": "tomorrow"}', b"[" * 3000]


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_what_is_no_message_announces_nothing(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "message"
    file.write_bytes(text)
    with pytest.raises((ValueError, RecursionError)):
        MessageFile(file, 30.0, since_unix_s=0.0).look()
    hook = Webhook("127.0.0.1", 0, 30.0)
    status, body = request(hook.port, "POST", text)
    assert (status, hook.look()) == (400, None)
    assert "error" in body
    hook.close()


@pytest.mark.parametrize(
    ("method", "path", "size", "status"),
    [("POST", "/", 0, 404), ("DELETE", "/x", 0, 404), ("POST", "/notice", 5000, 413)],
)
def test_other_requests_are_refused(method: str, path: str, size: int, status: int) -> None:
    hook = Webhook("127.0.0.1", 0, 30.0)
    assert request(hook.port, method, b" " * size, path=path)[0] == status
    assert hook.look() is None
    hook.close()


def test_the_webhook_says_what_stands() -> None:
    hook = Webhook("127.0.0.1", free_port(), 30.0)
    assert request(hook.port, "GET") == (200, {"deadline_unix_s": None})
    _, body = request(hook.port, "POST", b"")
    assert request(hook.port, "GET") == (200, body)
    notice = hook.look()
    assert notice is not None
    assert not notice.is_dated
    assert body["deadline_unix_s"] == notice.deadline_unix_s == notice.noticed_unix_s + 30.0
    hook.close()


def request(port: int, method: str, body: bytes = b"", *, path: str = "/notice") -> tuple[int, dict[str, Any]]:
    sent = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body or None, method=method)
    try:
        with urllib.request.urlopen(sent, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
