"""sky/serve.yaml and sky/cluster.yaml, launched by SkyPilot on real nodes and used as in their comments."""

import json
import sys
import time
from pathlib import Path

import pytest
from support.cloud.sky_client import Sky, env_options, on_slurm
from support.cloud.slurm_cloud import NODE_IPS, SlurmCloud

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(3600)]
API_KEY = "a-key-for-tests"
SERVE_SECRETS = {"HF_TOKEN": "", "TRAMONTANE_API_KEY": API_KEY}
BODY = {"model": "demo_model", "prompt": "def fibonacci(n):", "max_tokens": 48, "temperature": 0.5, "seed": 6}
TRAMONTANE = Path(sys.executable).parent / "tramontane"


def curl(cloud: SlurmCloud, url: str, *options: str, key: str | None = API_KEY) -> str:
    """Calls the URL from the laptop; returns the body and, on a separate line, the status."""
    header = ["-H", f"Authorization: Bearer {key}"] if key else []
    return cloud.run(["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code}", *header, *options, url], timeout_s=90)


def completion(cloud: SlurmCloud, endpoint: str) -> str:
    answer, _, status = curl(
        cloud, f"{endpoint}/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(BODY)
    ).rpartition("\n")
    assert status == "200", answer
    return json.loads(answer)["choices"][0]["text"]


def first_node(cloud: SlurmCloud) -> str:
    """The address of the node with rank 0 in the only cluster. SkyPilot itself reports the address of the login node."""
    nodes = "scontrol show hostnames $(squeue --noheader --states=running --format=%N)"
    return NODE_IPS[cloud.ssh("c0", nodes).split()[0]]


def wait_until_ready(cloud: SlurmCloud, sky: Sky, cluster: str, endpoint: str) -> None:
    """Waits as the YAMLs say; on failure it shows the log of the job."""
    retry = ["--retry", "200", "--retry-delay", "5", "--retry-all-errors", "-fsS"]
    command = ["curl", *retry, "-H", f"Authorization: Bearer {API_KEY}", f"{endpoint}/health/ready"]
    try:
        cloud.run(command, timeout_s=1200)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{sky('logs', cluster, '--no-follow')}") from error


def test_serve(cloud: SlurmCloud, sky: Sky, figures: dict[str, str]) -> None:
    start = time.monotonic()
    options = env_options({"MODEL": ""}, SERVE_SECRETS)
    sky("launch", "--yes", "--detach-run", "--cluster", "one", on_slurm("serve.yaml", cloud.home), *options)
    figures["serve.yaml: launched"] = f"{time.monotonic() - start:.0f} s"
    endpoint = f"http://{first_node(cloud)}:8000"
    wait_until_ready(cloud, sky, "one", endpoint)
    text = completion(cloud, endpoint)
    figures["serve.yaml: first answer"] = f"{time.monotonic() - start:.0f} s"
    assert text.strip()
    assert completion(cloud, endpoint) == text
    assert curl(cloud, f"{endpoint}/v1/models", key=None).endswith("\n401")
    assert curl(cloud, f"{endpoint}/v1/models", key="another").endswith("\n401")
    sky("down", "--yes", "one")
    with pytest.raises(AssertionError, match=r"Failed to connect|Connection refused"):
        curl(cloud, f"{endpoint}/health/live")


def test_cluster(cloud: SlurmCloud, sky: Sky, figures: dict[str, str]) -> None:
    start = time.monotonic()
    options = env_options({"MODEL": ""}, {**SERVE_SECRETS, "RAY_AUTH_TOKEN": "ab" * 32})
    sky("launch", "--yes", "--detach-run", "--cluster", "two", on_slurm("cluster.yaml", cloud.home), *options)
    figures["cluster.yaml: launched"] = f"{time.monotonic() - start:.0f} s"
    endpoint = f"http://{first_node(cloud)}:8000"
    wait_until_ready(cloud, sky, "two", endpoint)
    assert completion(cloud, endpoint)
    figures["cluster.yaml: first answer"] = f"{time.monotonic() - start:.0f} s"

    def nodes() -> set[str]:
        view = cloud.run(
            [TRAMONTANE, "status", "--url", endpoint, "--json"], env={"TRAMONTANE_API_KEY": API_KEY}, timeout_s=30
        )
        return {rank["node_ip"] for replica in json.loads(view)["replicas"] for rank in replica["ranks"]}

    cloud.wait_for(
        lambda: nodes() == {NODE_IPS["n1"], NODE_IPS["n2"]}, what="a replica on each node", timeout_s=600, every_s=2.0
    )
    figures["cluster.yaml: a replica on each node"] = f"{time.monotonic() - start:.0f} s"
    sky("down", "--yes", "two")
