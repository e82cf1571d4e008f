"""The files for hosting platforms, judged by the platforms' own tools where a package has them.

SageMaker: botocore's model of its API, and moto's imitation. Vertex AI: its client. Baseten: Truss. Replicate: Cog's own server runs the
predictor, which starts a real `tramontane serve`.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import httpx
import moto
import pytest
import yaml
from support.cloud.deployments import DEPLOY, PROJECT
from support.paths import ROOT

from cluster.api.endpoints.table import ENDPOINTS
from cluster.cli.serve.platform import parse_here

PLATFORMS = ROOT / ".venv-platforms" / "bin" / "python"
needs_tools = pytest.mark.skipif(not PLATFORMS.exists(), reason="`make lint-deploy` installs the platforms' tools")
PATHS = {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}
READY_TIMEOUT_S = 100.0


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(script: str, *arguments: str) -> Any:
    """What a script prints as JSON, run by the Python that has the platforms' tools."""
    command = [str(PLATFORMS), "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@moto.mock_aws
def test_sagemaker_takes_what_the_script_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    script = load(DEPLOY / "sagemaker" / "deploy.py")
    image = "123456789012.dkr.ecr.us-east-1.amazonaws.com/tramontane:0.1.0"
    args = script.parse(["--image", image, "--role", "arn:aws:iam::123456789012:role/r", "--weights", "s3://b/m/"])
    known = boto3.client("sagemaker", region_name="us-east-1").meta.service_model.shape_for(
        "ProductionVariantInstanceType"
    )
    assert args.instance_type in known.enum
    args.instance_type = "ml.g4dn.xlarge"  # the newest that moto knows
    client = boto3.client("sagemaker", region_name="us-east-1")
    for call, arguments in script.requests(args, script.environment_of(args)).items():
        getattr(client, call)(**arguments)
    assert client.describe_endpoint(EndpointName="tramontane")["EndpointStatus"] == "InService"
    model = client.describe_model(ModelName="tramontane")["PrimaryContainer"]
    # SageMaker runs the image with the one argument `serve`, and puts the files there.
    options = parse_here(["serve", "/opt/ml/model"], environ=model["Environment"])
    assert (options.host, options.port, options.no_batches, options.tensor_parallel_size) == ("0.0.0.0", 8080, True, 1)
    named = script.parse(["--image", image, "--role", "r", "--model", "a/b", "--gpus", "4"])
    options = parse_here(["serve"], environ=script.environment_of(named))
    assert (options.model, options.tensor_parallel_size) == ("a/b", 4)


def test_vertex_calls_paths_that_are_there() -> None:
    script = load(DEPLOY / "vertex" / "upload.py")
    spec = script.container_spec("image", ["--max-model-len", "8192"])
    assert {("GET", script.HEALTH), ("POST", script.PREDICT)} <= PATHS
    environ = {
        "AIP_HTTP_PORT": str(spec["serving_container_ports"][0]),
        "AIP_HEALTH_ROUTE": spec["serving_container_health_route"],
        "AIP_PREDICT_ROUTE": spec["serving_container_predict_route"],
        "AIP_STORAGE_URI": "gs://bucket/model",
    }
    options = parse_here(spec["serving_container_args"], environ=environ)
    assert (options.port, options.model, options.max_model_len) == (8080, "gs://bucket/model", 8192)


@needs_tools
def test_vertex_takes_what_the_script_sends() -> None:
    spec = load(DEPLOY / "vertex" / "upload.py").container_spec("image", [])
    script = """
import inspect, json, sys
from google.cloud import aiplatform
spec = json.loads(sys.argv[1])
inspect.signature(aiplatform.Model.upload).bind(display_name="n", artifact_uri="gs://b/m", **spec)
deploy = dict(machine_type="m", accelerator_type="NVIDIA_L4", accelerator_count=1, min_replica_count=1, max_replica_count=2)
inspect.signature(aiplatform.Model.deploy).bind(None, **deploy)
print(json.dumps(sorted(a.name for a in aiplatform.gapic.AcceleratorType)))
"""
    assert {"NVIDIA_L4", "NVIDIA_TESLA_A100", "NVIDIA_H100_80GB"} <= set(ask(script, json.dumps(spec)))


def test_baseten_calls_paths_that_are_there() -> None:
    config = yaml.safe_load((DEPLOY / "baseten" / "config.yaml").read_text())
    server = config["docker_server"]
    assert {
        ("POST", server["predict_endpoint"]),
        ("GET", server["readiness_endpoint"]),
        ("GET", server["liveness_endpoint"]),
    } <= PATHS
    assert config["base_image"]["image"].endswith(f":{PROJECT['version']}")
    command = server["start_command"].partition("exec tramontane ")[2].rstrip('"').split()
    options = parse_here(command, environ=config["environment_variables"])
    assert (options.host, options.port, options.public_health) == ("0.0.0.0", server["server_port"], True)


@needs_tools
def test_truss_reads_basetens_file() -> None:
    script = """
import json, pathlib, sys
from truss.base.truss_config import TrussConfig
config = TrussConfig.from_yaml(pathlib.Path(sys.argv[1]))
print(json.dumps([config.docker_server.server_port, config.resources.accelerator.accelerator.value, list(config.secrets)]))
"""
    assert ask(script, "deploy/baseten/config.yaml") == [8000, "A10G", ["hf_access_token"]]


def test_the_predictor_is_of_this_release() -> None:
    folder = DEPLOY / "replicate"
    config = yaml.safe_load((folder / "cog.yaml").read_text())
    file, _, name = config["predict"].partition(":")
    assert f"class {name}(BasePredictor)" in (folder / file).read_text()
    requirements = (folder / config["build"]["python_requirements"]).read_text()
    assert f"tramontane=={PROJECT['version']}\n" in requirements
    assert set(config["build"]) == {"gpu", "python_version", "system_packages", "python_requirements"}


@pytest.fixture
def cog(tmp_path: Path) -> Iterator[str]:
    """The URL of Cog's own server with our predictor and the demo model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(sys.executable).parent
    env = {**os.environ, "PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "COG_MAX_CONCURRENCY": "8"}
    # Cog starts `python` from the path, and ours has the command.
    env |= {"PATH": f"{PLATFORMS.parent}:{here}:{os.environ['PATH']}"}
    env |= {"SERVE_OPTIONS": "--device cpu", "XDG_DATA_HOME": str(tmp_path)}
    command = [str(PLATFORMS), "-m", "cog.server.http", "--host", "127.0.0.1"]
    log = (tmp_path / "log").open("w")
    with (
        log,
        subprocess.Popen(
            command, cwd=DEPLOY / "replicate", env=env, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + READY_TIMEOUT_S
            while (health := _health(url)) != "READY":
                text = (tmp_path / "log").read_text()
                assert process.poll() is None and health != "SETUP_FAILED" and time.monotonic() < deadline, text
                time.sleep(0.2)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(30)


def _health(url: str) -> str:
    try:
        return str(httpx.get(f"{url}/health-check", timeout=5).json()["status"])
    except (httpx.HTTPError, ValueError):
        return ""


@needs_tools
@pytest.mark.system
def test_cogs_server_runs_the_predictor(cog: str) -> None:
    body = {"input": {"prompt": "def fibonacci(n):", "max_tokens": 8, "temperature": 0, "raw": True}}
    first, second = (httpx.post(f"{cog}/predictions", json=body, timeout=60).json() for _ in range(2))
    assert first["status"] == "succeeded", first
    assert "".join(first["output"]) and first["output"] == second["output"]
    # `cog build` makes the schema that would refuse this, so here the server's own refusal is seen.
    nothing = {"input": {**body["input"], "max_tokens": 0}}
    refused = httpx.post(f"{cog}/predictions", json=nothing, timeout=60).json()
    assert refused["status"] == "failed" and "'max_tokens' is 0" in refused["error"]
