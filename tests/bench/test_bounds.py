"""The benchmark of bounds: its language, runs and reports."""

import itertools
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from bench.bounds import __main__ as cli
from bench.bounds import language, report, train
from spectral_kernels import spectral_norms

pytestmark = pytest.mark.usefixtures("seeded", "one_thread")


@pytest.fixture
def one_thread():
    """Undo the process-wide setting of a run."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_seed_decides_about_a_language():
    def text(seed):
        return language.Language(seed).text(500, np.random.default_rng(3))

    assert torch.equal(text(0), text(0))
    assert not torch.equal(text(0), text(1))
    assert int(text(0).max()) < language.VOCABULARY


def test_words_can_be_predicted_from_their_beginning():
    own = language.Language(0)
    tokens = own.text(20_000, np.random.default_rng(0)).tolist()
    pairs = {}
    for a, b in itertools.pairwise(tokens):
        pairs.setdefault(a, {}).setdefault(b, 0)
        pairs[a][b] += 1
    likely = sum(max(after.values()) for after in pairs.values()) / len(tokens)
    assert 0.2 < likely < 0.9


HIDDEN = {"*.attn.*": 1.0, "*.mlp.*": 1.0, "*": 0.0}


@pytest.mark.parametrize(("held", "decay", "expected"), [
    ("free", 0.0, {}), ("decay", 0.1, {}),
    ("cap 2", 0.0, {"constraint": "cap", "target": 2.0, "n_vectors": 1, "strength": 1.0}),
    ("cap 2 of 16", 0.0, {"constraint": "cap", "target": 2.0, "n_vectors": 16, "strength": 1.0}),
    ("sphere mup", 0.0, {"constraint": "sphere", "target": "mup", "n_vectors": 1, "strength": 1.0}),
    ("cap mup of 16, hidden", 0.0,
     {"constraint": "cap", "target": "mup", "n_vectors": 16, "strength": HIDDEN}),
    ("above 0.1", 0.0, {"side": "above", "target": "initial", "strength": 0.1}),
])  # fmt: skip
def test_what_holds_the_weights(held, decay, expected):
    assert train.options(held) == (decay, expected)


def test_hidden_matrices_are_held_alone():
    model = train.gpt2(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (own,) = train.built(model, train.Key("adamw", 0.0, "sphere mup, hidden", 0, 1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    own.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".attn.c" in name or ".mlp.c" in name if
                       name.endswith("weight")}  # fmt: skip


def test_the_learning_rate_rises_and_falls():
    rates = [train.rate(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.2)
    assert 0.1 < rates[-1] < 0.11


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_held_weights_are_those_of_every_optimizer(optimizer):
    model = train.gpt2(0)
    lr = train.RATES[optimizer][0]
    for one in train.built(model, train.Key(optimizer, lr, "sphere 0.5", 0, 1)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        one.step()
    norms = spectral_norms(model.transformer.h)
    assert norms
    assert all(0.4 < sigma < 0.55 for sigma in norms.values()), norms


@pytest.mark.takes_seconds
def test_a_run_and_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "HELD", ("free", "cap 1"))
    monkeypatch.setattr(cli, "MORE", {})
    monkeypatch.setattr(cli, "HIDDEN", {"adamw": (), "muon": ("sphere 1, hidden",)})
    monkeypatch.setattr(cli, "FINE", ("above 0.1",))
    keys = cli.keys(1, 20)
    assert [key.optimizer for key in keys] == [
        "adamw", "adamw", *["muon"] * 3, "fine-tuning", *["adamw"] * 2, *["muon"] * 2,
    ]  # fmt: skip
    chosen = keys[1], keys[5]
    with (tmp_path / "runs.jsonl").open("w") as file:
        for key in chosen:
            found = train.run(key, tmp_path)
            assert found["step"] == [0, 20]
            assert found["loss"][1] < found["loss"][0]
            again = report.key_of(json.loads(json.dumps(found)))
            assert again == key
            place = {"commit": "c", "torch": "t", "processor": "p", "date": "d"}
            file.write(json.dumps(found | place) + "\n")
    assert cli.main(["--out", str(tmp_path), "--report"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| cap 1 | 1 |" in text
    assert "first language before, after" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"adamw-0.002.png", "fine-tuning-0.001.png"}
