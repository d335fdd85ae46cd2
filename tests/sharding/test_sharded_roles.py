"""Groups, stacks and zero gains of a sharded model are those of the whole one."""

import pytest
from torch.distributed.tensor import Replicate, Shard

from ..support import sharded_roles


@pytest.mark.takes_seconds
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("placements", [(Shard(0),), (Replicate(),)], ids=str)
def test_they_are_as_whole_ones(ranks, world, placements):
    for far, skipped in ranks(world).call(sharded_roles.compare, placements):
        assert {n: x for n, x in far.items() if not x < 2e-5} == {}
        assert skipped["offset.weight"].startswith("a gain that is zero")
        assert skipped["pos_embed"].startswith("a position")


@pytest.mark.takes_seconds
def test_transposed_groups_in_pieces_are_refused_by_name(ranks):
    for said in ranks(2).call(sharded_roles.transposed):
        assert "'0.weight': expected a whole one, as it is a transposed convolution" in said
        assert "exclude" in said
