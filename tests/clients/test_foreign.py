"""Agents and clients that nobody here wrote, in their own environment, against the same server as the other clients.

They run their quick starts, with another base URL, key and model, and with few turns: the demo model is tiny and follows no instruction.
All run in one process: most of their time is imports, and these are largely the same.
"""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.clients.foreign_clients import run, write_tokenizer
from support.servers.system_server import Server

FOLDER = Path(__file__).parent / "foreign"
CLIENTS = (
    "langchain_client",
    "langchain_agents_client",
    "litellm_client",
    "autogen_client",
    "semantic_kernel_client",
    "agent_framework_client",
    "agent_framework_responses_client",
    "anthropic_client",
    "mistralai_client",
    "azure_client",
)

pytestmark = [pytest.mark.clients, pytest.mark.system, pytest.mark.timeout(400)]  # for a busy machine


@pytest.fixture(scope="module")
def outcomes(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ElementTree.Element]]:
    """The tests of each client. A client that cannot be imported has one, with an error."""
    cwd = tmp_path_factory.mktemp("foreign")
    # Without this suite's configuration: its plugins and support modules are not installed there.
    own = ["-c", "/dev/null", "--rootdir", FOLDER, "--confcutdir", FOLDER, "-o", "asyncio_mode=auto"]
    # Some clients keep their connections for the whole process.
    own += ["-o", "asyncio_default_test_loop_scope=session", "-o", "asyncio_default_fixture_loop_scope=session"]
    told = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore", "--continue-on-collection-errors"]
    run(
        ["-m", "pytest", *told, "--junitxml=report.xml", *own, *(FOLDER / f"{client}.py" for client in CLIENTS)],
        server=server,
        cwd=cwd,
        env={"TRAMONTANE_TOKENIZER": str(write_tokenizer(cwd / "tokenizer")), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout_s=380,
        may_fail=True,
    )
    found: dict[str, list[ElementTree.Element]] = {client: [] for client in CLIENTS}
    for case in ElementTree.parse(cwd / "report.xml").iter("testcase"):
        found[case.get("classname") or case.get("name") or ""].append(case)
    return found


@pytest.mark.parametrize("client", CLIENTS)
def test_client(outcomes: dict[str, list[ElementTree.Element]], client: str) -> None:
    assert len(outcomes[client]) >= 3, f"{client} has more tests than ran"
    wrong = [f"{case.get('name')}: {part.text}" for case in outcomes[client] for part in case]
    assert not wrong, "\n".join(wrong)
