"""Opens a run: on one process, or on each of several ranks, where rank 0 does and tells the others how it went."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from spot_core.agent.client import AgentClient
from spot_core.agent.launch import EarlyAgent
from spot_core.config import SpotConfig
from spot_core.errors import ConfigError, shown
from spot_core.ranks.follower import Follower
from spot_core.ranks.leader import Alone, Leader
from spot_core.ranks.team import Failed, Opened, Team
from spot_core.report.checks.signals import warn_if_unheard
from spot_core.report.log import make_visible
from spot_core.session import Session
from spot_core.snapshot.capture import device_name
from spot_core.store.identity import RunIdentity
from spot_core.store.overflow import room_bytes
from spot_core.store.posix import check_usable
from spot_core.store.volume import describe_place

logger = logging.getLogger(__name__)

AnySession: TypeAlias = Session | Follower


def open_session(
    config: SpotConfig,
    identity: RunIdentity,
    *,
    device: torch.device,
    state_bytes: int = 0,
    versions: Mapping[str, str] | None = None,
    base_fingerprint: str | None = None,
    early: EarlyAgent | None = None,
    ranks: Alone | None = None,
) -> Session:
    """Start the agent, which checks the place, restores the newest valid checkpoint and claims a life.

    state_bytes: expected size of a checkpoint, to refuse a local folder too small for one. early: started before.
    ranks: those that train with this one, see `open_on_each`.
    Raises ConfigError, TierError, TierDeniedError, CorruptCheckpointError: training must not start.
    """
    make_visible()
    client = AgentClient(config, identity, early)
    check_usable(config.run_folder, state_bytes, elsewhere_bytes=room_bytes())
    logger.info("run %s: local tier %s, remote tier %s", config.run, config.run_folder, shown(config.remote))
    for level, sentence in describe_place(config.run_folder, config.remote):
        logger.log(level, "%s", sentence)
    warn_if_unheard(config)
    session = Session(
        config,
        identity,
        client,
        client.open(),
        device=device,
        state_bytes=state_bytes,
        versions={"torch": torch.__version__, "device": device_name(device), **(versions or {})},
        base_fingerprint=base_fingerprint,
        ranks=ranks or Alone(),
    )
    if session.resume is not None:
        try:
            session.resume.check_base(base_fingerprint)
        except ConfigError as error:
            session.close(error)
            raise
    return session


def open_on_each(rank: int, size: int, config: SpotConfig, open_run: Callable[[Alone], Session]) -> AnySession:
    """The session of this rank of `size`. open_run: opens it with these ranks; called on rank 0 alone.

    All ranks call this at once, with torch.distributed initialised. Raises what `open_run` raises, on all of them;
    ConfigError if they are not on one machine.
    """
    if size == 1:
        return open_run(Alone())
    team = Team.form(rank, size)
    if rank > 0:
        return Follower(config, team, team.told())
    try:
        session = open_run(Leader(team))
    except BaseException as error:
        team.tell(Failed.of(error))
        team.close()
        raise
    team.tell(Opened(session.resume, session.is_claimed, session.planned_steps))
    return session
