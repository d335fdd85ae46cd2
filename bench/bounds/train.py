"""Training and fine-tuning under one way to hold the weights, with measurements over the steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from spectral_kernels import SpectralAdamW, SpectralRegularizer, spectral_norms

from .language import VOCABULARY, Language

LENGTH, BATCH = 128, 8
EVERY = 20  # steps between two measurements
RATES = {"adamw": (2e-3, 8e-3), "muon": (0.02, 0.08)}  # the second: four times the first
WIDTH, LAYERS, HEADS = 192, 4, 4
FINE_TUNING = "fine-tuning"
FEW, FINE_RATE = 64, 1e-3  # sequences to be fine-tuned on; lr


class Key(NamedTuple):
    """Identifies a run."""

    optimizer: str  # "adamw", "muon", or FINE_TUNING, which is by AdamW
    lr: float
    held: str  # see ``built``
    seed: int
    steps: int


def gpt2(seed: int) -> GPT2LMHeadModel:
    """Return a GPT-2 of two million weights, without dropout."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def options(held: str) -> tuple[float, dict]:
    """Return the weight decay and the arguments of the regularizer of one way.

    "free"; "decay", of 0.1; "cap 2", "sphere mup" and so on, a constraint and its target, and "of
    16" vectors, and ", hidden" where it is for matrices of attention and MLPs alone, not for gains
    and the embedding, which is the head too; or the penalty of a side, target "initial" and
    strength, such as "above 0.01".
    """
    held, _, scope = held.partition(", ")
    first, _, rest = held.partition(" ")
    rest, _, vectors = rest.partition(" of ")
    if first in ("free", "decay"):
        return (0.1 if first == "decay" else 0.0), {}
    if first in ("cap", "sphere"):
        target = rest if rest in ("mup", "initial") else float(rest)
        strength = {"*.attn.*": 1.0, "*.mlp.*": 1.0, "*": 0.0} if scope else 1.0
        return 0.0, {"constraint": first, "target": target, "n_vectors": int(vectors or 1),
                     "strength": strength}  # fmt: skip
    return 0.0, {"side": first, "target": "initial", "strength": float(rest)}


def built(model: nn.Module, key: Key) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a run, the regularizer inside of them."""
    decay, chosen = options(key.held)
    if key.optimizer != "muon":
        if chosen:
            return [SpectralAdamW(model, key.lr, weight_decay=0.0, decoupled=True, **chosen)]
        return [torch.optim.AdamW(model.parameters(), key.lr, weight_decay=decay)]
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or ".h." not in name]
    found = [torch.optim.Muon(hidden, key.lr, weight_decay=decay),
             torch.optim.AdamW(others, RATES["adamw"][0], weight_decay=decay)]  # fmt: skip
    if chosen:
        constraint = chosen.pop("constraint", None)
        reg = SpectralRegularizer(model, chosen.pop("strength", 1.0), **chosen)
        reg.attach(found, decoupled=True, constraint=constraint)
    return found


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the next token, in nats."""
    return model(tokens, labels=tokens).loss


class Watch:
    """The largest absolute activation of the residual stream, and attention logit, of one batch."""

    def __init__(self, model: GPT2LMHeadModel):
        self.activation = self.logit = 0.0
        self._hooks = [block.attn.c_attn.register_forward_hook(self._products)
                       for block in model.transformer.h]  # fmt: skip
        self._hooks += [block.register_forward_hook(self._stream) for block in model.transformer.h]

    def _stream(self, block, inputs, output) -> None:
        x = output[0] if isinstance(output, tuple) else output
        self.activation = max(self.activation, float(x.abs().max()))

    def _products(self, layer, inputs, output) -> None:
        queries, keys, _ = output.unflatten(2, (3, HEADS, -1)).unbind(2)
        logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
        self.logit = max(self.logit, float(logits.tril().abs().max()))

    def remove(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def measured(model: GPT2LMHeadModel, tokens: torch.Tensor) -> dict[str, float]:
    """Return held-out loss, and the largest sigma_1, activation and logit."""
    watch = Watch(model)
    loss = float(loss_of(model, tokens))
    watch.remove()
    sigma = max(spectral_norms(model.transformer.h, rtol=1e-3).values())
    return {"loss": loss, "sigma": sigma, "activation": watch.activation, "logit": watch.logit}


def rate(step: int, steps: int) -> float:
    """Return the share of lr: up over 5 % of the steps, then a cosine down to a tenth."""
    up = max(1, steps // 20)
    if step < up:
        return (step + 1) / up
    return 0.55 + 0.45 * math.cos(math.pi * (step - up) / max(1, steps - up))


def train(model, key: Key, batches: Iterable[torch.Tensor], held_out: torch.Tensor) -> dict:
    """Take the steps; return lists with one entry per measurement, and seconds of the steps."""
    optimizers = built(model, key)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, key.steps))
                 for o in optimizers]  # fmt: skip
    found: dict[str, list[float]] = {"step": [0], **{k: [v] for k, v in
                                     measured(model, held_out).items()}}  # fmt: skip
    seconds = 0.0
    for step, tokens in zip(range(1, key.steps + 1), batches, strict=False):
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, tokens).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - start
        if step % EVERY == 0:
            found["step"].append(step)
            for name, value in measured(model, held_out).items():
                found[name].append(value)
    return found | {"seconds": seconds}


def run(key: Key, folder: Path) -> dict:
    """Return the key and the measurements of a run; data and first weights are those of its seed.

    Fine-tuning starts from a network that was trained freely on another language with as many
    steps; it is kept in ``folder``. "before" is the loss on the first language.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(key.seed)
    language = Language(key.seed)
    held_out = language.batch(32, LENGTH, np.random.default_rng(10_000 + key.seed))
    model = gpt2(key.seed)
    if key.optimizer != FINE_TUNING:
        batches = (language.batch(BATCH, LENGTH, rng) for _ in range(key.steps))
        return key._asdict() | train(model, key, batches, held_out)
    first = Key("adamw", RATES["adamw"][0], "decay", key.seed, key.steps)
    path = folder / f"first-{key.seed}-{key.steps}.pt"
    if not path.exists():
        batches = (language.batch(BATCH, LENGTH, rng) for _ in range(key.steps))
        train(model, first, batches, held_out)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), unfinished)
        unfinished.rename(path)
    model.load_state_dict(torch.load(path))
    second = Language(1000 + key.seed)
    few = second.batch(FEW, LENGTH, rng)
    after = second.batch(32, LENGTH, np.random.default_rng(20_000 + key.seed))
    chosen = (few[torch.from_numpy(rng.permutation(FEW)[:BATCH])] for _ in range(key.steps))
    with torch.no_grad():
        before = [float(loss_of(model, held_out))]
    found = train(model, key, chosen, after)
    with torch.no_grad():
        before.append(float(loss_of(model, held_out)))
    return key._asdict() | found | {"before": before}
