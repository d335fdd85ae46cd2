"""The table of a run: at most MOST_LINES lines, made from the lines of results.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence

from . import figures
from .figures import SHORT, number
from .lines import Line, Results, outcome

MOST_LINES, WIDTH = 60, 118
_MOST_WIDTH = 236  # of a failure: two lines of a terminal
_PROBLEMS = 8  # lines at least for failures and what was left out


def table(lines: Sequence[Line], unreadable: int = 0) -> str:
    """Return the table.

    Args:
        lines: of one run, or of several that went into one folder; the last of each counts.
        unreadable: how many lines could not be read.
    """
    found = Results(lines)
    parts = [_head(found, unreadable), _stages(found), _checks(found)]
    parts += [figures.kernels(found), figures.optimizers(found)]
    parts += [figures.loops(found), _tests(found)]
    text = [line for part in parts for line in part]
    problems = _problems(found, max(MOST_LINES - len(text), _PROBLEMS))
    text = [*text[: MOST_LINES - len(problems)], *problems]
    return "\n".join(line.rstrip() for line in text)


def _head(found: Results, unreadable: int) -> list[str]:
    own = next((x["environment"] for x in found.all if x["what"] == "environment"), {})
    text = []
    if any(line["dry_run"] for line in found.all):
        text.append("DRY RUN on a CPU, tiny cases, interpreted kernels: no figure is a GPU's")
    get = own.get
    device, versions = get("device", "unknown device"), f"torch {get('torch')}"
    if get("capability") is not None:
        device += f" (sm {get('capability')}, driver {get('driver')})"
        versions += f", CUDA {get('cuda')}"
    text.append(f"{device}, {versions}, Triton {get('triton')}, Python {get('python')}")
    text.append(
        f"commit {get('commit', 'unknown')}, sources {get('sources')}, {get('date')}, "
        f"{get('cpus')} processors"
    )
    for stage in ("kernels", "versions"):
        rates = [found.value(stage, f"bandwidth of {name}") for name in ("copy", "read", "add")]
        if rates[0] is not None:
            copy, read, add = map(number, rates)
            text.append(f"memory, GB/s: copy {copy} (read and written), read {read}, add {add}")
            break
    if unreadable:
        text.append(f"cut off: {unreadable} lines could not be read")
    return text


def _stages(found: Results) -> list[str]:
    """Return how the stages ended, several to a line."""
    said = []
    for name in dict.fromkeys(x["stage"] for x in found.all if x["what"] in ("started", "ended")):
        started = found.line(name, "started", (None, None))
        ended = found.line(name, "ended", (None, None))
        if not ended:
            how = "cut off"
        elif ended.get("value") is None:
            how = "not started"
        else:
            how = f"{ended['outcome']}, {ended['value']:.0f} of {started.get('value', 0):.0f} s"
        said.append(f"{name}: {how}")
    return _wrapped("stages", said)


def _wrapped(title: str, said: Sequence[str]) -> list[str]:
    """Join phrases into as few lines as possible."""
    text: list[str] = []
    for phrase in said:
        if text and len(text[-1]) + len(phrase) + 3 <= WIDTH - 2:
            text[-1] += f" | {phrase}"
        else:
            text.append(f"  {phrase}")
    return [title, *text] if text else []


def _checks(found: Results) -> list[str]:
    """Return the checks of each backend that passed, with their dtypes, and that failed."""
    text = []
    for stage in ("triton", "cuda"):
        own = [
            x for x in found.last.values() if x["stage"] == stage and x["dtype"] and not x["case"]
        ]
        for backend in found.backends(stage):
            mine = [x for x in own if x["backend"] == backend]
            said = []
            for how in ("ok", "FAILED", "left out"):
                by_check: dict[str, list[str]] = {}
                for x in mine:
                    if outcome(x) == how:
                        by_check.setdefault(x["what"], []).append(SHORT[x["dtype"]])
                by_dtypes: dict[str, list[str]] = {}
                for what, dtypes in by_check.items():
                    by_dtypes.setdefault(" ".join(dtypes), []).append(what)
                said += [f"{how}: {', '.join(whats)} ({dtypes})"
                         for dtypes, whats in by_dtypes.items()]  # fmt: skip
            text.append(f"  {backend:7}{'; '.join(said)}"[:_MOST_WIDTH])
    compiled = [x for x in found.last.values() if x["stage"] == "compile" and x["backend"]
                and x["value"] is not None and x["what"] != "all compilations"]  # fmt: skip
    seconds = found.value("compile", "all compilations", backend="triton")
    if seconds is not None:
        text.append(f"  {len(compiled)} kernels of Triton compiled in {seconds:.1f} s")
    title = "checks: the reference and the optimizers on a small model, float64 on ragged shapes"
    return [title, *text] if text else []


def _tests(found: Results) -> list[str]:
    said = []
    counts = {what: found.value("tests", f"tests {what}") for what in ("passed", "failed",
                                                                       "skipped")}  # fmt: skip
    if counts["passed"] is not None:
        said.append("tests: " + ", ".join(f"{value} {what}" for what, value in counts.items()))
    for line in found.last.values():
        if line["stage"] == "memcheck" and line["value"] is not None and line["backend"]:
            said.append(f"memcheck {line['backend']}: {line['value']} errors")
    return _wrapped("programs", said)


def _problems(found: Results, room: int) -> list[str]:
    """Return failures, then what was left out, in ``room`` lines; equal reasons share one."""
    own = [line for line in found.last.values() if line.get("reason")]
    own = [*(x for x in own if x["failed"]), *(x for x in own if not x["failed"])]
    by_reason: dict[tuple, list[Line]] = {}
    for x in own:
        by_reason.setdefault((outcome(x), x["stage"], x["reason"]), []).append(x)
    if not own:
        return []
    text = []
    for (kind, stage, reason), members in by_reason.items():
        x = members[0]
        where = [stage, x["backend"], x.get("test") or x["what"], x["case"],
                 SHORT.get(x["dtype"], x["dtype"])]  # fmt: skip
        more = f" (and {len(members) - 1} more)" if len(members) > 1 else ""
        about = " ".join(filter(None, where)) + more
        text.append(f"  {kind}: {about}: {reason}"[:_MOST_WIDTH])
    if len(text) > room - 1:
        rest = len(text) - (room - 2)
        text = [*text[: room - 2], f"  ... and {rest} more: grep reason results.jsonl"]
    return ["what failed or was left out", *text]
