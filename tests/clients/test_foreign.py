"""langchain-openai and litellm, each from the environment of its own, against the same server as everybody."""

from pathlib import Path

import pytest
from support.clients.foreign_clients import run, write_tokenizer

FOLDER = Path(__file__).parent / "foreign"

pytestmark = pytest.mark.system


@pytest.mark.timeout(300)  # on a busy machine; a quiet one needs 20 s
@pytest.mark.parametrize("client", ["langchain_client.py", "litellm_client.py"])
def test_client(server, tmp_path, client):
    # Nothing of this suite's configuration: its plugins and its support modules are not installed there.
    own = ["-c", "/dev/null", "--rootdir", FOLDER, "--confcutdir", FOLDER, "-o", "asyncio_mode=auto"]
    output = run(
        ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore", *own, FOLDER / client],
        server=server,
        cwd=tmp_path,
        env={"TRAMONTANE_TOKENIZER": str(write_tokenizer(tmp_path / "tokenizer")), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout_s=280,
    )
    assert " passed" in output and "skipped" not in output, output
