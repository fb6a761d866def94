"""Which live tensors a native checkpoint holds, under the keys that stock loaders expect.

PEFT models: adapters and `modules_to_save`, one safetensors file each; the frozen base stays out. Other models:
everything, tied weights once.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spot_core.errors import ConfigError
from spot_core.snapshot.trees import byte_count

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class LiveWeights:
    """Live tensors by file and key, all sharing memory with the model.

    files: path in the checkpoint folder -> key -> tensor. volatile: data pointers of buffers, which forward may
    change. buffers: persistent buffers that no file holds (the base's running statistics under PEFT), by name.
    """

    files: Mapping[str, Mapping[str, torch.Tensor]]
    volatile: frozenset[int]
    buffers: Mapping[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(byte_count(tensor) for file in self.files.values() for tensor in file.values())

    def volatile_keys(self, path: str) -> frozenset[str]:
        return frozenset(key for key, tensor in self.files[path].items() if tensor.data_ptr() in self.volatile)


def is_peft(model: torch.nn.Module) -> bool:
    """Whether `model` is a PeftModel; peft need not be installed."""
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def live_weights(model: torch.nn.Module) -> LiveWeights:
    """The tensors to checkpoint. Raises ConfigError, naming them, if a trained tensor would not be in any file."""
    files = dict(_adapters(model)) if is_peft(model) else {WEIGHTS: _untied(model)}
    stored = {tensor.data_ptr() for file in files.values() for tensor in file.values()}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    missing = [name for name, p in parameters.items() if p.requires_grad and p.data_ptr() not in stored]
    if missing:
        raise ConfigError(
            f"{len(missing)} trained tensors are not part of the native checkpoint of {type(model).__name__}: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. A resume would lose them. With PEFT, list "
            "their modules in modules_to_save."
        )
    alive = {tensor.data_ptr() for tensor in (*parameters.values(), *buffers.values())}
    copies = [key for file in files.values() for key, t in file.items() if t.numel() and t.data_ptr() not in alive]
    if copies:
        raise ConfigError(
            f"the state dict of {type(model).__name__} holds tensors that are computed, not stored: "
            f"{', '.join(copies[:5])}. Such a model cannot be snapshotted while it trains."
        )
    persistent = model.state_dict().keys()
    elsewhere = {
        name: buffer
        for name, buffer in buffers.items()
        if name in persistent and buffer.numel() and buffer.data_ptr() not in stored
    }
    return LiveWeights(files, frozenset(buffer.data_ptr() for buffer in buffers.values()), elsewhere)


def _adapters(model: Any) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    from peft import get_peft_model_state_dict

    for adapter in model.peft_config:
        # As PeftModel.save_pretrained lays them out: the default adapter at the top, others in folders.
        path = ADAPTER if adapter == "default" else f"{adapter}/{ADAPTER}"
        yield path, get_peft_model_state_dict(model, adapter_name=adapter)


def _untied(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The state dict with tied tensors once, under the name that loaders tie the others to."""
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    # Sources before the names tied to them.
    for key in sorted(state, key=lambda name: name in tied):
        identity = (state[key].data_ptr(), state[key].shape)
        if state[key].numel() == 0 or identity not in seen:
            seen.add(identity)
            kept[key] = state[key]
    return kept


def static_files(model: torch.nn.Module, processing_class: Any) -> dict[str, bytes]:
    """Small files beside the weights that do not change while training: configurations and the tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if is_peft(model):
            _save_adapter_configs(model, folder)
        elif isinstance(model, PreTrainedModel):
            config = copy.deepcopy(model.config)
            config.dtype = str(model.dtype).removeprefix("torch.")
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _save_adapter_configs(model: Any, folder: Path) -> None:
    for adapter, live in model.peft_config.items():
        config = copy.deepcopy(live)
        config.inference_mode = True
        base = getattr(model, "base_model", None)
        inner = base if config.is_prompt_learning else getattr(base, "model", None)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(inner, "name_or_path", None) or None
        target = folder if adapter == "default" else folder / adapter
        target.mkdir(exist_ok=True)
        config.save_pretrained(target)
