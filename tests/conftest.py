"""Settings for all tests: the order of tests, no network access by accident, and nothing of the user's own data."""

import os
from collections.abc import Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Those that use the session's server.
CLIENTS = ("tests/clients/test_foreign", "tests/clients/test_lm_eval", "tests/clients/test_openai")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tests run side by side: with more threads than free cores, OpenMP's barriers burn most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when Triton is imported, which transformers does: kernels then run on CPU tensors, see support/triton_interpreter.py.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default folder for the batches of servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with what starts servers, which mostly waits: other workers compute next to it. Marks everything under tests/system."""
    for item in items:
        if "tests/system/" in item.nodeid:
            item.add_marker(pytest.mark.system)
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


class Scheduling(LoadScopeScheduling):
    """One file after the other to each worker, and all clients to the same one: they share a server."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "tests/clients" if file.startswith(CLIENTS) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)
