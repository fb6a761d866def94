"""EC2's rebalance recommendation: this spot instance is more likely than before to be taken. A hint, not a notice."""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Mapping

from spot_core.notice.aws import utc_unix_s
from spot_core.notice.instance import Instance
from spot_core.notice.metadata import AwsMetadata, aws_metadata, body_of

logger = logging.getLogger(__name__)

_PATH = "/latest/meta-data/events/recommendations/rebalance"
_PATIENCE_S = 1.0


class RebalanceHint:
    """Asks each time it is called, in the caller's thread and for a second at most; about every 5 s is enough."""

    def __init__(self, service: AwsMetadata) -> None:
        self._service = service
        self._noticed: float | None = None

    @classmethod
    def for_instance(cls, instance: Instance, environ: Mapping[str, str]) -> RebalanceHint | None:
        """None where nothing recommends: on other clouds, on-demand, or with the metadata service turned off."""
        if instance.provider != "aws" or instance.is_spot is False:
            return None
        try:
            return cls(aws_metadata(environ))
        except OSError:
            return None

    def noticed_unix_s(self) -> float | None:
        """When the recommendation was made, in Unix seconds, or None so far. Once made it stands. Raises nothing."""
        if self._noticed is None:
            try:
                self._noticed = self._ask()
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                logger.debug("rebalance recommendation: %.300r", error)
        return self._noticed

    def _ask(self) -> float | None:
        answer = self._service.get(_PATH, time.monotonic() + _PATIENCE_S)
        if answer.status == http.client.NOT_FOUND:
            return None
        return utc_unix_s(str(json.loads(body_of(answer))["noticeTime"]))
