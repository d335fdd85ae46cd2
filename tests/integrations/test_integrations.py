"""Callbacks for trainers of other libraries, on small models."""

import inspect
import math
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import spectral_kernels
from spectral_kernels import SpectralAdamW, SpectralRegularizer, spectral_norms
from spectral_kernels.integrations import session
from tests.support import processes

pytestmark = pytest.mark.usefixtures("seeded")
FOLDER = Path(spectral_kernels.__file__).parent / "integrations"


@pytest.mark.takes_seconds
def test_nothing_of_other_libraries_is_imported_with_the_package():
    done = processes.run(
        "import sys, spectral_kernels, spectral_kernels.cli, spectral_kernels.integrations.session;"
        "slow = 'transformers', 'accelerate', 'lightning', 'triton', 'torch.distributed.tensor';"
        "print([name for name in slow if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_nothing_in_the_package_needs_the_integrations():
    inside = [p for p in FOLDER.parent.rglob("*.py") if p.parent != FOLDER]
    assert not [path for path in inside if "integrations" in path.read_text()]


# --------------------------------------------------------------------------------- transformers


@pytest.fixture
def hf(monkeypatch):
    """transformers, without a network."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return transformers


def gpt2(hf):
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


def vit(hf):
    torch.manual_seed(0)
    return hf.ViTForImageClassification(
        hf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                     intermediate_size=32, patch_size=4, num_labels=3)
    )  # fmt: skip


def tokens(n=48):
    rows = torch.randint(32, (n, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def images(n=48):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3}
            for i in range(n)]  # fmt: skip


def trainer_of(hf, folder, model, data, callbacks, optimizers=(None, None), **arguments):
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2,
        "dataloader_pin_memory": False, **arguments,
    }  # fmt: skip
    return hf.Trainer(
        model=model, args=hf.TrainingArguments(str(folder), **arguments), train_dataset=data,
        callbacks=callbacks, optimizers=optimizers,
    )  # fmt: skip


def callback_of(**arguments):
    from spectral_kernels.integrations.transformers import SpectralCallback

    return SpectralCallback(**arguments)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("build", "data"), [(gpt2, tokens), (vit, images)])
def test_a_trainer_keeps_sigma_down_and_logs_it(hf, tmp_path, build, data):
    largest = {}
    for strength in (0, 10.0):
        callback = callback_of(strength=strength, target=0.1, warmup=50)
        trainer = trainer_of(hf, tmp_path, build(hf), data(), [callback], max_steps=20)
        trainer.train()
        found = [row for row in trainer.state.log_history if "loss" in row]
        assert len(found) == 10
        assert all(math.isfinite(row["spectral/sigma_max"]) for row in found)
        assert found[-1]["spectral/sigma_max"] == float(callback.regularizer.sigma.max())
        assert not any("spectral/sigma_max" in row for row in trainer.state.log_history[10:])
        largest[strength] = found[-1]["spectral/sigma_max"]
    assert largest[10.0] < 0.8 * largest[0]


def test_the_steps_are_those_of_attach(hf, tmp_path):
    callback = callback_of(strength=0.5)
    trainer = trainer_of(
        hf, tmp_path, vit(hf), images(), [callback], max_steps=3, max_grad_norm=0,
        gradient_accumulation_steps=2, lr_scheduler_type="constant", per_device_train_batch_size=3,
    )  # fmt: skip
    batches = []
    step = trainer.training_step
    trainer.training_step = lambda m, x, *a, **k: (batches.append(x), step(m, x, *a, **k))[1]
    trainer.train()
    model = vit(hf)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    reg = SpectralRegularizer(model, 0.5)
    reg.attach(optimizer)
    for i in range(3):
        optimizer.zero_grad()
        for batch in batches[2 * i : 2 * i + 2]:
            (model(**batch).loss / 2).backward()
        optimizer.step()
    torch.testing.assert_close(reg.sigma, callback.regularizer.sigma, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.takes_seconds
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(hf, tmp_path):
    def run(folder, model, resume=None, **arguments):
        callback = callback_of(strength=0.5, target="initial", **arguments)
        trainer = trainer_of(hf, folder, model, tokens(), [callback],
                             save_strategy="steps", save_steps=3)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return callback.regularizer, trainer

    whole, trainer = run(tmp_path / "a", gpt2(hf))
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert (checkpoint / "spectral_kernels.pt").is_file()
    again, resumed = run(tmp_path / "a", gpt2(hf), str(checkpoint))
    elsewhere, _ = run(tmp_path / "b", gpt2(hf), str(checkpoint), resume_from=checkpoint)
    for other in (again, elsewhere):
        assert torch.equal(other.sigma, whole.sigma)
        found, expected = (reg.state_dict()["initial"] for reg in (other, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.warns(UserWarning, match=r"no spectral_kernels.pt in .*checkpoint-3; the vectors"):
        run(tmp_path / "c", gpt2(hf), str(checkpoint))


@pytest.mark.takes_seconds
def test_a_second_training_has_the_penalty_once(hf, tmp_path):
    callback, counts = callback_of(), []
    trainer = trainer_of(hf, tmp_path, gpt2(hf), tokens(), [callback], max_steps=2)
    trainer.train()
    first = callback.regularizer
    buckets = first._buckets
    accumulate = buckets.accumulate_gradients
    buckets.accumulate_gradients = lambda *a: (counts.append(1), accumulate(*a))
    trainer.train()
    assert callback.regularizer is first
    assert len(counts) == 2
    # After the training, steps have no penalty any more.
    trainer.optimizer.step()
    assert len(counts) == 2


@pytest.mark.takes_seconds
def test_a_training_that_was_interrupted_leaves_nothing_in_the_way_of_the_next(hf, tmp_path):
    class Interrupting(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, old = gpt2(hf), callback_of()
    first = trainer_of(hf, tmp_path, model, tokens(), [old, Interrupting()], max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    callback = callback_of()  # as a cell of a notebook that runs again, while ``first`` is there
    trainer_of(hf, tmp_path, model, tokens(), [callback], max_steps=2).train()
    assert not any(step.is_active for step in old.regularizer._buckets.in_steps)
    assert callback.regularizer is not old.regularizer
    assert first.optimizer is not None


@pytest.mark.takes_seconds
def test_the_penalty_of_a_trainer_may_be_decoupled(hf, tmp_path):
    moved = {}
    for decoupled in (False, True):
        callback = callback_of(strength=10.0, target=0.1, decoupled=decoupled)
        trainer = trainer_of(hf, tmp_path, gpt2(hf), tokens(), [callback], max_steps=3)
        trainer.train()
        moved[decoupled] = trainer.model.transformer.h[0].mlp.c_fc.weight.detach()
    assert not torch.equal(moved[False], moved[True])


@pytest.mark.takes_seconds
def test_the_weights_of_a_trainer_may_be_held(hf, tmp_path):
    callback = callback_of(target=0.1, decoupled=True, constraint="sphere")
    trainer = trainer_of(hf, tmp_path, gpt2(hf), tokens(), [callback], max_steps=3,
                         learning_rate=1e-5)  # fmt: skip
    trainer.train()
    norms = spectral_norms(trainer.model.transformer.h)
    assert norms
    assert all(0.09 < sigma < 0.11 for sigma in norms.values())
    with pytest.raises(
        ValueError, match=r"^constraint: expected None with decoupled=False, got 'sphere'"
    ):
        callback_of(constraint="sphere")


@pytest.mark.takes_seconds
def test_callbacks_behind_it_see_the_metrics(hf, tmp_path):
    seen = []

    class Reporter(hf.TrainerCallback):
        def on_log(self, args, state, control, *, logs, **kwargs):
            seen.append(dict(logs))

    trainer = trainer_of(hf, tmp_path, gpt2(hf), tokens(), [Reporter()])
    callback = callback_of(per_layer=True).add_to(trainer)
    trainer.train()
    name = callback.regularizer.names[0]
    assert [f"spectral/sigma/{name}" in logs for logs in seen] == [True, True, True, False]


@pytest.mark.takes_seconds
def test_with_spectral_adamw_it_logs_alone(hf, tmp_path):
    model = gpt2(hf)
    optimizer = SpectralAdamW(model, lr=1e-2, strength=0.1)
    callback = callback_of()
    trainer = trainer_of(hf, tmp_path, model, tokens(), [callback], (optimizer, None),
                         save_strategy="steps", save_steps=3)  # fmt: skip
    trainer.train()
    assert callback.regularizer is optimizer.regularizer
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert logged[-1]["spectral/sigma_max"] == float(optimizer.sigma.max())
    assert not (tmp_path / "checkpoint-3" / "spectral_kernels.pt").exists()
    refused = trainer_of(
        hf, tmp_path, model, tokens(), [callback_of(strength=1.0)], (optimizer, None)
    )
    with pytest.raises(ValueError, match=r"^strength: SpectralAdamW has the penalty in its step"):
        refused.train()


def test_an_argument_that_does_not_exist_is_told_at_once(hf):
    with pytest.raises(TypeError, match=r"^SpectralCallback: .*did you mean 'strength'"):
        callback_of(strenght=1.0)


def test_callbacks_take_every_argument_of_a_regularizer_but_the_model():
    taken = set(typing.get_type_hints(session.RegularizerOptions))
    known = set(inspect.signature(SpectralRegularizer).parameters)
    assert taken == known - {"model"}


@pytest.mark.takes_seconds
def test_two_callbacks_log_under_names_of_their_own(hf, tmp_path):
    callbacks = [callback_of(include=f"*.h.{i}.*", prefix=f"block {i}") for i in range(2)]
    trainer = trainer_of(hf, tmp_path, gpt2(hf), tokens(), callbacks, max_steps=2)
    trainer.train()
    (found,) = (row for row in trainer.state.log_history if "loss" in row)
    for i, callback in enumerate(callbacks):
        assert found[f"block {i}/sigma_max"] == float(callback.regularizer.sigma.max())
    assert "spectral/sigma_max" not in found


# ------------------------------------------------------------------------------------ lightning


@pytest.fixture
def pl():
    """The package lightning."""
    return pytest.importorskip("lightning.pytorch")


def lightning_run(pl, folder, callback, steps=6, resume=None, optimizer=None):
    """Fit a small module; returns it and the trainer."""
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            if optimizer is not None:
                return optimizer(self)
            return torch.optim.Adam(self.parameters(), 1e-2)

    generator = torch.Generator().manual_seed(1)
    # All batches are the same: Lightning repeats one when it goes on from the end of an epoch.
    x = torch.randn(4, 6, generator=generator).repeat(6, 1)
    data = torch.utils.data.TensorDataset(x, torch.arange(4).repeat(6) % 3)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, log_every_n_steps=2, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
        logger=CSVLogger(folder, "log", 0, flush_logs_every_n_steps=1),
        enable_checkpointing=False, gradient_clip_val=0.1,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data, 4), ckpt_path=resume)
    return module, trainer


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*checkpoint directory")
class TestLightning:
    def callback(self, **arguments):
        from spectral_kernels.integrations.lightning import SpectralCallback

        return SpectralCallback(**arguments)

    @pytest.mark.takes_seconds
    def test_the_penalty_is_in_the_steps_and_metrics_go_to_the_loggers(self, pl, tmp_path):
        largest = {}
        for strength in (0, 10.0):
            callback = self.callback(strength=strength, target=0.1, per_layer=True, prefix="mine")
            _, trainer = lightning_run(pl, tmp_path / str(strength), callback, 20)
            rows = trainer.logger.experiment.metrics_file_path
            found = [line.split(",") for line in Path(rows).read_text().splitlines()]
            steps = [row[found[0].index("step")] for row in found[1:]]
            assert steps == [str(n) for n in range(2, 21, 2)]
            assert "mine/sigma/net.0.weight" in found[0]
            last = float(found[-1][found[0].index("mine/sigma_max")])
            assert last == pytest.approx(float(callback.regularizer.sigma.max()))
            largest[strength] = last
        assert largest[10.0] < 0.8 * largest[0]

    def test_checkpoints_carry_the_vectors(self, pl, tmp_path):
        whole = self.callback(strength=0.5, target="initial")
        expected, _ = lightning_run(pl, tmp_path, whole, 12)
        first = self.callback(strength=0.5, target="initial")
        _, trainer = lightning_run(pl, tmp_path, first, 6)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        second = self.callback(strength=0.5, target="initial")
        found, _ = lightning_run(pl, tmp_path, second, 12, tmp_path / "half.ckpt")
        assert torch.equal(second.regularizer.sigma, whole.regularizer.sigma)
        for a, b in zip(expected.parameters(), found.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_after_a_failure_no_penalty_is_left(self, pl, tmp_path):
        class Failing(pl.Callback):
            def on_train_batch_end(self, *args):
                raise RuntimeError("enough")

        callback = self.callback()
        callback.on_train_batch_end = Failing().on_train_batch_end
        with pytest.raises(RuntimeError, match="enough"):
            lightning_run(pl, tmp_path, callback)
        assert not any(step.is_active for step in callback.regularizer._buckets.in_steps)

    @pytest.mark.takes_seconds
    def test_with_spectral_adamw_it_logs_alone(self, pl, tmp_path):
        callback = self.callback()
        _, trainer = lightning_run(
            pl, tmp_path, callback, optimizer=lambda module: SpectralAdamW(module, lr=1e-2)
        )
        assert callback.regularizer is trainer.optimizers[0].regularizer
        assert callback.state_dict() == {}

    @pytest.mark.takes_seconds
    @pytest.mark.parametrize("decoupled", [False, True])
    def test_several_optimizers_of_a_module(self, pl, tmp_path, decoupled):
        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
                self.automatic_optimization = False

            def training_step(self, batch, _):
                optimizers = self.optimizers()
                assert "Lightning" in type(optimizers[0]).__name__
                self.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
                for optimizer in optimizers:
                    optimizer.step()

            def configure_optimizers(self):
                return [torch.optim.SGD(self.net[0].parameters(), 0.1),
                        torch.optim.Adam(self.net[2].parameters(), 0.01)]  # fmt: skip

        data = torch.utils.data.TensorDataset(torch.randn(24, 6), torch.arange(24) % 3)
        found = []
        for strength in (0.0, 0.5):
            callback = self.callback(strength=strength, optimizer=[0, 1], decoupled=decoupled)
            trainer = pl.Trainer(
                accelerator="cpu", max_steps=6, enable_progress_bar=False, logger=False,
                enable_model_summary=False, enable_checkpointing=False, callbacks=[callback],
            )  # fmt: skip
            module = Module()
            trainer.fit(module, torch.utils.data.DataLoader(data, 4))
            found.append([p.detach() for p in module.parameters()])
        assert not any(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert "optimizer" in callback.state_key

    def test_callbacks_of_several_optimizers_have_states_of_their_own(self, pl):
        assert self.callback().state_key != self.callback(optimizer=1).state_key

    def test_an_argument_that_does_not_exist_is_told_at_once(self, pl):
        with pytest.raises(TypeError, match=r"^SpectralCallback: .*did you mean 'per_layer'"):
            self.callback(per_layers=True)

    def test_an_optimizer_that_is_not_there_is_told(self, pl, tmp_path):
        with pytest.raises(
            ValueError, match=r"^optimizer: expected .* module's 1 optimizers, got 3"
        ):
            lightning_run(pl, tmp_path, self.callback(optimizer=3))
