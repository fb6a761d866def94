"""The state dict without a walk is the one of `module.state_dict()`, whatever the module is made of or turned into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from lightning_spot.module_state import ModuleState
from tests.lives.llama import llama, with_lora


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"count": torch.tensor(3)}

    def set_extra_state(self, state: Any) -> None:
        pass


class OnlyTrained(nn.Sequential):
    """Leaves the frozen base out, as users do."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.endswith("0.weight")}


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("unset", None)
        self.register_parameter("absent", None)
        self.child = None


def renamed(module: nn.Module) -> nn.Module:
    """By a hook, as weight quantization does."""

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[f"{prefix}quantized"] = state.pop(f"{prefix}weight")

    module._register_state_dict_hook(rename)
    return module


def patched(module: nn.Module) -> nn.Module:
    """On the instance, as older recipes for adapters do."""

    def state_dict(destination: dict[str, Any], prefix: str, **kwargs: Any) -> None:
        destination[f"{prefix}own"] = module.weight.detach()

    module.state_dict = state_dict  # type: ignore[method-assign,assignment]
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.Linear(3, 1))),
    "lora": lambda: with_lora(llama(), saved=["lm_head"]),
    "tied": lambda: llama(is_tied=True),
    "buffers": lambda: nn.Sequential(Passing(), nn.Linear(1, 1)),
    "metric": lambda: nn.ModuleDict({"mean": torchmetrics.MeanMetric(), "layer": nn.Linear(2, 2)}),
    "extra state": lambda: nn.Sequential(nn.Linear(1, 1), WithExtra(2, 2)),
    "own state dict": lambda: OnlyTrained(nn.Linear(1, 1), nn.Linear(1, 1)),
    "a child's own state dict": lambda: nn.Sequential(OnlyTrained(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Linear(2, 2)),
    "hook": lambda: nn.Sequential(nn.Linear(1, 1), renamed(nn.Linear(2, 2))),
    "patched": lambda: nn.Sequential(nn.Linear(1, 1), nn.Sequential(patched(nn.Linear(2, 2)))),
}


def assert_same(state: ModuleState, module: nn.Module) -> None:
    ours, theirs = state.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].data_ptr() == value.data_ptr()
            assert not ours[name].requires_grad
        else:
            assert ours[name] == value


@pytest.mark.parametrize("kind", MODULES)
def test_the_state_dict_is_the_modules_own(kind: str) -> None:
    module = MODULES[kind]()
    state = ModuleState(module)
    assert_same(state, module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert_same(state, module)


def unfreeze(module: nn.Sequential) -> None:
    module.append(nn.Linear(4, 4))


def exchange(module: nn.Sequential) -> None:
    module[0] = nn.Linear(2, 3)


def remove(module: nn.Sequential) -> None:
    del module[1]


def rename_parameter(module: nn.Sequential) -> None:
    layer = module[0]
    layer.register_parameter("kernel", layer.weight)
    del layer.weight


def exchange_parameter(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(torch.zeros(3, 2))


def move(module: nn.Sequential) -> None:
    module[0].weight.data = torch.ones(3, 2)


def unset(module: nn.Sequential) -> None:
    module[0].bias = None


def set_again(module: nn.Sequential) -> None:
    module[3].late = nn.Parameter(torch.ones(1))


def add_hook(module: nn.Sequential) -> None:
    renamed(module[0])


def add_buffer(module: nn.Sequential) -> None:
    module[2].register_buffer("statistics", torch.zeros(3))


@pytest.mark.parametrize(
    "change",
    [unfreeze, exchange, remove, rename_parameter, exchange_parameter, move, unset, set_again, add_hook, add_buffer],
)
def test_what_was_changed_since_is_seen(change: Callable[[nn.Sequential], None]) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.Linear(3, 1)))
    module.append(nn.Module())
    module[3].register_parameter("late", None)
    state = ModuleState(module)
    assert_same(state, module)
    change(module)
    assert_same(state, module)
