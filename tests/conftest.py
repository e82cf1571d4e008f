"""Settings for all tests: the order of tests, no network access by accident, and nothing of the user's own data."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
from support.servers.system_server import Server
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Files that use the same session's server, or its browser: they run on one worker, in this order.
SHARING = (
    ("tests/clients/test_foreign.py", "tests/clients/test_lm_eval.py", "tests/clients/test_openai.py", "tests/clients/test_responses.py",
     "tests/clients/test_use_cases.py", "tests/docs/test_examples.py"),
    ("tests/system/test_ports.py", "tests/system/test_serve.py"),
    ("tests/clients/test_raw_bodies.py", "tests/clients/test_raw_http.py"),
    ("tests/system/page/test_playground.py", "tests/system/page/test_appearance.py", "tests/system/page/test_cluster_view.py",
     "tests/system/page/test_modules.py"),
)  # fmt: skip
# What takes longest, from 20 seconds to a minute and a half. It comes first, or one worker would run it alone at the end.
LONGEST = (
    "tests/system/test_failover.py",
    "tests/clients/test_raw_bodies.py",
    "tests/system/test_restart.py",
    "tests/system/test_adapters.py",
    "tests/system/batches/test_batch_command.py",
    "tests/system/test_ports.py",
    "tests/system/batches/test_batches.py",
    "tests/system/page/test_playground.py",
    "tests/clients/test_foreign.py",  # which names those that share its server
    "tests/cluster/api/server/test_slow_clients.py",
    "tests/clients/test_schemathesis.py",
    "tests/system/test_surroundings.py",
    "tests/cluster/router/test_failover_exact.py",
    "tests/workers/engine/test_tensor_parallel.py",
    "tests/cluster/api/parameters/test_chat.py",
    "tests/workers/engine/test_batch_invariance.py",
    "tests/benchmarks/test_triton_resources.py",
)
SHARED_SERVER = pytest.StashKey[Server]()
SCOPES = {file: files[0] for files in SHARING for file in files}

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tests run side by side: with more threads than free cores, OpenMP's barriers burn most of the time, above all if they spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read when Triton is imported, which transformers does: kernels then run on CPU tensors, see support/triton_interpreter.py.
os.environ.setdefault("TRITON_INTERPRET", "1")


# How long an example takes says nothing here: three workers share two cores.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def _data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default folder for the batches of servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A real `tramontane serve` with the demo model and a key, for tests that do no more than send requests.

    In float32: lm-eval's scores are compared with those of transformers.
    """
    server = request.session.stash[SHARED_SERVER] = Server("--dtype", "float32", "--enable-lora")
    yield server
    server.kill()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The shared server ends with the last test of the files that share it: the session is long, and an idle Ray takes processor time."""
    if nextitem is None or scope_of(nextitem.nodeid) != scope_of(item.nodeid):
        server = item.session.stash.get(SHARED_SERVER, None)
        if server is not None:
            del item.session.stash[SHARED_SERVER]
            server.kill()


def scope_of(nodeid: str) -> str:
    """The file of a test; the first of them for files that share a server."""
    file = nodeid.split("::")[0]
    return SCOPES.get(file, file)


def pytest_configure(config: pytest.Config) -> None:
    """Imports make a million objects and no garbage. A process that leaves the tests to workers imports none."""
    if config.getoption("dist") == "no":
        gc.disable()


def pytest_collection_finish() -> None:
    """What is there now stays: no later collection of garbage looks at it."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first, then what starts servers, which mostly waits while other workers compute. Marks everything in tests/system."""

    def rank(item: pytest.Item) -> tuple[int, bool]:
        scope = scope_of(item.nodeid)
        return LONGEST.index(scope) if scope in LONGEST else len(LONGEST), item.get_closest_marker("system") is None

    for item in items:
        if item.nodeid.startswith("tests/system/"):
            item.add_marker(pytest.mark.system)
    items.sort(key=rank)


class Scheduling(LoadScopeScheduling):
    """One file after the other to each worker, and all files that share a server to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)
