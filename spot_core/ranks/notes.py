"""Where several ranks keep a resume from being bit-exact."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def notes(model: torch.nn.Module, size: int) -> tuple[str, ...]:
    """Reasons, of a wrapped model that `size` ranks train."""
    if size == 1 or not isinstance(model, DistributedDataParallel):
        return ()
    found = []
    # PyTorch orders gradients anew after a life's first step, and a sum of three depends on its place in the bucket.
    if size > 2 and (model.static_graph or not model.find_unused_parameters):
        found.append(
            f"the first step's gradients of {size} ranks are summed in another order (not so with DDP's "
            "find_unused_parameters=True)"
        )
    hooks = [state for _, state in model._comm_hooks if not isinstance(state, dist.ProcessGroup | None)]
    if hooks:
        found.append(f"the {type(hooks[0]).__name__} of DDP's communication hook begins anew")
    return tuple(found)
