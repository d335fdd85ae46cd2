"""Sharded weights give the results of unsharded ones: sigma, penalty, gradients, training."""

import re

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from spectral_kernels import SpectralRegularizer
from tests import TIMEOUT
from tests.support import sharded_models, sharded_runs
from tests.support.ranks import Ranks

WORLDS = (2, 4)


def within(results, limit=1e-6):
    """Assert that no quantity deviates by more than ``limit`` on any rank, gradients by 10 times.

    A gradient has the factor sigma^k - target^k, which amplifies the error of sigma.
    """
    for found in results:
        limits = {name: 10 * limit if name == "grad" else limit for name in found}
        assert {k: v for k, v in found.items() if not v <= limits[k]} == {}, found


@pytest.mark.takes_seconds
@pytest.mark.parametrize("placement", sharded_models.PLACEMENTS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_placement(ranks, world, placement):
    for way in ("accumulate", "penalty"):
        within(ranks(world).call(sharded_runs.compare, placement, way, {}))


@pytest.mark.takes_seconds
@pytest.mark.parametrize("way", ["accumulate", "penalty"])
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_sums_over_one_rank(ranks, backend, way):
    """With NCCL this is all that a single GPU can test."""
    if backend == "nccl" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for n_vectors in (1, 4):
        options = {"n_vectors": n_vectors}
        within(ranks(1, backend).call(sharded_runs.compare_alone, "fsdp", way, options), 1e-5)


VIEW_PLACEMENTS = [
    (Shard(0),), (Shard(1),), (Shard(2),), (Shard(0), Replicate()), (Shard(0), Shard(1)),
    (Shard(1), Shard(0)), (Shard(1), Shard(2)), (Shard(0), Shard(0)), (Replicate(), Replicate()),
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"n_vectors": 4}, {"target": "0.5*mup"}], ids=str)
@pytest.mark.parametrize("placements", VIEW_PLACEMENTS, ids=str)
def test_every_view_by_every_dimension(ranks, placements, options):
    limit = 1e-6 if "n_vectors" not in options else 1e-5
    within(ranks(4).call(sharded_runs.compare_views, placements, (), options), limit)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("options", [
    {"n_vectors": 2}, {"n_vectors": 8}, {"n_power_iterations": 3}, {"n_power_iterations": "auto"},
    {"n_vectors": 4, "n_power_iterations": "auto"}, {"exponent": 1, "target": 0.5},
    {"target": "0.5*mup"},
])  # fmt: skip
@pytest.mark.parametrize(("placement", "backend"), [
    ("fsdp", "cpu"), ("tensor parallel", "cpu"), ("fsdp and tensor parallel", "cpu"),
    ("fsdp and tensor parallel", "reference"),
])  # fmt: skip
def test_every_option(ranks, placement, backend, options):
    options = {**options, "backend": backend}
    limit = 1e-6 if "n_vectors" not in options else 1e-5
    within(ranks(4).call(sharded_runs.compare, placement, "accumulate", options), limit)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("way", [
    "attach", "decoupled", "accumulate", "penalty", "SpectralAdamW", "SpectralSGD",
    "SpectralAdamW, cap", "SpectralSGD, sphere", "SpectralAdamW, cap of 4", "attach, cap of 4",
])  # fmt: skip
@pytest.mark.parametrize("placement", ["fsdp", "tensor parallel", "fsdp and tensor parallel"])
def test_training_has_the_same_losses(ranks, placement, way):
    for alone, sharded in ranks(4).call(sharded_runs.losses, placement, way, 20):
        torch.testing.assert_close(torch.tensor(sharded), torch.tensor(alone), rtol=1e-5, atol=0)
        assert alone[-1] < alone[0]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("n_vectors", [1, 4])
