"""A Llama of two tiny layers, with and without LoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def llama(*, width: int = 32, dropout: float = 0.0, is_tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=128,
        attention_dropout=dropout,
        tie_word_embeddings=is_tied,
    )
    return LlamaForCausalLM(config)


def with_lora(model: torch.nn.Module, *, rank: int = 4, saved: list[str] | None = None) -> Any:
    """saved: modules trained in full next to the adapter."""
    config = LoraConfig(r=rank, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    return get_peft_model(model, config)
