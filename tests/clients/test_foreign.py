"""Agents and clients that nobody here wrote, in their own environment, against the same server as the other clients.

They run their quick starts, with another base URL, key and model, and with few turns: the demo model is tiny and follows no instruction.
"""

from pathlib import Path

import pytest
from support.clients.foreign_clients import run, write_tokenizer

FOLDER = Path(__file__).parent / "foreign"

pytestmark = pytest.mark.system


@pytest.mark.timeout(300)  # for a busy machine; otherwise 10 s each
@pytest.mark.parametrize(
    "client",
    [
        "langchain_client.py",
        "langchain_agents_client.py",
        "litellm_client.py",
        "autogen_client.py",
        "semantic_kernel_client.py",
        "agent_framework_client.py",
        "mistralai_client.py",
        "azure_client.py",
    ],
)
def test_client(server, tmp_path, client):
    # Without this suite's configuration: its plugins and support modules are not installed there.
    own = ["-c", "/dev/null", "--rootdir", FOLDER, "--confcutdir", FOLDER, "-o", "asyncio_mode=auto"]
    output = run(
        ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore", *own, FOLDER / client],
        server=server,
        cwd=tmp_path,
        env={"TRAMONTANE_TOKENIZER": str(write_tokenizer(tmp_path / "tokenizer")), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout_s=280,
    )
    assert " passed" in output and "skipped" not in output, output