@pytest.mark.parametrize(("kind", "flat"), [
    ("SpectralRegularizer", False), ("SpectralAdamW", False), ("SpectralAdamW", True),
    ("SpectralSGD", False), ("SpectralSGD", True),
])  # fmt: skip
def test_checkpoints_go_from_two_ranks_to_four_to_one_and_to_none(
    ranks, tmp_path, kind, n_vectors, flat
):
    """Flat is the optimizer's state; initial targets, which take long to measure, one by one."""
    target = "initial" if n_vectors == 1 else 0.9
    arguments = str(tmp_path / "saved"), kind, "fsdp", n_vectors, target, flat, 3
    before, after, weights = ranks(2).call(sharded_runs.saved, *arguments)[0]
    alone = str(tmp_path / "saved"), kind, None, n_vectors, target, flat, 3
    others = ranks(4).call(sharded_runs.loaded, *arguments)
    others += [sharded_runs.loaded(*alone), *ranks(1).call(sharded_runs.loaded, *arguments)]
    for at_start, at_end, trained in others:
        for name, v in before.items():
            assert torch.equal(at_start[name], v)
        for name, v in after.items():
            torch.testing.assert_close(at_end[name], v, rtol=1e-3, atol=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(trained[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.takes_seconds
def test_vectors_are_saved_while_weights_are_gathered(ranks):
    found = ranks(2).call(sharded_runs.evaluated_and_saved)
    assert found[0] == found[1]
    assert sum("spectral_vectors" in names or "spectral_vectors[q]" in names
               for names in found[0]) == 10  # fmt: skip


@pytest.mark.parametrize("placement", ["fsdp", "hsdp", "tensor parallel"])
def test_float64(ranks, placement):
    within(ranks(4).call(sharded_runs.compare, placement, "penalty", {}, torch.float64), 1e-12)


@pytest.mark.takes_seconds
def test_bfloat16(ranks):
    for placement in ("fsdp", "tensor parallel"):
        for found in ranks(4).call(sharded_runs.compare, placement, "penalty", {}, torch.bfloat16):
            assert found.pop("grad") < 0.01  # rounded to eight bits, one way or the other
            within([found])


@pytest.mark.parametrize("way", ["accumulate", "SpectralAdamW"])
@pytest.mark.parametrize("n_vectors", [1, 4])
@pytest.mark.parametrize("placement", ["fsdp", "hsdp", "fsdp, not resharded"])
def test_two_collectives_per_step_whatever_the_number_of_matrices(ranks, placement, n_vectors, way):
    for blocks in (1, 4):
        for counts, seen, sizes in ranks(4).call(
            sharded_runs.counted, placement, blocks, n_vectors, way
        ):
            (v,), (matrices,), (vectors,) = (sizes[n] for n in ("v", "matrices", "vectors"))
            assert counts == {"c10d.allreduce_": 2}
            numbers = n_vectors**2 * matrices + 2 * vectors
            assert seen == [("allreduce_", 4 * v), ("allreduce_", 8 * numbers)]


@pytest.mark.takes_seconds
def test_collectives_of_tensor_parallel_layers(ranks):
    counts = []
    for blocks in (1, 4):
        found, seen, sizes = ranks(4).call(
            sharded_runs.counted, "tensor parallel", blocks, 1, "accumulate"
        )[0]
        # Rows are sharded: t, then scalars. Columns are sharded: s before them.
        _, rows, columns, _ = zip(*(sizes[n] for n in ("v", "s")), strict=True)
        bytes_of = sorted(size for _, size in seen)
        assert sorted((4 * rows[0], 4 * columns[0], 4 * columns[1])) == bytes_of[-3:]
        counts.append(found)
    assert counts == [{"c10d.allreduce_": 5}] * 2


@pytest.mark.takes_seconds
@pytest.mark.parametrize("n_vectors", [1, 4])
@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1), Shard(0))], ids=str)
def test_norms_of_sharded_weights(ranks, placements, n_vectors):
    for found, truth in ranks(4).call(sharded_runs.norms, placements, n_vectors):
        for name, sigma in truth.items():
            assert found[name] == pytest.approx(sigma, rel=3e-4, abs=1e-4)


def test_metrics_are_those_of_whole_matrices_and_the_first_rank_logs(ranks, tmp_path):
    path = tmp_path / "run.csv"
    for alone, found in ranks(2).call(sharded_runs.metrics, str(path)):
        # Heads are measured of whole weights alone: ranks need not call metrics() together.
        assert "spectral/attention_max" in alone
        alone = {name: value for name, value in alone.items() if "/attention" not in name}
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert [line.partition(",")[0] for line in path.read_text().splitlines()] == ["step", "1"]


@pytest.mark.takes_seconds
def test_check_ranks_finds_what_has_come_apart(ranks):
    for what in ("replicas", "replicas of shards", "vectors", "strength", "target"):
        said = ranks(4).call(sharded_runs.come_apart, what)
        assert [before for before, _ in said] == [""] * 4
        assert "'inputs.weight'" in said[3][1]
        assert "differ between ranks 3 and" in said[3][1]
    assert ranks(4).call(sharded_runs.come_apart, "seeds") == [["", ""]] * 4
    said = ranks(2).call(sharded_runs.come_apart, "names")
    assert "different matrices" in said[0][0]


@pytest.mark.parametrize("change", ["sharded", "gathered", "by another dimension"])
def test_another_placement_is_noticed(ranks, change):
    within(ranks(4).call(sharded_runs.resharded, change), 1e-5)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("FSDP1", r"FullyShardedDataParallel \(FSDP1\).*fully_shard \(FSDP2\)"),
        ("second derivatives", r"'inputs.weight' is sharded.*create_graph"),
        ("partial", r"'head.weight': expected placements Shard and Replicate, got .*Partial"),
        ("other ranks", r"'head.weight' lies on .*which this rank is not part of"),
        ("column by column", r"'head.weight': expected a contiguous or channels_last shard"),
        ("in a graph", r"only penalty\(\) of parameters that are not sharded"),
        ("plain gradient", r"gradient of parameter 'head.weight': expected a DTensor"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(ranks, what, says):

    assert re.search(says, ranks(4).call(sharded_runs.refused, what)[3])


@pytest.mark.takes_seconds
def test_compiled_functions_call_the_penalty_between_two_graphs(ranks):
    within(ranks(2).call(sharded_runs.between_graphs))


def test_placeholders_of_zero_3_are_refused():
    model = torch.nn.Linear(3, 4)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"DeepSpeed's ZeRO-3.*fully_shard"):
        SpectralRegularizer(model)


def test_a_gradient_that_is_yet_to_be_summed(ranks):
    for found, truth in ranks(2).call(sharded_runs.partial_gradient):
        torch.testing.assert_close(found, truth)


@pytest.mark.takes_seconds
def test_a_rank_that_dies_leaves_an_error_and_no_hang():
    group = Ranks(2, timeout=10)
    try:
        for pipe in group.pipes:
            pipe.send(("tests.support.sharded_runs:dies", (1,)))
        assert group.pipes[0].poll(TIMEOUT), "it hangs"
        kind, said = group.pipes[0].recv()
        assert kind == "returned"
        assert said != "nothing"
    finally:
        group.close()
