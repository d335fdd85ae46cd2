"""The report's figures: which are drawn, and what they show."""

import struct

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from bench.report import plots
from bench.report.results import Result, Run

TIMES = {"autograd_loop": 3e-3, "cpu": 1e-3, "stacked_bmm": 20e-3, "floor": 0.9e-3,
         "floor_read": 0.3e-3}  # fmt: skip
NETS = [("1e5", 50), ("1e6", 50), ("1e7", 50), ("1e7", 1), ("1e7", 500), ("1e7", 200)]
BARS = ["bars_penalty_step_float32_cpu.png", "bars_penalty_step_bfloat16_cuda.png",
        "bars_autograd_float32_cpu.png", "bars_optimizer_step_bfloat16_cpu.png"]  # fmt: skip
SCALING = ["scaling_weights_cpu.png", "scaling_layers_cpu.png"]
MEMORY = ["memory_cpu.png"]


def result(suite, case, contender, median, dtype="float32", device="cpu", threads=2, **info):
    name = {"cpu": "AMD EPYC", "cuda": "NVIDIA H100"}[device]
    return Result(suite, case, dtype, name, threads, contender, median, {"device": device, **info})


def steps(suite, **where):
    sizes = {"mlp": 99_400, "resnet18": 11_690_000}
    return [
        result(suite, case, name, time * weights / 1e7, weights=weights, matrices=4, **where)
        for case, weights in sizes.items()
        for name, time in TIMES.items()
    ]


def scaling():
    # As in bench: the weights are squares, so that their number is not quite the nominal one.
    return [
        result("scaling", f"{weights} in {matrices}", name, time * float(weights) / 1e7,
               threads=threads, weights=matrices * round((float(weights) / matrices) ** 0.5) ** 2,
               matrices=matrices)
        for weights, matrices in NETS
        for threads in (1, 2)
        for name, time in TIMES.items()
    ]  # fmt: skip


def memory():
    return [
        result("memory", case, name, 0.1, weights=weights, peak_bytes=peak, matrices=4, sides=100)
        for case, weights in (("mlp", 99_400), ("vit_b", 86_300_000))
        for name, peak in (("cpu", 300_000), ("reference", 0), ("autograd_loop", 10**9))
    ]


def training():
    return [result("training_step", "mlp", name, 0.1, batch=32) for name in ("without", "attach")]


def optimizers():
    times = {"torch_adamw": 0.9e-3, "spectral_adamw": 1e-3, "attach": 1.6e-3, "loop": 5e-3}
    return [result("optimizer_step", "vit_b", name, 8.66 * time, "bfloat16", weights=86_600_000)
            for name, time in times.items()]  # fmt: skip


def everything():
    return [
        *training(), *memory(), *scaling(), *steps("autograd"), *steps("penalty_step"),
        *steps("penalty_step", dtype="bfloat16", device="cuda"), *optimizers(),
    ]  # fmt: skip


def run_of(results):
    return Run("AMD EPYC", "torch 2.13.0", "0123456789", "2026-11-23", results)


def figure_of(name, results):
    return dict(plots.pictures(run_of(results)))[name]


def visible(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.takes_seconds
def test_every_picture_is_written_in_order(tmp_path):
    names = plots.draw(run_of(everything()), tmp_path)
    assert names == BARS + SCALING + MEMORY
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    for name in names:
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        assert 500 < width < 2000, name
        assert 200 < height < 1500, name
        assert len(data) > 10_000, name


@pytest.mark.takes_seconds
@pytest.mark.parametrize("cases", [{"mlp"}, {"resnet18", "vit_b"}, {"mlp", "resnet18", "vit_b"}])
def test_nothing_is_cut_at_the_edge(cases):
    results = [r for r in everything() if r.case in cases or r.suite == "scaling"]
    for name, figure in plots.pictures(run_of(results)):
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, name


def test_training_steps_alone_draw_nothing(tmp_path):
    assert plots.draw(run_of(training()), tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        pytest.param(lambda r: not r.contender.startswith("floor"), BARS + SCALING + MEMORY,
                     id="no floor"),
        pytest.param(lambda r: r.contender != "cpu", BARS + SCALING + MEMORY, id="no ours"),
        pytest.param(lambda r: r.contender in ("cpu", "spectral_adamw"), BARS + SCALING + MEMORY,
                     id="ours alone"),
        pytest.param(lambda r: r.contender == "floor", SCALING, id="floor alone"),
        pytest.param(lambda r: (r.case, r.contender) != ("resnet18", "cpu"),
                     BARS + SCALING + MEMORY, id="ours not in every case"),
        pytest.param(lambda r: r.case in ("resnet18", "vit_b", "1e7 in 50"), BARS + MEMORY,
                     id="one case"),
    ],
)  # fmt: skip
def test_parts_that_are_missing_are_left_out(kept, expected, tmp_path):
    results = [r for r in everything() if kept(r)]
    assert plots.draw(run_of(results), tmp_path) == expected


