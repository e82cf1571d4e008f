"""`ray up deploy/ray/cluster.yaml`, as far as it goes without AWS: Ray's own schema and checks, then its AWS provider against moto's cloud.

What would run on the machines is compared with our own command line and with what is pinned.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cloud.deployments import DEPLOY, PROJECT, ROOT, serve_arguments

from cluster.system.net import is_loopback

PATH = DEPLOY / "ray" / "cluster.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(PATH.read_text())
AMI = "ami-00000000000000000"
HEAD, GPU = (CONFIG["available_node_types"][name] for name in ("head", "gpu"))
COMMANDS = [
    command
    for step in ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    for command in CONFIG[f"{step}_commands"]
]


def served() -> Any:
    (script,) = [command for command in COMMANDS if "tramontane serve" in command]
    return serve_arguments(script, {"HOME": "/home/ubuntu"})


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(CONFIG)
    validate_config(config)
    return config


def test_ray_accepts_the_file_and_every_command_is_shell(prepared: dict[str, Any]) -> None:
    assert prepared["available_node_types"].keys() == {"head", "gpu"}
    for command in COMMANDS:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's cloud, with the role that Ray would otherwise make, and wait a quarter of a minute for."""
    import boto3
    from moto import mock_aws

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()  # Ray stores the key pair it makes there
    with mock_aws():
        iam = boto3.client("iam", region_name=CONFIG["provider"]["region"])
        iam.create_role(RoleName="ray-autoscaler-v1", AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName="ray-autoscaler-v1")
        iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="ray-autoscaler-v1")
        yield boto3.client("ec2", region_name=CONFIG["provider"]["region"])


def test_rays_provider_starts_the_machines_of_the_file(prepared: dict[str, Any], aws: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

    config = bootstrap_aws(prepared)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node in config["available_node_types"].items():
        provider.create_node(node["node_config"], {TAG_RAY_USER_NODE_TYPE: name}, 1)
    found = {}
    for reservation in aws.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            found[tags[TAG_RAY_USER_NODE_TYPE]] = (instance["InstanceType"], instance["ImageId"])
    assert found == {"head": ("m7i.xlarge", AMI), "gpu": ("g5.xlarge", AMI)}
    (group,) = aws.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["ray-autoscaler-tramontane"]}])[
        "SecurityGroups"
    ]
    opened = [rule.get("FromPort") for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert opened == [22], "the head of the file says that nothing but SSH is open"


def test_there_can_be_as_many_nodes_as_replicas() -> None:
    args = served()
    assert (GPU["min_workers"], GPU["max_workers"]) == args.replicas and CONFIG["max_workers"] == args.replicas[1]
    assert GPU["resources"]["GPU"] == args.tensor_parallel_size and HEAD["resources"] == {"CPU": 0}
    assert args.device == "cuda", "with no GPU node at the start `auto` would mean the CPU"
    assert CONFIG["idle_timeout_minutes"] * 60 < args.scale_down_after
    (stop,) = {int(seconds) for command in COMMANDS for seconds in re.findall(r"TimeoutStopSec=(\d+)", command)}
    assert args.drain_timeout < stop


def test_nothing_is_open_to_the_outside() -> None:
    assert is_loopback(served().host) and "--dashboard-host=127.0.0.1" in PATH.read_text()
    for command in COMMANDS:
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "/home/ubuntu/.ray/auth_token" in CONFIG["file_mounts"]
    assert str(served().api_keys) in CONFIG["file_mounts"], "clients need a key, although only the tunnel leads here"


def test_what_is_installed_is_this_release_with_its_pins() -> None:
    wheel = f"tramontane-{PROJECT['version']}-py3-none-*.whl"
    mounts = {Path(there).name: here for there, here in CONFIG["file_mounts"].items()}
    assert mounts["dist"] == "dist" and "rm -rf dist && pip wheel --no-deps --wheel-dir dist ." in PATH.read_text()
    assert (ROOT / mounts["constraints.txt"]).is_file()
    assert any(f"-c ~/constraints.txt ~/dist/{wheel}" in command for command in COMMANDS)
    assert set(re.findall(r"[\w.*-]+\.whl", " ".join(COMMANDS))) == {wheel}


def test_every_node_has_the_model_at_the_path_of_the_command() -> None:
    for step in ("head_setup_commands", "worker_setup_commands"):
        (command,) = CONFIG[step]
        model, folder = re.search(r"hf download (\S+) --local-dir ~/(\S+)", command).groups()
        assert (model, f"/home/ubuntu/{folder}") == (served().served_model_name, served().model)
