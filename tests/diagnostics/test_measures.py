"""Effective rank, gradient diversity, spectra, dormant units and accuracy."""

import math

import pytest
import torch
from torch import nn

from spectral_kernels import diagnostics

from ..support import models

pytestmark = pytest.mark.usefixtures("seeded")


def net(**options):
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4), **options)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_effective_rank_counts_equal_values(n):
    values = torch.cat((torch.full((n,), 0.3), torch.zeros(5)))
    assert float(diagnostics.effective_rank(values)) == pytest.approx(n)


def test_effective_rank_of_a_batch_by_its_definition():
    values = torch.rand(3, 8) ** 4
    found = diagnostics.effective_rank(values)
    for row, rank in zip(values.double(), found, strict=True):
        p = row / row.sum()
        assert float(rank) == pytest.approx(math.exp(-float((p * p.log()).sum())))
    assert float(diagnostics.effective_rank(torch.zeros(4))) == 0


def test_gradient_diversity_is_the_rank_of_gradients_taken_one_by_one():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
                          nn.Dropout(0.5), nn.Linear(48, 5))  # fmt: skip
    model(torch.randn(30, 1, 6, 6))
    model[5].bias.requires_grad_(False)
    x, y = torch.randn(12, 1, 6, 6), torch.randint(5, (12,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = diagnostics.gradient_diversity(model, x, y, chunk_size=5)
    assert model.training
    assert model[4].training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    model.eval()
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    truth = diagnostics.effective_rank(torch.linalg.svdvals(torch.stack(rows).double()))
    assert found == pytest.approx(float(truth), rel=1e-4)


def test_gradient_diversity_of_the_same_example_is_one():
    x, y = torch.randn(1, 6).expand(9, 6), torch.zeros(9, dtype=torch.long)
    assert diagnostics.gradient_diversity(net(), x, y) == pytest.approx(1, abs=1e-4)


def test_gradient_diversity_at_its_ends():
    model = net()
    x = torch.randn(5, 6)
    loss = lambda outputs, y: 0 * outputs.sum()  # noqa: E731
    assert diagnostics.gradient_diversity(model, x, torch.zeros(5), loss) == 0
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert math.isnan(diagnostics.gradient_diversity(model, x, torch.zeros(5).long()))
    for inputs, targets in [(x[:0], x[:0]), (x, torch.zeros(4))]:
        with pytest.raises(ValueError, match="expected equally many examples"):
            diagnostics.gradient_diversity(model, inputs, targets)


def test_gradient_diversity_with_another_loss():
    model = nn.Linear(3, 1, bias=False)
    x, y = torch.eye(3), torch.randn(3, 1)
    # Gradients of a linear model at orthogonal inputs are orthogonal; their lengths are errors.
    errors = (model(x) - y).abs().flatten().detach()
    found = diagnostics.gradient_diversity(model, x, y, nn.functional.mse_loss)
    assert found == pytest.approx(float(diagnostics.effective_rank(errors)), rel=1e-4)


def test_spectra_against_what_they_are_made_of():
    values = torch.tensor([3.0, 2.0, 2.0, 0.5])
    u, v = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64))[0] for n in (9, 4))
    weight = (u * values) @ v.mT
    found = diagnostics.spectra([("w", weight), ("zero", torch.zeros(3, 5))])
    assert found["w"].sigma_max == pytest.approx(3)
    assert found["w"].sigma_min == pytest.approx(0.5)
    assert found["w"].stable_rank == pytest.approx(float((values**2).sum()) / 9)
    assert found["w"].effective_rank == pytest.approx(float(diagnostics.effective_rank(values)))
    assert found["w"].norm == pytest.approx(float(values.norm()))
    assert found["zero"] == (0, 0, 0, 0, 0)


def test_spectra_of_a_model_are_those_of_its_matrices():
    model = models.mixed()
    found = diagnostics.spectra(model)
    assert {name: s.sigma_max for name, s in found.items()} == pytest.approx(
        diagnostics.spectral_norms(model), rel=2e-4
    )
    some = diagnostics.spectra([("w", torch.tensor([[1.0, math.inf]])), ("e", torch.ones(0, 4))])
    assert all(map(math.isnan, some["w"]))
    assert some["e"] == (0, 0, 0, 0, 0)
    with pytest.raises(TypeError, match=r"spectra: expected a known keyword, got 'biases'"):
        diagnostics.spectra(model, biases=True)


def test_dormant_units_are_those_that_do_not_react():
    model = net()
    with torch.no_grad():
        model[0].bias[:7] = -1e3
        model[0].weight[7] = 0
        model[0].bias[7] = 1e-4
    x = torch.randn(64, 6)
    assert diagnostics.dormant_units(model, x) == {"1": (8, 20)}
    assert diagnostics.dormant_units(model, x, threshold=0) == {"1": (7, 20)}
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    assert diagnostics.dormant_units(model, x, threshold=0)["1"].dormant == 20


def test_dormant_units_of_convolutions_tokens_and_modules_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(1, 5, 3), nn.GELU()
            self.linear, self.drop = nn.Linear(5, 7), nn.Dropout(0.9)

        def forward(self, x):
            x = self.act(self.conv(x))
            return self.act(self.linear(self.drop(x.flatten(2).mT)))

    model = Twice()
    with torch.no_grad():
        model.conv.weight[2] = 0
        model.conv.bias[2] = 0
        model.linear.weight[:3] = 0
        model.linear.bias[:3] = 0
    found = diagnostics.dormant_units(model, torch.randn(8, 1, 6, 6))
    assert found == {"act": (1, 5), "act#2": (3, 7)}
    assert model.drop.training
    assert not model.act._forward_hooks


def test_dormant_units_want_modules_and_a_threshold():
    with pytest.raises(ValueError, match="model: expected activations that are modules"):
        diagnostics.dormant_units(nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"threshold: expected .*, got -1"):
        diagnostics.dormant_units(net(), torch.ones(1, 6), threshold=-1)


def test_weight_norm_is_that_of_all_parameters():
    model = net()
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert diagnostics.weight_norm(model) == pytest.approx(float(whole.norm()))


def test_accuracy_counts_the_right_ones_in_batches():
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(3))
    x = torch.randn(50, 3)
    y = x.argmax(1)
    y[:20] = (y[:20] + 1) % 3
    assert diagnostics.accuracy(model, x, y, batch_size=7) == pytest.approx(0.6)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0
    with pytest.raises(ValueError, match=r"expected .* examples, .*, got 50 and 3"):
        diagnostics.accuracy(model, x, y[:3])
