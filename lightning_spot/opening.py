"""Opens the run of one `fit`, when the model is whole."""

from __future__ import annotations

from typing import Any

from lightning_spot.identity import run_identity, versions
from lightning_spot.weights import FrozenBase
from spot_core.agent.launch import EarlyAgent
from spot_core.config import SpotConfig
from spot_core.handover import expected_bytes
from spot_core.opening import AnySession, open_on_each, open_session
from spot_core.ranks.leader import Alone
from spot_core.session import Session
from spot_core.snapshot.trees import byte_count


def open_fit(trainer: Any, config: SpotConfig) -> tuple[AnySession, FrozenBase | None]:
    """The session of this process, and what its checkpoints leave out."""
    module, device, rank = trainer.lightning_module, trainer.strategy.root_device, trainer.global_rank

    def read_base() -> FrozenBase | None:
        return FrozenBase.of(module, device) if config.trainable_only else None

    base = read_base() if rank > 0 else None

    def open_run(ranks: Alone) -> Session:
        nonlocal base
        with EarlyAgent(config) as early:
            base = read_base()
            sizes = [(byte_count(p), p.requires_grad) for p in module.parameters()]
            stored_bytes = sum(size for size, is_trained in sizes if is_trained or base is None)
            return open_session(
                config,
                run_identity(trainer, base),
                device=device,
                state_bytes=expected_bytes(stored_bytes, sum(size for size, is_trained in sizes if is_trained)),
                versions=versions(trainer),
                base_fingerprint=base.fingerprint if base else None,
                early=early,
                ranks=ranks,
            )

    return open_on_each(rank, trainer.world_size, config, open_run), base
