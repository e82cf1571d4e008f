"""The YAMLs of `sky/`, launched by SkyPilot onto real nodes and used as their comments say."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sky_client import JOB_IS_OVER, Sky, env_options, on_slurm
from slurm_cloud import LAPTOP_IP, NODE_IPS, SlurmCloud

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(1200)]
API_KEY = "a-key-for-tests"
SERVE_SECRETS = {"HF_TOKEN": "", "TRAMONTANE_API_KEY": API_KEY}
BODY = {"model": "demo_model", "prompt": "def fibonacci(n):", "max_tokens": 48, "temperature": 0.5, "seed": 6}
S3 = f"http://{LAPTOP_IP}:5000"
TRAMONTANE, MOTO = (Path(sys.executable).parent / name for name in ("tramontane", "moto_server"))
NUM_LINES = 600
NUM_PARTS = 12


def curl(cloud: SlurmCloud, url: str, *options: str, key: str | None = API_KEY) -> str:
    """From the laptop; the answer and, on a line of its own, the status."""
    header = ["-H", f"Authorization: Bearer {key}"] if key else []
    return cloud.run(["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code}", *header, *options, url], timeout_s=90)


def completion(cloud: SlurmCloud, endpoint: str) -> str:
    answer, _, status = curl(
        cloud, f"{endpoint}/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(BODY)
    ).rpartition("\n")
    assert status == "200", answer
    return json.loads(answer)["choices"][0]["text"]


def wait_until_ready(cloud: SlurmCloud, sky: Sky, cluster: str, endpoint: str) -> None:
    """As the YAMLs say, and with the job's log if it comes to nothing."""
    retry = ["--retry", "60", "--retry-delay", "5", "--retry-all-errors", "-fsS"]
    command = ["curl", *retry, "-H", f"Authorization: Bearer {API_KEY}", f"{endpoint}/health/ready"]
    try:
        cloud.run(command, timeout_s=400)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{sky('logs', cluster, '--no-follow')}") from error


def test_serve(cloud: SlurmCloud, sky: Sky, figures: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    options = env_options({"MODEL": ""}, SERVE_SECRETS)
    sky("launch", "--yes", "--detach-run", "--cluster", "one", on_slurm("serve.yaml", tmp_path), *options)
    figures["serve.yaml: launched"] = f"{time.monotonic() - start:.0f} s"
    endpoint = f"http://{sky.ip('one')}:8000"
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


def test_cluster(cloud: SlurmCloud, sky: Sky, figures: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    options = env_options({"MODEL": ""}, {**SERVE_SECRETS, "RAY_AUTH_TOKEN": "ab" * 32})
    sky("launch", "--yes", "--detach-run", "--cluster", "two", on_slurm("cluster.yaml", tmp_path), *options)
    figures["cluster.yaml: launched"] = f"{time.monotonic() - start:.0f} s"
    endpoint = f"http://{sky.ip('two')}:8000"
    wait_until_ready(cloud, sky, "two", endpoint)
    assert completion(cloud, endpoint)
    figures["cluster.yaml: first answer"] = f"{time.monotonic() - start:.0f} s"

    def nodes() -> set[str]:
        view = cloud.run(
            [TRAMONTANE, "status", "--url", endpoint, "--json"], env={"TRAMONTANE_API_KEY": API_KEY}, timeout_s=30
        )
        return {rank["node_ip"] for replica in json.loads(view)["replicas"] for rank in replica["ranks"]}

    cloud.wait_for(lambda: nodes() == {NODE_IPS["n1"], NODE_IPS["n2"]}, what="a replica on each node", timeout_s=120)
    figures["cluster.yaml: a replica on each node"] = f"{time.monotonic() - start:.0f} s"
    sky("down", "--yes", "two")


@pytest.fixture
def bucket(cloud: SlurmCloud) -> Iterator[str]:
    """The URL of a bucket on the laptop, over which S3's protocol is spoken. It asks for no signature."""
    with (cloud.lab / "s3.log").open("w") as log:
        process = cloud.popen([MOTO, "--host", LAPTOP_IP, "--port", "5000"], stdout=log, stderr=log)
    url = f"{S3}/bucket"
    cloud.run(["curl", "-fsS", "--retry", "30", "--retry-delay", "1", "--retry-all-errors", "-X", "PUT", url])
    yield url
    process.kill()
    process.wait()


def test_batch(cloud: SlurmCloud, sky: Sky, bucket: str, figures: dict[str, str], tmp_path: Path) -> None:
    ids = [f"line-{i}" for i in range(NUM_LINES)]
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"custom_id": i, "prompt": f"def {i}(", "max_tokens": 64}) + "\n" for i in ids))
    curl(cloud, f"{bucket}/in.jsonl", "-f", "-T", str(lines))

    start = time.monotonic()
    envs = {"IN": "s3://bucket/in.jsonl", "OUT": "s3://bucket/out.jsonl", "PARTS": str(NUM_PARTS), "MODEL": ""}
    envs |= {"INSTALL": ".[s3]", "AWS_ENDPOINT_URL": S3, "AWS_DEFAULT_REGION": "us-east-1"}
    secrets = {"HF_TOKEN": "", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    name = ["--name", "batch"]
    sky("jobs", "launch", "--yes", "--detach-run", *name, on_slurm("batch.yaml", tmp_path), *env_options(envs, secrets))
    figures["batch.yaml: submitted"] = f"{time.monotonic() - start:.0f} s"

    def objects() -> set[str]:
        return set(re.findall(r"<Key>(.*?)</Key>", curl(cloud, f"{bucket}?list-type=2")))

    def parts() -> set[str]:
        return {name for name in objects() if name.startswith("out.part") and name.endswith(".done")}

    cloud.wait_for(lambda: len(parts()) >= 3, what="the first parts", timeout_s=400)
    figures["batch.yaml: three parts"] = f"{time.monotonic() - start:.0f} s"
    victim = cloud.ssh("c0", "squeue --noheader --states=running --format=%N").strip()
    finished = parts()
    assert len(finished) < NUM_PARTS, "the batch was over before a node could die: give it more lines"
    cloud.kill_node(victim)
    killed = time.monotonic()

    (job,) = sky.jobs()
    cloud.wait_for(lambda: parts() > finished, what="another node to finish a part", timeout_s=500)
    figures["batch.yaml: next part after the node's death"] = f"{time.monotonic() - killed:.0f} s"
    cloud.start_node(victim)
    cloud.wait_for(lambda: sky.jobs()[job] in JOB_IS_OVER, what="the batch to end", timeout_s=400)
    assert sky.jobs()[job] == "SUCCEEDED", sky("jobs", "logs", str(job), "--no-follow")
    figures["batch.yaml: done"] = f"{time.monotonic() - start:.0f} s"

    answers = [json.loads(line) for line in curl(cloud, f"{bucket}/out.jsonl").splitlines()[:-1]]
    assert [answer["custom_id"] for answer in answers] == ids
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    assert "out.errors.jsonl" not in objects()
    figures["batch.yaml: lines"] = (
        f"{len(answers)} of {NUM_LINES}, each once; {victim} killed after {len(finished)} of {NUM_PARTS} parts"
    )
