"""Watches for notices, whatever they come from: one thread a watcher, none of which can end or hold up anything."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from spot_core.notice.aws import AwsNotice
from spot_core.notice.azure import AzureNotice
from spot_core.notice.gcp import LEAD_S as GCP_LEAD_S
from spot_core.notice.gcp import GcpNotice
from spot_core.notice.instance import Instance
from spot_core.notice.message_file import MessageFile
from spot_core.notice.metadata import aws_metadata, azure_endpoint, gcp_endpoint
from spot_core.notice.notice import Notice, Watcher
from spot_core.notice.webhook import Webhook

logger = logging.getLogger(__name__)

CLOUDS = ("aws", "gcp", "azure")
# What a watcher may meet: services that are away or talk nonsense.
FAILURES = (OSError, ValueError, TypeError, KeyError, RecursionError)


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What to watch.

    clouds: "auto" for the one that this instance is of, "off", or names from CLOUDS with commas in between. lead_s:
    from a notice that names no time to the end, None for what is usual. file, webhook: where else notices appear; the
    webhook as host:port.
    """

    clouds: str = "auto"
    lead_s: float | None = None
    file: str | None = None
    webhook: str | None = None
    grace_s: float = 25.0

    def cloud_names(self, instance: Instance) -> tuple[str, ...]:
        """The clouds whose metadata service is asked for notices."""
        if self.clouds == "auto":
            return (instance.provider,) if instance.provider in CLOUDS and instance.is_spot is not False else ()
        return () if self.clouds == "off" else tuple(name.strip() for name in self.clouds.split(","))


def watchers(
    options: WatchOptions, instance: Instance, environ: Mapping[str, str], *, since_unix_s: float
) -> list[Watcher]:
    """Everything that is to be watched here. What cannot be is told, and left out.

    since_unix_s: when this life began.
    """
    lead_s = options.grace_s if options.lead_s is None else options.lead_s
    found: list[Watcher] = []
    for cloud in options.cloud_names(instance):
        if cloud == "gcp":
            found.append(GcpNotice(gcp_endpoint(environ), GCP_LEAD_S if options.lead_s is None else options.lead_s))
        elif cloud == "azure":
            found.append(AzureNotice(azure_endpoint(environ)))
        else:
            try:
                found.append(AwsNotice(aws_metadata(environ)))
            except OSError as error:
                logger.warning("notices of aws are not watched: %s", error)
    if options.file is not None:
        found.append(MessageFile(options.file, lead_s, since_unix_s=since_unix_s))
    if options.webhook is not None:
        host, _, port = options.webhook.rpartition(":")
        try:
            found.append(Webhook(host, int(port), lead_s))
        except OSError as error:
            logger.warning("notices are not taken at %s: %s", options.webhook, error)
    return found


@dataclass(slots=True)
class Watch:
    """Looks at every watcher until `close`, and knows what stands."""

    watchers: Sequence[Watcher]
    _on_change: Callable[[Notice | None], None] = field(default=lambda _: None, init=False)
    _standing: dict[str, Notice] = field(default_factory=dict, init=False)
    _changing: threading.Lock = field(default_factory=threading.Lock, init=False)
    _closed: threading.Event = field(default_factory=threading.Event, init=False)

    def start(self, on_change: Callable[[Notice | None], None]) -> None:
        """on_change: called in a watcher's thread with what stands from then on."""
        self._on_change = on_change
        for watcher in self.watchers:
            threading.Thread(target=self._look, args=(watcher,), name=f"notice-{watcher.source}", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    @property
    def notice(self) -> Notice | None:
        """Of the notices that stand the one with the earliest end, None if there is none."""
        return min(tuple(self._standing.values()), key=lambda notice: notice.deadline_unix_s, default=None)

    def _look(self, watcher: Watcher) -> None:
        is_told = False
        while not self._closed.is_set():
            try:
                notice = watcher.look()
            except FAILURES as error:
                # A notice that stands goes on standing: a service may well go before the instance does.
                level = logging.DEBUG if is_told else logging.WARNING
                logger.log(level, "notices of %s cannot be read, trying on: %.300s", watcher.source, error)
                is_told = True
            else:
                if is_told:
                    logger.warning("notices of %s can be read again", watcher.source)
                    is_told = False
                self._note(watcher.source, notice)
            self._closed.wait(watcher.every_s)

    def _note(self, source: str, notice: Notice | None) -> None:
        with self._changing:
            before = self.notice
            if notice is None:
                self._standing.pop(source, None)
            else:
                self._standing[source] = notice
            if self.notice != before:
                self._on_change(self.notice)
