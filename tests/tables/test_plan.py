"""Tables kept in step with the tensors, and what a plan allocates."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from spectral_kernels.backends import choice
from spectral_kernels.selection.rules import select
from spectral_kernels.tables import plan, schema
from spectral_kernels.tables.plan import Plan, rows_of_tiles
from spectral_kernels.tables.state import State
from tests import ROOT

from ..support import cases
from ..support.buckets import bucket_of, cut_as_on_a_gpu, gradients, named_weights
from ..support.layouts import (
    LAYOUTS,
    bucket_in,
    every_layout,
    logical,
    matrices_of,
    module_with,
    oriented,
    strided,
)

pytestmark = pytest.mark.usefixtures("seeded")


# --------------------------------------------------------------------- tensors that move or change


def tables(plan_):
    return plan_.table.tobytes(), plan_.elementwise_table.tobytes()


def test_nothing_changes_while_nothing_moves():
    weights = [torch.randn(7, 5), torch.randn(3)]
    plan_ = bucket_of(weights).plan
    before = tables(plan_)
    assert plan_.bind_weights(weights)
    assert tables(plan_) == before


@every_layout
def test_a_moved_weight_is_followed(backend, layout):
    bucket, weight, _ = bucket_in(layout, backend)
    moved = strided(weight.shape, weight.stride())
    before = bucket.plan.table.copy()
    assert bucket.plan.bind_weights([moved])
    distance = moved.data_ptr() - weight.data_ptr()
    assert distance != 0
    assert (bucket.plan.table["weight"] == before["weight"] + distance).all()
    others = [name for name in before.dtype.names if name != "weight"]
    assert (bucket.plan.table[others] == before[others]).all()
    weight.fill_(math.nan)
    bucket.iterate(1)
    for i, matrix in enumerate(matrices_of(LAYOUTS[layout][0], moved)):
        s = oriented(bucket, i, matrix).double() @ logical(bucket, i, bucket.state.v)
        assert float(bucket.state.sigma[i]) == pytest.approx(float(s.norm()), rel=1e-6)


def test_a_parameter_with_new_data_is_followed(backend):
    layer = nn.Linear(5, 7)
    bucket = bucket_of(layer, backend)
    for parameter in layer.parameters():
        parameter.data = 2 * parameter.data.clone()
    assert bucket.plan.bind_weights([layer.weight, layer.bias])
    assert bucket.plan.table["weight"][0] == layer.weight.data_ptr()
    assert bucket.plan.elementwise_table["weight"][0] == layer.bias.data_ptr()
    bucket.iterate(1)
    s = layer.weight.detach() @ bucket.state.v
    assert float(bucket.state.sigma) == pytest.approx(float(s.norm()), rel=1e-5)
    assert float(bucket.state.norm) == pytest.approx(float(layer.bias.detach().norm()), rel=1e-5)


def test_only_the_moved_weight_gets_another_address():
    weights = [torch.randn(7, 5), torch.randn(4, 4), torch.randn(3)]
    plan_ = bucket_of(weights).plan
    moved = [weights[0], weights[1].clone(), weights[2]]
    assert plan_.bind_weights(moved)
    assert list(plan_.table["weight"]) == [moved[0].data_ptr(), moved[1].data_ptr()]
    assert plan_.elementwise_table["weight"][0] == weights[2].data_ptr()


CHANGES = {
    "rows": lambda w, b: (torch.randn(8, *w.shape[1:]), b),
    "columns": lambda w, b: (torch.randn(6, 4, 3, 5), b),
    "fewer rows of the same memory": lambda w, b: (w[:4], b),
    "sizes in another order": lambda w, b: (w.reshape(6, 3, 4, 2), b),
    "dtype": lambda w, b: (w.bfloat16(), b.bfloat16()),
    "dtype of the vector": lambda w, b: (w, b.double()),
    "device": lambda w, b: (w.to("meta"), b.to("meta")),
    "channels_last": lambda w, b: (w.to(memory_format=torch.channels_last), b),
    "filters apart": lambda w, b: (strided(w.shape, (30, 6, 2, 1)), b),
    "length of the vector": lambda w, b: (w, torch.randn(9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_shape_dtype_device_or_layout_needs_a_new_plan(change):
    module = nn.Conv2d(4, 6, (3, 2))
    plan_ = bucket_of(module).plan
    before, tensors = tables(plan_), plan_.tensors
    weight, bias = module.weight.detach(), module.bias.detach()
    changed = CHANGES[change](weight, bias)
    for _ in range(2):
        assert not plan_.bind_weights(changed)
        assert tables(plan_) == before
        assert plan_.tensors is tensors
    assert plan_.bind_weights([weight, bias])


@pytest.mark.parametrize("kind", ["attention", "in, out", "stack", "stack of splits"])
def test_a_divided_parameter_must_keep_its_shape(kind):
    shape = next(s for k, s, _ in LAYOUTS.values() if k == kind)
    module, options = module_with(kind, torch.randn(shape))
    plan_ = bucket_of(module, **options).plan
    name, before = plan_.refs[0].name, tables(plan_)
    for dim in range(len(shape)):
        for n in (shape[dim] + 3, shape[dim] - 1):
            other = torch.randn(*shape[:dim], n, *shape[dim + 1 :])
            with pytest.raises(ValueError, match=re.escape(f"in the shape {shape}")) as caught:
                plan_.bind_weights([other])
            assert f"'{name}[" in str(caught.value)
            assert f"got shape {tuple(other.shape)}" in str(caught.value)
    assert tables(plan_) == before


@pytest.mark.parametrize("shape", [(), (35,), (7, 5, 1)], ids=str)
def test_a_matrix_must_keep_its_number_of_dimensions(shape):
    plan_ = bucket_of([torch.randn(7, 5)]).plan
    with pytest.raises(
        ValueError, match=r"'0\.weight': expected .* shape \(7, 5\) that was selected"
    ):
        plan_.bind_weights([torch.randn(shape)])


def test_a_weight_moved_to_an_unusable_layout_is_named():
    plan_ = bucket_of([torch.randn(7, 5)]).plan
    with pytest.raises(ValueError, match=r"'0\.weight': expected .*, got .*strides \(10, 2\)"):
        plan_.bind_weights([torch.randn(7, 10)[:, ::2]])


def test_parts_of_a_parameter_share_it_at_different_offsets():
    module, options = module_with("attention", torch.randn(36, 12))
    plan_ = bucket_of(module, **options).plan
    base = module.in_proj_weight.data_ptr()
    assert list(plan_.matrix_ref) == [0, 0, 0]
    assert len(plan_.tensors) == 1
    assert list(plan_.table["weight"]) == [base, base + 4 * 144, base + 4 * 288]
    grad = torch.zeros(36, 15)[:, :12]
    plan_.bind_grads([grad])
    assert list(plan_.table["grad"]) == [grad.data_ptr() + 4 * 12 * 15 * i for i in range(3)]
    assert (plan_.table["grad_row_stride"] == 15).all()
    module, options = module_with("in, out", torch.randn(5, 12))
    plan_ = bucket_of(module, **options).plan
    base = module.weight.data_ptr()
    assert list(plan_.table["weight"]) == [base, base + 4 * 6, base + 4 * 9]


def test_gradients_may_come_and_go_and_move(backend):
    weights = [torch.randn(7, 5), torch.randn(4, 4), torch.randn(3)]
    bucket = bucket_of(weights, backend)
    bucket.iterate(1)
    truth = gradients(bucket)
    for missing in range(3):
        grads = [None if i == missing else torch.zeros_like(w) for i, w in enumerate(weights)]
        gradients(bucket, grads=grads)
        for i in range(3):
            assert i == missing or torch.equal(grads[i], truth[i])
    old = [torch.zeros_like(w) for w in weights]
    gradients(bucket, grads=old)
    saved = [g.clone() for g in old]
    new = [torch.zeros_like(w) for w in weights]
    for i, g in enumerate(gradients(bucket, accumulate=True, grads=new)):
        assert torch.equal(g, truth[i])
        assert torch.equal(old[i], saved[i])


# --------------------------------------------------------------------------- tables and memory


def test_the_compiled_module_has_the_fields_of_the_schema():
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    found = choice.native_module().tables
    assert found == schema.offsets()
    assert sum(map(len, found.values())) > 70


@pytest.mark.parametrize("name", list(schema.STRUCTS))
def test_rows_have_the_fields_of_the_structs_in_order(name):
    source = ROOT / "csrc" / "table.h"
    if not source.exists():
        pytest.skip("the sources of the compiled module are not here")
    text = re.sub(r"//.*", "", source.read_text())
    body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)[1]
    fields = [
        (field.strip(), {"int64_t": "i8", "double": "f8"}[kind])
        for kind, line in re.findall(r"(\w+) ([^;]+);", body)
        for field in line.split(",")
    ]
    fields = [
        (f"{field.partition('[')[0]}_{i}" if "[" in field else field, kind)
        for field, kind in fields
        for i in range(int(field.partition("[")[2][:-1] or 1))
    ]
    assert np.dtype(fields) == schema.STRUCTS[name]


TILED = [(1, 1), (127, 3), (128, 3), (129, 3), (300, 7), (8191, 2), (8192, 2), (8193, 2),
         (20000, 3), (0, 5), (5, 0), (5, 1000)]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_cover_every_row_once(monkeypatch, device):
    if device == "cuda":
        cut_as_on_a_gpu(monkeypatch)
    plan_ = bucket_of([torch.randn(shape) for shape in TILED]).plan
    claimed = np.zeros(plan_.t_partial.numel(), dtype=int)
    for i, layout in enumerate(plan_.layouts):
        first, n = int(plan_.table["first_tile"][i]), int(plan_.table["n_tiles"][i])
        tiles = plan_.tiles[first : first + n]
        assert (tiles["matrix"] == i).all()
        assert n <= 64 or device == "cuda"
        rows = [r for t in tiles for r in range(int(t["row_begin"]), int(t["row_end"]))]
        assert rows == (list(range(layout.rows)) if layout.cols else [])
        assert all(t["row_begin"] < t["row_end"] for t in tiles)
        for tile in tiles:
            claimed[int(tile["t_offset"]) : int(tile["t_offset"]) + layout.cols] += 1
    assert (claimed == 1).all()
    assert plan_.table["n_tiles"].sum() == len(plan_.tiles) == plan_.gram_partial.numel()


def test_tiles_do_not_depend_on_the_number_of_threads(threads):
    found = []
    for n in (1, 2, 7):
        threads(n)
        found.append(bucket_of([torch.empty(shape) for shape in TILED]).plan.tiles.tobytes())
    assert found[0] == found[1] == found[2]


def test_chunks_cover_every_column_once():
    plan_ = bucket_of([torch.randn(shape) for shape in TILED]).plan
    for i, layout in enumerate(plan_.layouts):
        own = plan_.chunks[plan_.chunks["matrix"] == i]["begin"]
        # A matrix without columns has a chunk too, to write its sigma.
        assert list(own) == list(range(0, max(layout.cols, 1), schema.CHUNK_COLUMNS))
    assert (np.diff(plan_.chunks["matrix"]) >= 0).all()
    assert not plan_.arrivals.any()
    assert len(plan_of([torch.randn(7, 5)], r=4).chunks) == 0


# Least number of tiles on a GPU, and largest ratio of the largest tile to the mean.
CUT = {
    "mlp": (20, 1.6), "resnet18": (264, 1.1), "vit_tiny": (264, 1.6), "vit_b": (950, 1.2),
    "gpt2": (1056, 1.2), "many_small": (1000, 1.0), "one_huge": (256, 1.0), "llama_1b": (2048, 2.0),
    "llama_7b": (2112, 2.4),
}  # fmt: skip


@pytest.mark.parametrize("case", cases.CASES)
def test_every_multiprocessor_has_as_much_to_do(case):
    """264 or 528 programs run at once on an H100: each has a tile, or some of about equal size."""
    shapes, (least, worst) = cases.CASES[case](), CUT[case]
    sizes = []
    for (m, n), step in zip(shapes, rows_of_tiles(shapes, "cuda"), strict=True):
        assert 8 <= step <= plan.MOST_ROWS
        assert step % 8 == 0
        sizes += [n * min(step, m - start) for start in range(0, m, step)]
    assert len(sizes) >= least
    assert max(sizes) * len(sizes) / sum(sizes) <= worst
    # The partial t are small beside the weights, or fit into a cache of 50 MB.
    t = 4 * sum(-(-m // step) * n for (m, n), step in zip(shapes, rows_of_tiles(shapes, "cuda"),
                                                          strict=True))  # fmt: skip
    assert t <= max(32e6, 0.04 * 2 * sum(sizes))


@pytest.mark.parametrize("r", [1, 3])
def test_vectors_of_aligned_rows_start_where_four_numbers_are_loaded_at_once(r):
    plan_ = plan_of([torch.randn(shape) for shape in [(9, 3), (7, 8), (300, 5), (200, 12)]], r)
    for i, layout in enumerate(plan_.layouts):
        if layout.cols % 4 == 0:
            first = int(plan_.table["first_tile"][i])
            assert plan_.table["v_offset"][i] % 4 == 0
            assert plan_.tiles["t_offset"][first] % 4 == 0


def plan_of(tensors, r=1):
    found = select(list(named_weights(tensors)), trainable_only=False)
    return Plan(found.matrices, found.elementwise, tensors, r)


@pytest.mark.parametrize("r", [1, 3])
def test_state_has_room_for_r_vectors(r):
    shapes = [(7, 5), (4, 9), (1, 1), (0, 3), (300, 2)]
    tensors = [*(torch.randn(shape) for shape in shapes), torch.randn(6), torch.randn(2)]
    plan_ = plan_of(tensors, r)
    state = State.allocate(plan_, exponent=2)
    m, n = sum(x.rows for x in plan_.layouts), sum(x.cols for x in plan_.layouts)
    assert state.v.shape == state.v_next.shape == (r * n,)
    assert state.s.shape == (r * m,)
    for name, size in {
        "sigmas": 5 * r, "residuals": 5 * r, "norm": 2, "raw_penalty": 7, "strength": 7, "target": 5
    }.items():  # fmt: skip
        assert getattr(state, name).shape == (size,), name
        assert state.header[schema.SLOT[name]] == getattr(state, name).data_ptr()
    assert torch.isnan(torch.cat((state.v, state.v_next, state.s, state.scalars))).all()
    # The parts of the matrices are disjoint and leave nothing over.
    for i, layout in enumerate(plan_.layouts):
        assert state.columns(i, state.v).shape == (r, layout.cols)
        assert state.rows(i).shape == (r, layout.rows)
        assert torch.isnan(state.columns(i, state.v)).all()
        assert torch.isnan(state.rows(i)).all()
        state.columns(i, state.v).fill_(i)
        state.rows(i).fill_(i)
    assert not torch.isnan(torch.cat((state.v, state.s))).any()
    pieces = plan_.table["n_tiles"] * [x.cols for x in plan_.layouts]
    assert plan_.t_partial.numel() == r * pieces.sum()


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_state_is_float32_or_as_wide_as_the_weights(dtype, state_dtype):
    plan_ = plan_of([torch.randn(7, 5).to(dtype), torch.randn(3).to(dtype)])
    state = State.allocate(plan_, exponent=2)
    assert plan_.state_dtype == state_dtype
    for tensor in (state.v, state.v_next, state.s, state.scalars, plan_.t_partial):
        assert tensor.dtype == state_dtype
    assert plan_.gram_partial.dtype == torch.float64


def allocated(*refs):
    """Bytes of all tensors and arrays that the objects hold, weights aside."""
    found = {}
    for ref in refs:
        for value in vars(ref).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, np.ndarray):
                found[id(value)] = value.nbytes
    return sum(found.values())


@pytest.mark.parametrize("shape", [(2000, 2000), (20000, 50), (50, 20000), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_grows_with_rows_plus_columns(shape, dtype):
    weight = torch.empty(shape, dtype=dtype)
    for tensor in (weight, weight.T):
        plan_ = plan_of([tensor])
        state = State.allocate(plan_, exponent=2)
        rows, cols = plan_.layouts[0].rows, plan_.layouts[0].cols
        # v, v_next and at most 64 partial t's; s; scalars, tables and tiles.
        limit = dtype.itemsize * (66 * cols + rows) + 64 * (32 + 8) + 1000
        n = allocated(plan_, state)
        assert 2 * dtype.itemsize * cols < n <= limit
        if weight.numel() > 10**6:
            assert n < 0.1 * weight.nbytes


def test_a_plan_holds_the_tensors_themselves():
    weights = [torch.randn(7, 5), torch.randn(3)]
    plan_ = plan_of(weights)
    assert all(a is b for a, b in zip(plan_.tensors, weights, strict=True))


def test_vectors_have_a_size_and_a_kind():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 5)))
    table = bucket_of(model).plan.elementwise_table
    assert list(table["size"]) == [4, 10, 10]
    assert list(table["kind"]) == [0, 1, 0]
    assert list(table["weight"]) == [
        p.data_ptr() for p in (model[0].bias, model[1].weight, model[1].bias)
    ]


def test_a_plan_of_vectors_alone(backend):
    bias = torch.randn(5)
    bucket = bucket_of([bias], backend)
    bucket.iterate(1)
    (grad,) = gradients(bucket)
    torch.testing.assert_close(grad, 4 * bias.square().sum() * bias)


def test_a_snapshot_keeps_the_gradient_of_its_moment(backend):
    bucket = bucket_of([torch.randn(30, 40), torch.randn(4, 9)], backend)
    bucket.iterate(1)
    snapshot, truth = bucket.state.snapshot(), gradients(bucket)
    bucket.iterate(3)
    bucket.state.strength.fill_(5)
    grads = [torch.full_like(g, math.nan) for g in truth]
    bucket.plan.bind_grads(grads)
    bucket.add_gradient(snapshot, grads, False)
    assert all(torch.equal(a, b) for a, b in zip(grads, truth, strict=True))
    assert not torch.equal(gradients(bucket)[0], truth[0])
