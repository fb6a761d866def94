"""The LoRA fine-tune with Lightning: `python lora_finetune_lightning.py fit --config lora_lightning.yaml`.

An ordinary LightningCLI script: nothing in it knows about spot instances. What makes it safe on one is the callback
in its configuration. Killed at any moment, the same command continues.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from model_and_data import DataArguments, ModelArguments, build_datasets, build_model, build_tokenizer
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup


class LoraModule(LightningModule):
    """A causal language model in LoRA adapters; only they are trained."""

    def __init__(self, adapter: ModelArguments, learning_rate: float = 3e-3, warmup_steps: int = 20) -> None:
        super().__init__()
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        # from_pretrained leaves a model in eval mode, and Lightning keeps the mode it finds: no dropout
        self.network = build_model(adapter).train()

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = self.network(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.log("val_loss", self.network(**batch).loss)

    def on_validation_end(self) -> None:
        self.print(f"step {self.global_step}: validation loss {self.trainer.callback_metrics['val_loss']:.4f}")

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TextModule(LightningDataModule):
    """Blocks of text; `tokenizer` is a Hub name or folder, none means bytes."""

    def __init__(
        self, text: DataArguments, tokenizer: str | None = None, batch_size: int = 12, eval_batch_size: int = 32
    ) -> None:
        super().__init__()
        self.text, self.tokenizer, self.batch_size, self.eval_batch_size = text, tokenizer, batch_size, eval_batch_size

    def setup(self, stage: str) -> None:
        self.train_dataset, self.eval_dataset = build_datasets(self.text, build_tokenizer(self.tokenizer))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.eval_dataset, self.eval_batch_size)


class LoraCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.adapter.model", "data.tokenizer")

    def before_fit(self) -> None:
        self.began = time.monotonic()

    def after_fit(self) -> None:
        """Also runs when a finished run is started again, which then writes the same adapter."""
        if self.trainer.is_global_zero:
            final = Path(self.trainer.default_root_dir) / "final"
            self.model.network.save_pretrained(final)
            took_s = time.monotonic() - self.began
            print(f"finished at step {self.trainer.global_step} after {took_s:.1f} s: adapter in {final}")


if __name__ == "__main__":
    # The CLI keeps its configuration next to the logs and refuses to write it twice: a relaunch would fail.
    LoraCLI(LoraModule, TextModule, save_config_kwargs={"overwrite": True})
