"""Figures of a run as rows of text: kernels and steps, optimizers, loops."""

from __future__ import annotations

from collections.abc import Sequence

from .lines import Line, Results

SHORT = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
Rows = list[list[str]]


def number(value: float | None) -> str:
    """Format with about three digits; None is a dash."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _grid(title: str, head: Sequence[str], rows: Rows) -> list[str]:
    """Return a table with aligned columns, or nothing if there are no rows."""
    if not rows:
        return []
    every = [list(head), *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in every
    ]
    return [title, *("  " + line for line in text)]


def _short(where: tuple[str, str]) -> str:
    return f"{where[0]} {SHORT.get(where[1], where[1])}"


def _with_percent(line: Line) -> str:
    if line.get("value") is None:
        return "-"
    return f"{number(line['value'])} {line['percent_of_copy']:3.0f}%"


def kernels(found: Results) -> list[str]:
    """Return a row for each case and backend of the stage."""
    rows = []
    for where in found.where("kernels", "floor"):
        floor = found.line("kernels", "floor", where)
        loop = found.value("kernels", "step", where, "inplace_loop")
        name = _short(where) + ("" if floor.get("cold") else "*")
        beside = _with_percent(floor), number(loop)
        for backend in found.backends("kernels"):

            def get(what, where=where, backend=backend):
                return found.line("kernels", what, where, backend)

            launches = [get(f"{what}_replayed") or get(what) for what in ("gram_matvec", "finish")]
            rows.append([
                name, backend, *map(_with_percent, (*launches, get("step"), get("step_replayed"))),
                number(get("host").get("value")), number(get("first step").get("value")), *beside,
            ])  # fmt: skip
            name, beside = "", ("", "")
    head = ("", "", "gram_matvec", "finish", "step", "replayed", "host", "first s", "floor",
            "in-place loop")  # fmt: skip
    title = ("a step and its two launches: microseconds, % of the copy rate by counted bytes "
             "(*: inputs fit into L2)")  # fmt: skip
    return _grid(title, head, rows)


def _times(value: float | None, unit: float | None) -> str:
    if value is None:
        return "-"
    return number(value) + (f" ({_ratio(value / unit)})" if unit else "")


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def optimizers(found: Results) -> list[str]:
    """Return a row for each case of the stage."""
    rows, ours = [], found.backends("optimizers")
    for where in found.where("optimizers", "AdamW step"):
        values = {name: found.value("optimizers", "AdamW step", where, name)
                  for name in ("torch", *ours, "attached")}  # fmt: skip
        hosts = [number(found.value("optimizers", "host", where, name))
                 for name in ("torch", *ours)]  # fmt: skip
        rows.append([
            _short(where), "", number(values["torch"]),
            *(_times(values[name], values["torch"]) for name in (*ours, "attached")),
            "/".join(hosts),
        ])  # fmt: skip
    head = ("", "", "torch alone", *(f"ours, {name}" for name in ours), "attached",
            "host: torch/" + "/".join(ours))  # fmt: skip
    return _grid("AdamW's step: microseconds (in units of torch's fused one alone)", head, rows)


def loops(found: Results) -> list[str]:
    """Return a row for each case of the stage, and for each variant of ours."""
    ours, rows = found.backends("loops"), []
    eager, compiled = "autograd_loop+inplace_loop", "compiled_loop"
    for where in found.where("loops", "step", "floor"):
        own = [found.line("loops", "step", where, name, eager).get("value") for name in ours]
        best = min((value for value in own if value is not None), default=None)
        beside = [found.line("loops", "step", where, name, compiled).get("value") for name in ours]
        of_compiled = min((value for value in beside if value is not None), default=None)
        loops = [
            _times(found.line("loops", "step", where, name, eager).get("value"), best)
            for name in ("autograd_loop", "inplace_loop")
        ]
        value = found.line("loops", "step", where, compiled, compiled).get("value")
        floor = found.line("loops", "floor", where, None, eager).get("value")
        rows.append([_short(where), "", number(floor), *map(number, own), *loops,
                     _times(value, of_compiled)])  # fmt: skip
    head = ("", "", "floor", *(f"ours, {name}" for name in ours), "autograd", "in-place",
            "compiled")  # fmt: skip
    text = _grid("loops: microseconds (in units of the faster of ours)", head, rows)
    variants = dict.fromkeys(
        x["what"] for x in found.all if x["stage"] == "loops" and "times_one" in x
    )
    for where in found.where("loops", *variants):
        rows = []
        for what in variants:
            own = [found.line("loops", what, where, name, "variants") for name in ours]
            if any(line.get("value") is not None for line in own):
                name = what.removeprefix("step, ").replace("step", "1 vector")
                rows.append([name, "", *(
                    f"{number(x['value'])} ({_ratio(x['times_one'])})" if x else "-" for x in own
                )])  # fmt: skip
        text += _grid(f"vectors and iterations, {_short(where)}: microseconds (in units of one)",
                      ("", "", *ours), rows)  # fmt: skip
    return text
