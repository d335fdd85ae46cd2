"""Steps of an optimizer with surgery on its model and its state between them."""

from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ..support.forked import Forked
from ..support.surgery.operations import Surgery
from ..support.surgery.subject import DTYPES, NAMES, WAYS

names = st.sampled_from(NAMES)
matrices = st.sampled_from([n for n in NAMES if n.endswith(".weight") and n != "norm.weight"])
small = st.integers(0, 9)


def surgery(**arguments):
    """Return a decorator of a rule that is left out where ``Machine.rules`` lacks its name."""

    def decorate(function):
        name = function.__name__
        chosen = precondition(lambda self: self.rules is None or name in self.rules)
        return chosen(rule(**arguments)(function))

    return decorate


class Machine(RuleBasedStateMachine):
    """The subject lives in a process of its own, whose crash is a failure of the example.

    ``rules`` are the names of the rules that may be used, or None; ``ways`` are the optimizers.
    """

    rules: ClassVar[set[str] | None] = None
    ways: ClassVar[list[str]] = list(WAYS)
    examples: ClassVar[int] = 0
    steps: ClassVar[int] = 0
    outcomes: ClassVar[dict[str, int]] = {}

    def __init__(self):
        super().__init__()
        self.process = Forked(Surgery)

    def teardown(self):
        self.process.close()

    def do(self, operation: str, **arguments):
        return self.process.call(operation, **arguments)

    @initialize(
        way=st.deferred(lambda: st.sampled_from(Machine.ways)),
        sizes=st.tuples(
            st.integers(1, 20), st.integers(1, 70),
            st.integers(1, 40) | st.just(4000), st.integers(1, 12),
        ),
        dtype=st.sampled_from(list(DTYPES)), wide_moments=st.booleans(), decoupled=st.booleans(),
        groups=st.integers(1, 3), n_vectors=st.sampled_from([1, 2, 4]),
        exponent=st.sampled_from([2, 1, 3]), tau=st.sampled_from([1.0, 0.7]),
        backend=st.sampled_from(["cpu", "reference"]), at_end=st.booleans(),
        threads=st.integers(1, 2),
    )  # fmt: skip
    def build(self, **setting):
        Machine.examples += 1
        self.do("build", **setting)

    @rule(without=st.sets(names, max_size=3), fresh=st.sampled_from([True, True, True, False]),
          size=st.sampled_from([0.1, 1.0, 1e-3]))  # fmt: skip
    def step(self, without, fresh, size):
        Machine.steps += 1
        outcome = self.do("step", without=without, fresh=fresh, size=size).partition(":")[0]
        Machine.outcomes[outcome] = Machine.outcomes.get(outcome, 0) + 1

    @surgery(name=names, trainable=st.booleans())
    def freeze(self, **how):
        self.do("freeze", **how)

    @surgery(name=st.none() | names, dtype=st.sampled_from(list(DTYPES)), replace=st.booleans())
    def move_dtype(self, **how):
        self.do("move_dtype", **how)

    @surgery(name=names, rows=st.integers(0, 80), cols=st.integers(0, 20),
             state=st.sampled_from(["drop", "keep"]), grad=st.sampled_from(["drop", "keep"]))  # fmt: skip
    def resize(self, **how):
        self.do("resize", **how)

    @surgery(name=names, in_optimizer=st.booleans())
    def replace_parameter(self, **how):
        self.do("replace_parameter", **how)

    @surgery(name=names, other=st.none() | names)
    def swap_tensors(self, **how):
        self.do("swap_tensors", **how)

    @surgery(name=names, other=names, shift=st.none() | small)
    def share_memory(self, **how):
        self.do("share_memory", **how)

    @surgery(name=names, offset=small, keep=st.booleans())
    def free_storage(self, **how):
        self.do("free_storage", **how)

    @surgery(how=st.sampled_from(["clear", "new", "pop", "empty"]), name=names)
    def clear_state(self, **how):
        self.do("clear_state", **how)

    @surgery(name=names, which=st.integers(0, 1), how=st.sampled_from(
        ["zeros", "copy", "dtype", "rows", "fewer", "strides", "expanded", "negative", "gone",
         "weight"]))  # fmt: skip
    def replace_moment(self, **how):
        self.do("replace_moment", **how)

    @surgery(name=names, how=st.sampled_from(["gone", "zero", "late"]))
    def change_step(self, **how):
        self.do("change_step", **how)

    @surgery(group=st.integers(0, 2), lr=st.sampled_from([0.01, 0.0, 0.1]),
             strength=st.sampled_from([0.1, 0.0, 1.0, {"lin.*": 0.0, "*": 0.3}]),
             as_tensor=st.booleans())  # fmt: skip
    def change_options(self, **how):
        self.do("change_options", **how)

    @surgery(set_to_none=st.booleans())
    def zero_grad(self, **how):
        self.do("zero_grad", **how)
