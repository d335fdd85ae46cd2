"""Draw examples of both properties: ``python -m tests.properties --examples N``.

A failure is printed with the smallest example that hypothesis finds. ``--rules resize,load`` limits
the surgery between steps. ``--each`` draws nothing: it does every kind of surgery by itself. With
``--jobs J`` as many processes share the examples, with seeds from ``--seed`` on.
"""

import argparse
import subprocess
import sys
import time
import warnings

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from ..support.surgery.operations import Surgery
from ..support.surgery.subject import BACKENDS
from . import singles
from .machine import OPERATIONS, Machine
from .shapes import Shapes, penalties_are_right

STEPS = 12  # rules per example of the state machine, at most


def main() -> int:
    """Run them; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.properties", description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="how many of each property")
    parser.add_argument("--only", choices=("surgery", "shapes"), help="one of the properties")
    parser.add_argument("--seed", type=int, help="of the examples; default: always the same ones")
    parser.add_argument("--rules", help="kinds of surgery, separated by commas; default: all")
    parser.add_argument("--ways", help="optimizers, separated by semicolons; default: all")
    parser.add_argument("--each", action="store_true", help="every kind by itself instead")
    parser.add_argument("--no-shrink", action="store_true", help="print a failure as it was found")
    parser.add_argument("--jobs", type=int, default=1, help="processes to share the examples")
    given = parser.parse_args()
    if given.jobs > 1:
        if given.seed is None or given.each:
            parser.error("--jobs: it shares examples that are drawn with --seed")
        return share(given)
    warnings.filterwarnings("ignore", "the penalty makes the step of SGD unstable", RuntimeWarning)
    Machine.ways = given.ways.split(";") if given.ways else Machine.ways
    rules = given.rules.split(",") if given.rules else None
    if unknown := set(rules or ()) - set(OPERATIONS):
        parser.error(f"--rules: expected some of {', '.join(OPERATIONS)}, got {sorted(unknown)}")
    # What torch imports at the first use, for all processes. One thread: a fork has no others.
    first = Surgery()
    first.build()
    first.step(without=(), fresh=True, size=1.0)
    if not given.each:
        passed = [] if given.only == "surgery" or rules else [shapes_pass(given)]
        passed += [] if given.only == "shapes" else [surgery_passes(given, rules)]
        return int(not all(passed))
    return int(not singles.report(Machine.ways, rules or OPERATIONS, BACKENDS))


def share(given: argparse.Namespace) -> int:
    """Run this program ``given.jobs`` times with an equal part of the examples each."""
    jobs, arguments = [], sys.argv[1:]
    for i in range(given.jobs):
        own = ["--jobs", "1", "--seed", str(given.seed + i)]
        own += ["--examples", str(-(-given.examples // given.jobs))]
        command = [sys.executable, "-m", "tests.properties", *arguments, *own]
        jobs.append(subprocess.Popen(command))
    return int(any([job.wait() for job in jobs]))


def surgery_passes(given: argparse.Namespace, rules: list[str] | None) -> bool:
    """Run examples of the state machine, and print what :func:`report` does."""
    Machine.chosen, Machine.counts = rules, {}
    machine = Machine if given.seed is None else hypothesis.seed(given.seed)(Machine)
    what = "all surgery" if rules is None else ", ".join(rules)
    return report(given, f"steps with {what}", Machine.counts,
                  lambda x: run_state_machine_as_test(machine, settings=x))  # fmt: skip


def shapes_pass(given: argparse.Namespace) -> bool:
    """Do the same for the penalty of any weights."""
    Shapes.counts.clear()
    test = penalties_are_right
    if given.seed is not None:
        test = hypothesis.seed(given.seed)(test)
    return report(given, "penalties of any weights", Shapes.counts, lambda x: x(test)())


def report(given: argparse.Namespace, what: str, counts: dict[str, int], run) -> bool:
    """Call ``run(settings)``, and print its failures and figures."""
    phases = [hypothesis.Phase.generate, *([] if given.no_shrink else [hypothesis.Phase.shrink])]
    settings = hypothesis.settings(
        max_examples=given.examples, derandomize=given.seed is None, database=None, deadline=None,
        stateful_step_count=STEPS, suppress_health_check=list(hypothesis.HealthCheck),
        phases=phases, print_blob=False,
    )  # fmt: skip
    start, failures = time.monotonic(), []
    try:
        run(settings)
    except Exception as error:
        failures = getattr(error, "exceptions", [error])
    for each in failures:
        print(each, *getattr(each, "__notes__", ()), "", sep="\n")
    figures = ", ".join(f"{n} {name}" for name, n in counts.items())
    seed = "always the same examples" if given.seed is None else f"seed {given.seed}"
    print(f"{what}: {figures}; {seed}; {time.monotonic() - start:.0f} s: "
          f"{'FAILED' if failures else 'passed'}\n", flush=True)  # fmt: skip
    return not failures


if __name__ == "__main__":
    sys.exit(main())
