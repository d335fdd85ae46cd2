"""Steps of an optimizer with surgery on its model and its state between them."""

from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ..support.forked import Forked
from ..support.surgery.operations import Surgery
from ..support.surgery.subject import BACKENDS, DTYPES, NAMES, WAYS

names = st.sampled_from(NAMES)
dtypes = st.sampled_from(list(DTYPES))
few = st.integers(0, 9)


def one_of(*values):
    """Return a strategy of these values, the simplest one first."""
    return st.sampled_from(values)


def surgery(operation: str, **arguments):
    """Return the rule of an operation, left out where ``Machine.chosen`` lacks it.

    ``then`` says how many steps with gradients everywhere follow.
    """

    def operate(self, then, **how):
        self.process.call(operation, **how)
        for _ in range(then):
            self.take_step(without=(), fresh=True, size=1.0)

    operate.__name__ = operate.__qualname__ = operation
    limited = precondition(lambda self: self.chosen is None or operation in self.chosen)
    return limited(rule(**arguments, then=one_of(1, 0, 2))(operate))


class Machine(RuleBasedStateMachine):
    """The subject lives in a process of its own, whose crash is a failure of the example.

    ``chosen`` are the operations that may be used, or None; ``ways`` are the optimizers.
    """

    chosen: ClassVar[set[str] | None] = None
    ways: ClassVar[list[str]] = list(WAYS)
    counts: ClassVar[dict[str, int]] = {}

    def __init__(self):
        super().__init__()
        self.process = Forked(Surgery)

    def teardown(self):
        self.process.close()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def take_step(self, **how):
        self.count("steps")
        self.count(self.process.call("step", **how).partition(":")[0])

    @initialize(
        way=st.deferred(lambda: st.sampled_from(Machine.ways)),
        sizes=st.tuples(
            st.integers(1, 20), st.integers(1, 70),
            st.integers(1, 40) | st.just(4000), st.integers(1, 12),
        ),
        dtype=dtypes, wide_moments=st.booleans(), decoupled=st.booleans(),
        groups=st.integers(1, 3), n_vectors=one_of(1, 2, 4), exponent=one_of(2, 1, 3),
        tau=one_of(1.0, 0.7), backend=one_of(*BACKENDS), at_end=st.booleans(),
        threads=one_of(1, 2),
    )  # fmt: skip
    def build(self, **setting):
        self.count("examples")
        self.process.call("build", **setting)

    @rule(without=st.sets(names, max_size=3), fresh=one_of(True, True, True, False),
          size=one_of(1.0, 1e-3))  # fmt: skip
    def step(self, **how):
        self.take_step(**how)

    freeze = surgery("freeze", name=names, trainable=st.booleans())
    move_dtype = surgery("move_dtype", name=names | st.none(), dtype=dtypes, replace=st.booleans())
    resize = surgery(
        "resize", name=names, rows=st.integers(0, 80), cols=st.integers(0, 20),
        state=one_of("drop", "keep"), grad=one_of("drop", "keep"),
    )  # fmt: skip
    place = surgery(
        "place", name=names,
        how=one_of("inside", "columns", "gaps", "mixed", "expanded", "negative"),
    )  # fmt: skip
    replace_parameter = surgery("replace_parameter", name=names, in_optimizer=st.booleans())
    replace_module = surgery("replace_module", name=names, in_optimizer=st.booleans())
    swap_tensors = surgery("swap_tensors", name=names, other=st.none() | names)
    share_memory = surgery("share_memory", name=names, other=names, shift=st.none() | few)
    free_storage = surgery("free_storage", name=names, offset=few, keep=st.booleans())
    edit = surgery("edit", name=names, tracked=st.booleans())
    give_gradient = surgery(
        "give_gradient", name=names,
        how=one_of("plain", "contiguous", "columns", "gaps", "mixed", "expanded", "negative",
                   "dtype", "weight", "freed", "shared"),
    )  # fmt: skip
    zero_grad = surgery("zero_grad", set_to_none=st.booleans())

    clear_state = surgery("clear_state", how=one_of("clear", "new", "pop", "empty"), name=names)
    replace_moment = surgery(
        "replace_moment", name=names, which=one_of(0, 1),
        how=one_of("zeros", "copy", "dtype", "rows", "fewer", "strides", "expanded", "negative",
                   "gone", "weight", "moment", "freed"),
    )  # fmt: skip
    change_step = surgery("change_step", name=names, how=one_of("gone", "zero", "late"))
    change_options = surgery(
        "change_options", group=one_of(0, 1, 2), lr=one_of(0.01, 0.0, 0.1),
        strength=one_of(0.1, 0.0, 1.0, {"lin.*": 0.0, "*": 0.3}), as_tensor=st.booleans(),
    )  # fmt: skip
    change_momentum = surgery(
        "change_momentum", group=one_of(0, 1, 2), momentum=one_of(0.0, 0.5, 0.9)
    )
    change_groups = surgery(
        "change_groups", name=names, other=names,
        how=one_of("exchange", "reverse", "reorder", "replace", "merge", "add", "remove"),
    )  # fmt: skip
    save = surgery("save")
    load = surgery("load", which=one_of("own", "torch", "moment", "vectors"))
    look = surgery(
        "look",
        what=one_of("state_dict", "sigma", "report", "metrics", "repr", "vectors", "penalty"),
    )
    penalize = surgery("penalize", between=one_of(None, "smaller", "freed", "dtype"), name=names)


OPERATIONS = [each.function.__name__ for each in Machine.setup_state().rules
              if each.function.__name__ != "step"]  # fmt: skip
