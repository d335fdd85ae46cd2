"""A small network with gradients of zero and an optimizer: what a step adds is the penalty's."""

import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def zero_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def sgd(model, lr=1.0):
    return torch.optim.SGD(model.parameters(), lr)
