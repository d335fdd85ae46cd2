import pytest

from ..support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Groups of processes by their number and torch's backend, started at first use."""
    started = {}

    def get(world, backend="gloo"):
        key = world, backend
        if key in started and not started[key].usable:
            started.pop(key).close()
        if key not in started:
            started[key] = Ranks(world, backend=backend)
        return started[key]

    yield get
    for group in started.values():
        group.close()