def test_bars_are_cut_at_eight_times_ours_and_carry_values():
    mlp, resnet = visible(figure_of(BARS[0], steps("penalty_step")))
    assert mlp.get_title() == "mlp, 99.4 k weights"
    assert resnet.get_title() == "resnet18, 11.7 M weights"
    labels = [label.get_text() for label in mlp.get_yticklabels()]
    assert labels == ["ours (C++)", "per-layer autograd loop", "equal shapes stacked for bmm"]
    # 1, 3 and 20 ms per 10 M weights
    assert [bar.get_width() for bar in mlp.patches] == pytest.approx([9.94, 29.82, 8 * 9.94])
    assert [bar.get_width() for bar in resnet.patches] == pytest.approx([1.169, 3.507, 8 * 1.169])
    assert texts(mlp) == ["9.94 µs", "29.8 µs   3.0x", "199 µs   20x", "floor 8.95 µs"]
    assert texts(resnet) == ["1.17 ms", "3.51 ms   3.0x", "23.4 ms   20x", "floor 1.05 ms"]
    own, *others = (to_hex(bar.get_facecolor()) for bar in resnet.patches)
    assert own not in others
    assert len(set(others)) == 1


def test_the_optimizers_bars_are_relative_to_ours():
    panel, = visible(figure_of(BARS[3], optimizers()))  # fmt: skip
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["ours, SpectralAdamW", "torch's fused AdamW alone", "ours, attached",
                      "per-layer autograd loop, then torch's"]  # fmt: skip
    assert texts(panel) == ["8.66 ms", "7.79 ms   0.9x", "13.9 ms   1.6x", "43.3 ms   5.0x"]


def test_a_contender_that_one_case_lacks_is_marked():
    results = [r for r in steps("autograd") if (r.case, r.contender) != ("mlp", "stacked_bmm")]
    mlp, resnet = visible(figure_of(BARS[2], results))
    assert "not measured" in texts(mlp)
    assert "not measured" not in texts(resnet)
    assert len(mlp.patches) == len(resnet.patches) - 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [(SCALING[0], [1e5, 1e6, 1e7]), (SCALING[1], [1, 50, 200, 500])],
)
def test_scaling_draws_the_nets_that_differ_in_one_size(name, expected):
    figure = figure_of(name, scaling())
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["float32, 1 thread", "float32, 2 threads"]
    for axes in figure.axes:
        lines = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) > 2]
        assert len(lines) == len(TIMES) - 1  # without floor_read
        for x in lines:
            assert list(x) == pytest.approx(expected, rel=0.02)


def test_the_reference_line_is_proportional_and_meets_the_largest_net():
    axes = figure_of(SCALING[0], scaling()).axes[0]
    line, = (line for line in axes.lines if len(line.get_xdata()) == 2)  # fmt: skip
    (x0, x1), (y0, y1) = line.get_data()
    assert y1 == pytest.approx(1.0)  # ms, ours at 10 M weights
    assert y1 / y0 == pytest.approx(x1 / x0)


def test_memory_leaves_tiny_cases_out_and_gives_megabytes():
    panel, = visible(figure_of(MEMORY[0], memory()))  # fmt: skip
    assert panel.get_title() == "vit_b, float32 (345 MB)"
    assert texts(panel)[:3] == ["0.3 MB", "0 MB", "1000 MB"]
    dots = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "o"]
    assert dots == pytest.approx([0.0869, 0.01, 289.7], rel=0.01)  # percent of the weights
