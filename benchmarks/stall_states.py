"""The models whose checkpoints are measured, with random weights, and random tokens to train them on.

`lora` has the 224 pairs of adapter matrices that LoRA on every linear layer of a 7-8B Llama has (32 layers, rank 16);
the base is narrower, so that the CPU gets through a forward and backward in about a second. `full` trains every
parameter of a small Llama. Adam's moments are fp32 in both.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from spot_core.store.layout import CheckpointName
from spot_core.store.manifest import Manifest

LEARNING_RATE = 1e-4
_VOCABULARY = 512
_SPREAD = 0.02
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama and its batch. rank: of the LoRA adapters, None to train everything. tokens: per sequence."""

    layers: int
    width: int
    inner: int
    rank: int | None
    batch: int
    tokens: int


SHAPES = {
    "tiny": Shape(layers=2, width=64, inner=128, rank=4, batch=2, tokens=16),
    "lora": Shape(layers=32, width=1024, inner=3584, rank=16, batch=1, tokens=64),
    "full": Shape(layers=6, width=768, inner=2048, rank=None, batch=2, tokens=128),
}


class RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """Blocks of random tokens, the same at every call, for twice `steps` steps: training stays in its first epoch."""

    def __init__(self, shape: Shape, *, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(_VOCABULARY, (2 * steps * shape.batch, shape.tokens), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


def make_model(shape: Shape, *, is_drawn: bool = True) -> torch.nn.Module:
    """The Llama, the same at every call, with adapters where `shape` has a rank.

    is_drawn: every weight is; otherwise one block of them is repeated, which takes a second and not ten.
    """
    torch.manual_seed(0)
    with contextlib.nullcontext() if is_drawn else no_init_weights():
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=shape.width,
                intermediate_size=shape.inner,
                num_hidden_layers=shape.layers,
                num_attention_heads=8,
                num_key_value_heads=2 if shape.rank else 8,
                max_position_embeddings=shape.tokens,
            )
        )
    if not is_drawn:
        _fill(model)
    if shape.rank is None:
        return model
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=shape.rank, target_modules=_LINEAR))


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape[-1]).mul_(_SPREAD))
        else:
            parameter.fill_(1.0)  # a norm's


def manifest_of(step: int) -> Manifest:
    """Of a checkpoint of one of them, but for its files."""
    return Manifest(
        run="benchmark",
        name=CheckpointName(1, step),
        epoch=0.0,
        useful_s=0.0,
        created=time.time(),
        framework="transformers",
        native="checkpoint",
        files=(),
    )
