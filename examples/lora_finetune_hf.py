"""LoRA fine-tune with the Hugging Face Trainer that survives SIGKILL: `python lora_finetune_hf.py lora.yaml`.

An ordinary Trainer script. What makes it safe on a spot instance is `callbacks=spot.callbacks()` and one
line of configuration, `spot_remote`; without it the list is empty. Killed at any moment, the same command
continues.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import yaml
from model_and_data import DataArguments, ModelArguments, build_datasets, build_model, build_tokenizer
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_spot import SpotArguments

Arguments = tuple[ModelArguments, DataArguments, TrainingArguments, SpotArguments]


def parse_arguments(argv: list[str]) -> Arguments:
    """Flags alone, or a YAML file and then flags; a flag wins over the file."""
    kinds = (ModelArguments, DataArguments, TrainingArguments, SpotArguments)
    parser = HfArgumentParser(kinds)
    if argv and argv[0].endswith((".yaml", ".yml")):
        settings = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        # argparse takes any default without complaint: a misspelt `spot_remote` would train unprotected
        unknown = settings.keys() - {field.name for kind in kinds for field in dataclasses.fields(kind)}
        if unknown:
            parser.error(f"{argv[0]}: unknown settings {sorted(unknown)}")
        parser.set_defaults(**settings)
        argv = argv[1:]
    model, data, training, spot = parser.parse_args_into_dataclasses(argv)
    return model, data, training, spot


def main() -> None:
    model_args, data_args, training_args, spot = parse_arguments(sys.argv[1:])
    set_seed(training_args.seed)
    tokenizer = build_tokenizer(model_args.model)
    with training_args.main_process_first(desc="reading the dataset"):
        train_dataset, eval_dataset = build_datasets(data_args, tokenizer)
    trainer = Trainer(
        model=build_model(model_args),
        args=training_args,
        data_collator=default_data_collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=spot.callbacks(),
    )
    trainer.train()
    final = Path(training_args.output_dir) / "final"
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        print(f"finished at step {trainer.state.global_step}: adapter in {final}")


if __name__ == "__main__":
    main()
