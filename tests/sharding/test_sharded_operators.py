"""Sharded convolutions as operators give the results of whole ones."""

import math

import pytest
from torch.distributed.tensor import Replicate, Shard

from ..support import sharded_operators

WAYS = ["accumulate", "penalty", "attached, decoupled", "adamw", "adamw, decoupled"]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [2, 4])
def test_they_are_as_whole_ones(ranks, world, way):
    for found in ranks(world).call(sharded_operators.compare, (Shard(0),), way):
        assert {n: x for n, x in found.items() if not x < 1e-4} == {}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("placements", [(Shard(1),), (Replicate(), Shard(0)), (Shard(0), Shard(1))])
def test_so_they_are_by_columns_and_with_replicas(ranks, placements):
    for found in ranks(4).call(sharded_operators.compare, placements, "accumulate"):
        assert {n: x for n, x in found.items() if not x < 1e-4} == {}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("flat", [False, True])
def test_checkpoints_have_the_steps_until_the_next_search(ranks, tmp_path, flat):
    for found in ranks(2).call(sharded_operators.resumed, str(tmp_path / "saved"), flat):
        assert found == [23, 23]


@pytest.mark.takes_seconds
def test_norms_are_those_of_whole_kernels(ranks):
    for expected, found in ranks(2).call(sharded_operators.norms, (Shard(0),)):
        assert expected.keys() == found.keys()
        for name, x in expected.items():
            assert math.isclose(found[name], x, rel_tol=1e-3), name
