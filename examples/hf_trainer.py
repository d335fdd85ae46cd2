"""Fine-tuning with the Trainer of transformers: every weight is held near where it began.

Shows: the callback with ``target="initial"``, which logs and goes into the Trainer's checkpoints.
The model is a small GPT-2 with random weights, the text is random, so nothing is downloaded.
``--optimizer`` takes SpectralAdamW instead of the callback: the Trainer makes it of a class.

    pip install 'spectral_kernels[transformers]'
    python examples/hf_trainer.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from spectral_kernels import SpectralAdamW, spectral_norms
from spectral_kernels.integrations.transformers import SpectralCallback


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--strength", type=float, default=1e-1)
    parser.add_argument("--optimizer", action="store_true", help="SpectralAdamW, not the callback")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)  # GPT2LMHeadModel.from_pretrained("gpt2")
    rows = torch.randint(64, (256, 32))
    data = [{"input_ids": row, "labels": row} for row in rows]
    before = spectral_norms(model)

    penalty = {"strength": options.strength, "target": "initial"}
    made = None
    if options.optimizer:
        # A list of groups reaches the class; with model= it is the module itself.
        made = (SpectralAdamW, {"model": model, "lr": 5e-3, **penalty})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder, max_steps=options.steps, per_device_train_batch_size=16, use_cpu=True,
                learning_rate=5e-3, logging_steps=10, save_strategy="no", report_to=[],
                disable_tqdm=True, seed=options.seed, dataloader_pin_memory=False,
            ),
            train_dataset=data,
            optimizer_cls_and_kwargs=made,
        )  # fmt: skip
        # With SpectralAdamW it only logs. add_to() puts it before TensorBoard, W&B and others.
        SpectralCallback(**({} if made else penalty)).add_to(trainer)
        trainer.train()

    after = spectral_norms(model)
    moved = max(abs(after[name] - before[name]) for name in before)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    print(f"loss {logged[0]['loss']:.3f} -> {logged[-1]['loss']:.3f}; "
          f"largest change of a sigma of {len(before)} matrices: {moved:.3f}")  # fmt: skip
    return {"moved": moved, **logged[-1]}


if __name__ == "__main__":
    main()
