"""The table of what a run on a GPU has measured, whatever happened to it."""

from bench import on_gpu
from bench.gpu import inputs, table
from bench.gpu.lines import FILE, Lines, read


def full(folder):
    """Lines of a run in which everything was measured, and much failed."""
    lines = Lines(folder, "run", False)
    lines.put("environment", None, None, environment={"device": "NVIDIA H100", "torch": "2.11"})
    what = {"kernels": ("gram_matvec_replayed", "finish_replayed", "step", "step_replayed", "host"),
            "optimizers": ("AdamW step", "host"), "loops": ("step", 'step, "auto"')}  # fmt: skip
    for name in on_gpu.SECONDS:
        lines = Lines(folder, name, False)
        lines.put("started", 30.0, "s")
        lines.put("bandwidth of copy", 3000.0, "GB/s")
        for case, dtype in inputs.KERNELS:
            where = {"case": case, "dtype": dtype}
            if name == "kernels":
                lines.put("floor", 50.0, "us", **where, percent_of_copy=99.0, cold=case != "mlp")
            for backend in ("triton", "cuda", "torch", "attached"):
                for one in what.get(name, ()):
                    more = {"beside": "autograd_loop+inplace_loop"} if one == "step" else {}
                    more = more if name == "loops" else {"percent_of_copy": 73.4}
                    if "auto" in one:
                        more = {"beside": "variants", "times_one": 3.25}
                    lines.put(one, 79.125, "us", backend=backend, **where, **more)
                lines.failed("group", f"{case} {name} " + 100 * "long ", backend=backend, **where)
        if name in ("cuda", "triton"):
            for dtype in ("float32", "bfloat16", "float16"):
                lines.put("1 vector", 0.5, "s", dtype=dtype, backend=name)
            lines.failed("4 vectors", "sigma is wrong", dtype="float16", backend=name)
        lines.put("ended", 29.0, "s", outcome="ok")
    return read(folder)


def test_the_table_is_short_whatever_happened(tmp_path):
    lines, _ = full(tmp_path)
    text = table.table(lines)
    assert len(text.splitlines()) <= 60
    assert len(text) < 11_000
    assert "llama_1b bf16" in text
    assert "79.1  73%" in text
    assert "kernels: ok, 29 of 30 s" in text
    assert "ok: 1 vector (fp32 bf16 fp16); FAILED: 4 vectors (fp16)" in text
    assert "FAILED: build triton group vit_b bf16 (and 7 more): vit_b build" in text
    assert "more: grep reason results.jsonl" in text
    assert "DRY RUN" not in text


def test_the_table_of_a_file_that_was_cut_off(tmp_path, capsys):
    full(tmp_path)
    whole = (tmp_path / FILE).read_text()
    where = whole.index('"stage": "optimizers"')
    (tmp_path / FILE).write_text(whole[: where + 40])
    assert on_gpu.main([str(tmp_path), "--table"]) == 0
    text = capsys.readouterr().out
    assert "cut off: 1 lines could not be read" in text
    assert "kernels: ok" in text
    assert "optimizers:" not in text
    assert "79.1  73%" in text


def test_the_table_of_a_stage_that_was_cut_off(tmp_path):
    Lines(tmp_path, "loops", False).put("started", 30.0, "s")
    assert "loops: cut off" in table.table(read(tmp_path)[0])


def test_a_table_without_lines(tmp_path):
    assert "unknown device" in table.table(*read(tmp_path))
