"""The Compose files: every name resolves, only the intended ports are reachable from outside, and secrets stay secret."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cloud.compose import load
from support.cloud.deployments import DEPLOY, PINNED, PROJECT, linter, serve_arguments

FOLDER = DEPLOY / "docker"
FILES = [FOLDER / "compose.yaml", FOLDER / "compose.cpu.yaml"]
ENV = {"TRAMONTANE_API_KEY": "a-secret", "RAY_AUTH_TOKEN": "another-secret"}
COMPOSE = load(FILES[:1], ENV)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVER = SERVICES["tramontane"]


def script(service: dict[str, Any]) -> str:
    return " ".join(service["command"])


def compose_command() -> list[str]:
    """Compose v2, as a plugin of docker or standalone; without it the test is skipped."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is not None:
            done = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            release = re.match(r"v?(\d+)\.", done.stdout)
            if release is not None and int(release[1]) >= 2:
                return command
    pytest.skip("docker compose is not installed (Debian 13: apt-get install docker-compose)")


@pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["gpu", "cpu"])
def test_docker_compose_reads_the_files_as_these_tests_do(files: list[Path]) -> None:
    options = [option for file in files for option in ("-f", str(file))]
    command = [*compose_command(), *options, "config", "--format", "json"]
    env = {"PATH": os.environ["PATH"], **ENV}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout.replace("$$", "$"))["services"], load(files, ENV)["services"]
    assert theirs.keys() == ours.keys()
    for name, service in ours.items():
        for field in ("image", "command", "entrypoint", "environment"):
            assert theirs[name].get(field) == service.get(field), f"{name}: {field}"
        assert len(theirs[name]["ports"]) == len(service["ports"])
        assert ("deploy" in theirs[name]) == ("deploy" in service)


@pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["gpu", "cpu"])
def test_the_files_follow_the_compose_specification(files: list[Path]) -> None:
    program = "import sys, compose_spec; compose_spec.PyCompose.from_yaml(sys.stdin.read())"
    done = subprocess.run(
        [linter("python"), "-c", program],
        input=yaml.safe_dump(load(files, ENV)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_name_resolves() -> None:
    used: dict[str, set[str]] = {"configs": set(), "secrets": set(), "volumes": set()}
    for service in SERVICES.values():
        for kind in ("configs", "secrets"):
            used[kind] |= {entry["source"] for entry in service.get(kind, [])}
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).is_dir(), f"{source} does not exist, and Docker would make an empty folder"
            else:
                used["volumes"].add(source)
    for kind, names in used.items():
        assert names == set(COMPOSE[kind]), f"{kind} that are declared and those that are used differ"
    for name, config in COMPOSE["configs"].items():
        assert "content" in config or (FOLDER / config["file"]).is_file(), f"the file of {name} is missing"
    build = SERVER["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).is_file()


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        assert PINNED.fullmatch(service["image"]), f"{name} may run another image tomorrow: {service['image']}"
    assert SERVER["image"] == f"tramontane:{PROJECT['version']}"


def test_only_the_gateway_can_be_published() -> None:
    published = {port: name for name, service in SERVICES.items() for port in service.get("ports", [])}
    assert all(port.startswith("127.0.0.1:") for port in published), published
    opened = load(FILES[:1], {**ENV, "TRAMONTANE_BIND": "0.0.0.0"})["services"]
    assert [p for s in opened.values() for p in s["ports"] if p.startswith("0.0.0.0")] == ["0.0.0.0:8000:8000"]


def test_nothing_starts_without_a_key_and_a_token() -> None:
    for missing in ENV:
        with pytest.raises(KeyError, match=f"{missing}: create one"):
            load(FILES[:1], {name: value for name, value in ENV.items() if name != missing})
    assert SERVER["environment"]["RAY_AUTH_MODE"] == "token"
    for name, service in SERVICES.items():
        assert not any(secret in word for secret in ENV.values() for word in service.get("command", [])), (
            f"the process list shows a secret of {name}"
        )


def test_the_server_gets_the_options() -> None:
    variables = SERVER["environment"]
    args = serve_arguments(script(SERVER), variables)
    assert args.model == variables["MODEL"] == "mistralai/Mistral-7B-Instruct-v0.3"
    assert args.ray_address == "127.0.0.1:6379" and "ray start --head --port=6379" in script(SERVER)
    assert (args.host, str(args.port)) == ("0.0.0.0", SERVER["ports"][0].rpartition(":")[2])
    assert SERVER["stop_grace_period"] == "1m" and args.drain_timeout < 60
    demo = load(FILES[:1], {**ENV, "TRAMONTANE_MODEL": ""})["services"]["tramontane"]["environment"]
    assert demo["MODEL"] == ""


def test_the_cpu_file_requests_no_gpu() -> None:
    assert SERVER["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    cpu = load(FILES, ENV)["services"]
    assert "deploy" not in cpu["tramontane"]
    for service, device in ((SERVER, "cuda"), (cpu["tramontane"], "cpu")):
        assert serve_arguments(script(service), service["environment"]).device == device
    assert {name: service for name, service in cpu.items() if name != "tramontane"} == {
        name: service for name, service in SERVICES.items() if name != "tramontane"
    }


def test_prometheus_and_grafana_find_the_files_they_are_configured_to_read() -> None:
    mounted = {entry["target"]: COMPOSE["configs"][entry["source"]] for entry in SERVICES["prometheus"]["configs"]}
    secrets = {entry["target"]: COMPOSE["secrets"][entry["source"]] for entry in SERVICES["prometheus"]["secrets"]}
    path = next(a.partition("=")[2] for a in SERVICES["prometheus"]["command"] if a.startswith("--config.file="))
    config = yaml.safe_load((FOLDER / mounted[path]["file"]).read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    beside = Path(path).parent
    for name in config["rule_files"]:
        assert str(beside / name) in mounted
    (gateways,) = jobs["tramontane"]["file_sd_configs"][0]["files"]
    targets = yaml.safe_load(mounted[str(beside / gateways)]["content"])
    assert targets == [{"targets": ["tramontane:8000"]}]
    credentials = jobs["tramontane"]["authorization"]["credentials_file"]
    assert secrets[str(beside / credentials)] == {"environment": "TRAMONTANE_API_KEY"}
    (nodes,) = jobs["ray"]["file_sd_configs"][0]["files"]
    for reader in ("prometheus", "grafana"):
        assert nodes.startswith("/tmp/ray/") and "ray:/tmp/ray:ro" in SERVICES[reader]["volumes"]
    assert "ray:/tmp/ray" in SERVER["volumes"]

    environment = SERVICES["grafana"]["environment"]
    for entry in SERVICES["grafana"]["configs"]:
        file = COMPOSE["configs"][entry["source"]].get("file")
        for name in [] if file is None else ("TRAMONTANE_PROMETHEUS", "TRAMONTANE_DASHBOARDS"):
            assert name in environment
    assert f"../grafana/dashboards:{environment['TRAMONTANE_DASHBOARDS']}:ro" in SERVICES["grafana"]["volumes"]
    assert environment["TRAMONTANE_PROMETHEUS"] == "http://prometheus:9090"
