"""attach() to what other libraries make of an optimizer, for a real step of theirs."""

import copy

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.takes_seconds]


def net():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def batches(steps):
    return torch.randn(steps, 5, 6, generator=torch.Generator().manual_seed(1))


def expected_of(model, decoupled, steps=4):
    """Parameters of a copy of ``model`` after steps with the torch optimizer itself."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), 0.01)
    SpectralRegularizer(twin, 0.5).attach(optimizer, decoupled=decoupled)
    for x in batches(steps):
        optimizer.zero_grad()
        twin(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in twin.parameters()]


def same(model, expected):
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_accelerate(decoupled, every):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=every)
    model = net()
    expected = expected_of(model, decoupled)
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    model, optimizer = accelerator.prepare(model, inner)
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    handle = SpectralRegularizer(model, 0.5).attach(optimizer, decoupled=decoupled)
    assert handle.optimizers == [inner]
    for x in batches(4):
        for _ in range(every):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    same(model, expected)


@pytest.mark.parametrize("decoupled", [False, True])
def test_fabric(decoupled):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model = net()
    expected = expected_of(model, decoupled)
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    wrapped, optimizer = fabric.setup(model, inner)
    assert type(optimizer).__name__ == "FabricAdamW"
    handle = SpectralRegularizer(wrapped.module, 0.5).attach(optimizer, decoupled=decoupled)
    assert handle.optimizers == [inner]
    for x in batches(4):
        optimizer.zero_grad()
        fabric.backward(wrapped(x).square().mean())
        optimizer.step()
    same(model, expected)


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*self.trainer")
@pytest.mark.parametrize("decoupled", [False, True])
def test_lightning_in_its_own_loop_and_by_hand(decoupled, tmp_path):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self, by_hand):
            super().__init__()
            self.net, self.automatic_optimization = net(), not by_hand
            self.expected = expected_of(self.net, decoupled)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), 0.01)

        def on_train_start(self):
            optimizer = self.optimizers()
            assert type(optimizer).__name__ == "LightningAdamW"
            self.handle = SpectralRegularizer(self.net, 0.5).attach(optimizer, decoupled=decoupled)
            assert self.handle.optimizers == self.trainer.optimizers

        def training_step(self, x, _):
            loss = self.net(x[0]).square().mean()
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    for by_hand in (False, True):
        module = Module(by_hand)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=4, enable_progress_bar=False, logger=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(batches(4))
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        same(module.net, module.expected)
