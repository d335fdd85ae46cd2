"""Draw examples: ``python -m tests.properties --examples N``; see tests/properties/__init__.py."""

import argparse
import sys
import time

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from ..support.surgery.operations import Surgery
from .machine import Machine


def settings(examples: int, seed: int | None, shrink: bool) -> hypothesis.settings:
    """Return hypothesis's settings; without a seed the examples are the same at every run."""
    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]
    return hypothesis.settings(
        max_examples=examples, derandomize=seed is None, database=None, deadline=None,
        stateful_step_count=20, suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False, phases=phases,
    )  # fmt: skip


def main() -> int:
    """Run them; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.properties", description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, help="of the examples; default: always the same ones")
    parser.add_argument("--rules", help="kinds of surgery, separated by commas; default: all")
    parser.add_argument("--ways", help="optimizers, separated by semicolons; default: all")
    parser.add_argument("--no-shrink", action="store_true", help="print a failure as it was found")
    given = parser.parse_args()
    if given.rules is not None:
        Machine.rules = set(given.rules.split(","))
    if given.ways is not None:
        Machine.ways = given.ways.split(";")
    # What torch imports at the first use, for all processes.
    first = Surgery()
    first.build()
    first.step(without=(), fresh=True, size=1.0)
    start, machine = time.monotonic(), Machine
    if given.seed is not None:
        machine = hypothesis.seed(given.seed)(Machine)
    failed = False
    try:
        run_state_machine_as_test(machine, settings=settings(given.examples, given.seed, not given.no_shrink))
    except Exception as error:
        failed = True
        print(error, *getattr(error, "__notes__", ()), sep="\n")
    print(f"{Machine.examples} examples, {Machine.steps} steps {Machine.outcomes}, "
          f"seed {given.seed}, {time.monotonic() - start:.0f} s: "
          f"{'failed' if failed else 'passed'}")  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
