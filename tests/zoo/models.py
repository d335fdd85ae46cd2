"""Small models of public libraries with random weights, built from their configurations."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tomllib
import torch
from torch import nn

MODELS: dict[str, Callable[[], nn.Module]] = {}  # "library model" -> what builds it
ARGUMENTS = tomllib.loads(Path(__file__).with_name("models.toml").read_text())


def of_timm(name):
    import timm

    return timm.create_model(name)


def of_torchvision(name):
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def of_transformers(name):
    import transformers

    own = dict(ARGUMENTS["transformers"][name])
    model, config = (getattr(transformers, own.pop(key)) for key in ("model", "config"))
    return model(config(**{**ARGUMENTS["like"].get(own.pop("like", None), {}), **own}))


def of_diffusers(name):
    return getattr(importlib.import_module("diffusers"), name)(**ARGUMENTS["diffusers"][name])


def of_geometric(name):
    import torch_geometric.nn as g

    return {
        "ChebConv": lambda: g.ChebConv(8, 6, K=3),
        "GAT": lambda: g.GAT(8, 16, 2, 4, heads=2, v2=True),
        "GCN": lambda: g.GCN(8, 16, 2, 4, norm="batch"),
        "GIN": lambda: g.GIN(8, 16, 2, 4),
        "GraphSAGE": lambda: g.GraphSAGE(8, 16, 2, 4),
        "RGCNConv": lambda: g.RGCNConv(8, 6, num_relations=3),
        "SchNet": lambda: g.SchNet(16, 16, 2),
        "TransformerConv": lambda: g.TransformerConv(8, 6, heads=2, edge_dim=3),
    }[name]()


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def noisy_dqn():
    import torchrl.modules as rl

    return rl.MLP(in_features=4, out_features=2, num_cells=[8, 8], layer_class=rl.NoisyLinear)


def sac_loss():
    import torchrl.modules as rl
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.objectives import SACLoss

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), NormalParamExtractor())
    actor = rl.ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]), in_keys=["loc", "scale"],
        distribution_class=rl.TanhNormal, return_log_prob=True,
    )  # fmt: skip
    critic = rl.ValueOperator(Critic(), in_keys=["observation", "action"])
    return SACLoss(actor, critic, num_qvalue_nets=2, action_spec=None, target_entropy=-2.0)


def of_baselines(algorithm, **arguments):
    algorithm = getattr(importlib.import_module("stable_baselines3"), algorithm)
    return algorithm("MlpPolicy", "Pendulum-v1", device="cpu", **arguments).policy


def of_x_transformers(**arguments):
    import x_transformers as x

    layers = x.Decoder(dim=64, depth=2, heads=4, **arguments)
    return x.TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers)


for _library, _build, _names in (
    ("timm", of_timm, ARGUMENTS["timm"]),
    ("transformers", of_transformers, ARGUMENTS["transformers"]),
    ("diffusers", of_diffusers, ARGUMENTS["diffusers"]),
    ("torchvision", of_torchvision, ARGUMENTS["torchvision"]),
    ("torch_geometric", of_geometric, (
        "ChebConv", "GAT", "GCN", "GIN", "GraphSAGE", "RGCNConv", "SchNet", "TransformerConv",
    )),
):  # fmt: skip
    MODELS |= {f"{_library} {_name}": partial(_build, _name) for _name in _names}
MODELS |= {
    "torchrl NoisyLinear": noisy_dqn,
    "torchrl SACLoss": sac_loss,
    "stable_baselines3 PPO gSDE": partial(of_baselines, "PPO", use_sde=True),
    "stable_baselines3 SAC": partial(of_baselines, "SAC"),
    "x_transformers qk norm": partial(
        of_x_transformers, attn_qk_norm=True, attn_qk_norm_dim_scale=True
    ),
    "x_transformers rmsnorm": partial(of_x_transformers, use_rmsnorm=True),
}
