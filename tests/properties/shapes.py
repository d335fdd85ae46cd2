"""The penalty of any weights; what must hold is in tests/support/drawn_penalties.py."""

from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from ..support.drawn_penalties import DTYPES, Case, Penalties, Weight
from ..support.forked import Forked
from ..support.surgery.subject import BACKENDS

side = st.sampled_from([0, 1]) | st.integers(2, 12) | st.integers(13, 70)
shapes = (
    st.tuples(side, side) | st.tuples(side)
    | st.tuples(*[st.integers(0, 9)] * 3) | st.tuples(*[st.integers(0, 6)] * 4)
)  # fmt: skip
contents = st.sampled_from(["separated", "random", "repeated", "rank one", "zeros", "nan"])
sizes = st.sampled_from([1.0, 0.01, 1e-19, 1e19, 1e-9, 1e9])


@st.composite
def weights(draw):
    """Draw a Weight; float16 has no numbers above 65504."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    return Weight(
        shape=draw(shapes), dtype=dtype, content=draw(contents),
        strides=draw(st.sampled_from(["contiguous", "columns", "gaps"])),
        size=draw(sizes if dtype != "float16" else st.sampled_from([1.0, 0.1, 100.0])),
        cut=draw(st.sampled_from([None, "splits", "stacked"])),
    )  # fmt: skip


cases = st.builds(
    Case, weights=st.lists(weights(), min_size=1, max_size=4),
    way=st.sampled_from(["penalty", "accumulate"]), exponent=st.sampled_from([2, 1, 3, 2.5]),
    target=st.sampled_from([1.0, 0.7]), n_vectors=st.sampled_from([1, 2, 4]),
    n_power_iterations=st.sampled_from([1, 3, "auto"]), biases=st.booleans(),
    backend=st.sampled_from(BACKENDS), at_end=st.booleans(), seed=st.integers(0, 99),
).filter(lambda case: case.biases or any(len(w.shape) > 1 for w in case.weights))  # fmt: skip


class Shapes:
    """The property, in a process of its own that is replaced when an example fails."""

    counts: ClassVar[dict[str, int]] = {}
    process: ClassVar[Forked | None] = None

    @classmethod
    def holds(cls, case: Case) -> None:
        """Check a case."""
        cls.process = cls.process or Forked(Penalties)
        cls.counts["examples"] = cls.counts.get("examples", 0) + 1
        try:
            outcome = cls.process.call("check", case)
        except AssertionError:
            cls.process.close()
            cls.process = None
            raise
        cls.counts[outcome] = cls.counts.get(outcome, 0) + 1


@given(case=cases)
def penalties_are_right(case):
    """Gradient, penalty and sigma of a case are those of float64, and no other memory changes."""
    Shapes.holds(case)
