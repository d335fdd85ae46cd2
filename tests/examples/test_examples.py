"""Each example with few steps: that it runs, and that what it shows is so."""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

from tests import ROOT, TIMEOUT

pytestmark = pytest.mark.takes_seconds
FOLDER = ROOT / "examples"


def example(name, *needs):
    """The module of an example, if the packages that it needs are there."""
    for package in needs:
        pytest.importorskip(package)
    return importlib.import_module(f"examples.{name}")


def largest(name, strength, *needs, option="--strength", key="sigma_max", more=()):
    """The largest sigma after an example with a strength."""
    found = example(name, *needs).main([*more, option, str(strength)])
    return float(found[key])


def test_every_example_is_short_listed_and_says_its_command():
    paths = sorted(FOLDER.glob("*.py"))
    assert len(paths) == 8
    table = (FOLDER / "README.md").read_text()
    for path in paths:
        text = path.read_text()
        assert len(text.splitlines()) <= 120, path
        said = ast.get_docstring(ast.parse(text))
        assert re.search(rf"^    (python|torchrun .*) examples/{path.name}", said, re.M), path
        assert f"[{path.name}]({path.name})" in table


def test_ppo_holds_the_critic():
    options = {"option": "--critic-strength", "key": "critic/sigma_max", "more": ["--steps", "4"]}
    found = [largest("ppo", strength, "gymnasium", **options) for strength in (0, 1.0)]
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_an_agent_of_stable_baselines3_is_held_before_and_after_it_is_loaded(way, capsys):
    more = ["--steps", "1024", *(["--optimizer"] if way == "optimizer" else [])]
    needs = "stable_baselines3", "gymnasium"
    found = [largest("stable_baselines3_ppo", x, *needs, more=more) for x in (0, 10.0)]
    assert found[1] < 0.9 * found[0]
    assert ("vectors of 6 matrices" in capsys.readouterr().out) == (way == "callback")


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_fine_tuning_stays_near_the_first_sigma(way, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = ["--steps", "20", *(["--optimizer"] if way == "optimizer" else [])]
    needs = "transformers", "accelerate"
    found = [largest("hf_trainer", x, *needs, key="moved", more=more) for x in (0, 10.0)]
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("way", ["attach", "optimizer"])
def test_accelerate_goes_on_from_its_checkpoint_with_the_same_bits(way):
    module = example("accelerate_loop", "accelerate")
    more = ["--steps", "30", *(["--optimizer"] if way == "optimizer" else [])]
    found = module.main(more)
    assert torch.equal(found["sigma"], found["again"])
    assert float(found["sigma"].max()) < float(
        module.main([*more, "--strength", "0"])["sigma"].max()
    )


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*LeafSpec")
def test_lightning_holds_the_discriminator():
    found = [largest("lightning_two_optimizers", x, "lightning", key="discriminator/sigma_max",
                     more=["--steps", "60"]) for x in (0, 10.0)]  # fmt: skip
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("more", [[], ["--constraint", "cap"], ["--constraint", "sphere"]])
def test_muon_is_held(more):
    more = ["--steps", "80", "--target", "1.0", *more]
    free = largest("muon_adamw", 0, more=more)
    held = largest("muon_adamw", 10.0, more=more)
    assert held < (0.9 if "--constraint" in more else 0.95) * free  # one value per step, see there


def test_growing_heads_are_regularized():
    module = example("growing_heads")
    few = ["--tasks", "3", "--steps", "100"]
    held, free = (module.main([*few, "--strength", x]) for x in ("0.1", "0"))
    assert held["shapes"]["1.classifier.weight"] == (6, 64)
    for own, other in zip(held["tasks"], free["tasks"], strict=True):
        assert own["sigma_max"] < other["sigma_max"]
    apart = module.main([*few, "--heads"])["shapes"]
    assert [name for name in apart if name.startswith("1.")] == [f"1.{i}.weight" for i in range(3)]


def fsdp2(ranks, *arguments):
    """Largest sigma that were printed: when loaded, in steps, when saved."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(ranks), "examples/fsdp2.py", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return [float(x) for x in re.findall(r"largest(?: sigma_1)? ([\d.]+)", done.stdout)]


@pytest.mark.slow
def test_two_ranks_agree_with_one_and_load_what_it_saved(tmp_path):
    few = "--steps", "11", "--checkpoint"
    one, two = (fsdp2(n, *few, str(tmp_path / str(n))) for n in (1, 2))
    assert len(one) == 3  # steps 0 and 10, and when saved
    assert one == pytest.approx(two, rel=1e-3)
    again = fsdp2(1, *few, str(tmp_path / "2"))
    assert again[0] == pytest.approx(two[-1], abs=2e-6)
