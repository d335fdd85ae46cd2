"""Sharded rows, shifts and gains with targets give the results of whole ones."""

import math

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from ..support import sharded_rows

WORLDS = (2, 4)
WAYS = ["accumulate", "accumulate, above", "penalty", "attached, decoupled", "attached, cap",
        "attached, sphere", "adamw", "adamw, decoupled", "adamw, cap", "adamw, sphere"]  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("target", "exponent"), [(0.7, 2), ("initial", 2.5)])
@pytest.mark.parametrize("world", WORLDS)
def test_they_are_as_whole_ones(ranks, world, target, exponent, way):
    for found in ranks(world).call(sharded_rows.compare, (Shard(0),), target, exponent, way):
        assert {n: x for n, x in found.items() if not x < 2e-5} == {}


@pytest.mark.takes_seconds
def test_so_they_are_on_a_mesh_with_replicas(ranks):
    placements = (Replicate(), Shard(0))
    for found in ranks(4).call(sharded_rows.compare, placements, "initial", 2, "adamw"):
        assert {n: x for n, x in found.items() if not x < 2e-5} == {}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("world", [1, *WORLDS])
def test_initial_targets_are_those_of_whole_parameters(ranks, world):
    for (expected, found), value, result, raw in ranks(world).call(
        sharded_rows.initial, (Shard(0),)
    ):
        assert expected.keys() == found.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)
        assert value < 1e-6
        assert result == ([], [])
        torch.testing.assert_close(*raw, rtol=1e-3, atol=1e-6)


def test_a_row_that_is_not_finite_shows_on_every_rank(ranks):
    for sigma, penalty, other in ranks(2).call(sharded_rows.not_finite):
        assert not math.isfinite(sigma)
        assert not math.isfinite(penalty)
        assert math.isfinite(other)


@pytest.mark.parametrize("dim", [2, 3])
def test_rows_in_pieces_are_refused_by_name(ranks, dim):
    for said in ranks(2).call(sharded_rows.cut, dim):
        assert "parameter 'kernel': expected placements Shard(0) and Replicate" in said
        assert "leave it out with exclude" in said
