"""What each rank of `test_distributed` runs: a short DDP training on the CPU, with or without telemetry."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from tiny_models import build, dataset
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback


def main(out: str, store: str, who: str) -> None:
    torch.set_num_threads(1)
    args = TrainingArguments(
        output_dir=f"{out}/trainer",
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
    )
    observed = who == "all" or (who == "first" and args.process_index == 0)
    rare = {"sharpness": {"every": 2}, "critical_sharpness": {"every": 2}}
    instruments = {"activations": {}, "attention": {}, "parameters": {}, **rare}
    callbacks = []
    if observed:
        callbacks.append(TelemetryCallback(store=store, every=1, strict=True, instruments=instruments))
    trainer = Trainer(model=build("llama", seed=3), args=args, train_dataset=dataset(64), callbacks=callbacks)
    trainer.train()
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    found = {"parameters": dict(trainer.model.named_parameters()), "log": log}
    torch.save(found, f"{out}/rank-{args.process_index}.pt")
    # gloo's threads must end before the interpreter does, or they abort it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
