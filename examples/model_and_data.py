"""A LoRA model and packed text blocks: what the fine-tune examples share, whatever the trainer.

Without options nothing is downloaded: the base is a small Llama with random weights and the text is Python's
own standard library, as bytes. That is for offline demonstrations. The base knows nothing and stays frozen,
so the run learns only what LoRA on a random base can learn. Name a model and a dataset for a real fine-tune.

Everything here is a function of its arguments and, for the adapters, of the global seed: a relaunched run
builds the same model and the same blocks in the same order.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

BOS, EOS, PAD = 256, 257, 258  # follow the 256 byte values
Encode = Callable[[str], list[int]]


@dataclass
class ModelArguments:
    """Which base model, and the shape of its adapters."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder; none: a tiny Llama"})
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass
class DataArguments:
    """Which text, and how it is cut."""

    dataset: str | None = field(
        default=None, metadata={"help": "Hub name, folder or file; none: Python's standard library"}
    )
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    block_size: int = field(default=128, metadata={"help": "tokens in one example"})
    eval_blocks: int = field(default=64, metadata={"help": "blocks held out, from the end of the text"})
    stdlib_bytes: int = field(default=240_000, metadata={"help": "bytes read when no dataset is named"})


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Map-style dataset over equal blocks of token ids; nothing is padded, so the mask is all ones."""

    def __init__(self, blocks: Sequence[torch.Tensor] | torch.Tensor) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._blocks[index]
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def build_model(args: ModelArguments) -> PeftModel:
    """The base wrapped in LoRA. Seed first: the adapters' first weights come from the global generator."""
    base = tiny_llama() if args.model is None else AutoModelForCausalLM.from_pretrained(args.model)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
    )
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    return model


def build_tokenizer(model: str | None) -> PreTrainedTokenizerBase | None:
    """The named model's tokenizer; None means plain bytes."""
    if model is None:
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    return tokenizer


def build_datasets(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Dataset[dict[str, torch.Tensor]], Dataset[dict[str, torch.Tensor]]]:
    """Training and evaluation blocks; the last `eval_blocks` of the text are held out."""
    encode = byte_tokens if tokenizer is None else document_encoder(tokenizer)
    if args.dataset is None:
        blocks = TokenBlocks(torch.tensor(pack(stdlib_texts(args.stdlib_bytes), encode, args.block_size)))
    else:
        blocks = TokenBlocks(dataset_blocks(args, encode))
    n_train = len(blocks) - args.eval_blocks
    if n_train <= 0:
        raise ValueError(f"{len(blocks)} blocks of {args.block_size} tokens leave none to train on")
    return Subset(blocks, range(n_train)), Subset(blocks, range(n_train, len(blocks)))


def tiny_llama() -> PreTrainedModel:
    """A random Llama of 0.7 M parameters over bytes: the same weights whatever the training seed."""
    config = LlamaConfig(
        vocab_size=PAD + 1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        # The output layer is random and frozen too: at the usual 0.02 its logits are too small to learn much.
        initializer_range=0.1,
    )
    # A downloaded base does not depend on the run's seed; nor does this stand-in.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def stdlib_texts(limit_bytes: int) -> list[str]:
    """Standard library sources up to `limit_bytes`, by name; they differ between versions of Python."""
    texts: list[str] = []
    left = limit_bytes
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if path.name.startswith("_"):  # _sysconfigdata*.py differs from machine to machine
            continue
        if left <= 0:
            break
        source = path.read_bytes()[:left]
        left -= len(source)
        texts.append(source.decode("utf-8", errors="ignore"))
    return texts


def dataset_blocks(args: DataArguments, encode: Encode) -> Sequence[torch.Tensor]:
    """Blocks of a Hub dataset or a local file or folder; read from disk as they are asked for."""
    from datasets import load_dataset

    assert args.dataset is not None
    loaders = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(args.dataset)
    if path.is_file():
        raw = load_dataset(loaders.get(path.suffix, "text"), data_files=str(path), split=args.dataset_split)
    else:
        raw = load_dataset(args.dataset, args.dataset_config, split=args.dataset_split)

    def pack_batch(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": pack(batch[args.text_column], encode, args.block_size)}

    packed = raw.map(pack_batch, batched=True, remove_columns=raw.column_names)
    blocks: Sequence[torch.Tensor] = packed.with_format("torch")["input_ids"]
    return blocks


def pack(texts: Sequence[str], encode: Encode, block_size: int) -> list[list[int]]:
    """All texts end to end, cut into whole blocks; the remainder is dropped."""
    tokens = list(chain.from_iterable(encode(text) for text in texts))
    return [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]


def byte_tokens(text: str) -> list[int]:
    """One token a byte, between a beginning and an end."""
    return [BOS, *text.encode(), EOS]


def document_encoder(tokenizer: Any) -> Encode:
    """Encode with `tokenizer`, each text closed by its end-of-text token where it has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: a text longer than the model's context is cut into blocks next, so no warning is due
    return lambda text: [*tokenizer(text, verbose=False)["input_ids"], *end]
