"""A loop of Accelerate: attached to the prepared optimizer, saved in Accelerate's checkpoints.

Shows: gradient accumulation and clipping, neither of which touches the penalty (it counts once per
optimizer step), and ``register_for_checkpointing``, so that ``load_state`` brings the vectors back.
``--optimizer`` takes SpectralAdamW, whose own checkpoint has them.

    pip install accelerate
    python examples/accelerate_loop.py --steps 200
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, spectral_norms


def main(arguments: list[str] | None = None) -> dict[str, torch.Tensor]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="of the optimizer")
    parser.add_argument("--strength", type=float, default=1e-2)
    parser.add_argument("--optimizer", action="store_true", help="SpectralAdamW, not attach()")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                          nn.Linear(128, 10))  # fmt: skip
    x, y = torch.randn(256, 32), torch.randint(10, (256,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32)
    if options.optimizer:
        optimizer = SpectralAdamW(model, lr=3e-3, strength=options.strength)
        reg = optimizer.regularizer
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        reg = SpectralRegularizer(model, strength=options.strength)  # of the prepared model
        reg.attach(optimizer)  # the wrapper of Accelerate is fine
        accelerator.register_for_checkpointing(reg)
    print(f"at first:   largest sigma {max(spectral_norms(model).values()):.3f}")

    def train(steps: int) -> float:
        done, loss = 0, torch.zeros(())
        while done < steps:
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                        done += 1
                    optimizer.step()
                    optimizer.zero_grad()
                if done == steps and accelerator.sync_gradients:
                    break
        return loss.item()

    train(options.steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        loss = train(options.steps - options.steps // 2)
        expected = reg.sigma
        accelerator.load_state(folder)  # the vectors too
        train(options.steps - options.steps // 2)
    print(f"at the end: largest sigma {float(expected.max()):.3f}, loss {loss:.3f}")
    print(f"again from the checkpoint, the same bits: {torch.equal(reg.sigma, expected)}")
    return {"sigma": expected, "again": reg.sigma}


if __name__ == "__main__":
    main()
