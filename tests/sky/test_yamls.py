"""Every file of `sky/` as SkyPilot reads it, offline; and the commands in its comment, docs/deploy/ and the README."""

import re
import shlex
from typing import Any

import pytest
import yaml
from support.cloud.sky_reading import commands_in, opening_comment, read_with_sky
from support.paths import ROOT

from cluster.cli.options.parser import make_parser
from cluster.plan.gpus import find_gpu
from cluster.plan.models import describe_model
from cluster.plan.offers import LEFT_OUT, OFFERS
from cluster.plan.planner import Question, make_plan
from cluster.plan.roofline import Workload

KINDS = (
    "batch",
    "cluster",
    "container",
    "mistral-7b-v0.1",
    "pool-job",
    "pool",
    "private",
    "serve-tp",
    "serve",
    "service-on-demand",
    "service",
)
NAMES = [f"{kind}.yaml" for kind in KINDS]
PATHS = [ROOT / "sky" / name for name in NAMES]
GUIDES = [*sorted((ROOT / "docs" / "deploy").glob("*.md")), ROOT / "README.md"]
RUNS_OUR_CODE = [name for name in NAMES if name not in ("pool-job.yaml", "container.yaml")]
SEED = "mistral-7b-v0.1.yaml"  # one kind of node at one cloud, and nothing to give
WRONG = [
    ["sky", "lunch", "x.yaml"],
    ["sky", "launch", "--cloudy", "x.yaml"],
    ["sky", "launch", "--secret", "NOT_SET", "x.yaml"],
]
SERVES = ["container.yaml", *(name for name in RUNS_OUR_CODE if name not in ("batch.yaml", "pool.yaml"))]


def texts() -> dict[str, str]:
    """The texts that contain commands."""
    guides = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in GUIDES}
    fences = re.compile(r"^ *```sh\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)
    fenced = {name: "\n".join(fences.findall(text)) for name, text in guides.items()}
    return {path.name: opening_comment(path) for path in PATHS} | fenced


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    commands = [command for text in texts().values() for command in commands_in(text, "sky")]
    assert len(commands) > 20
    return read_with_sky(tmp_path_factory.mktemp("home"), PATHS, commands + WRONG)


@pytest.fixture
def tasks(read: dict[str, Any]) -> dict[str, Any]:
    return read["tasks"]


def test_no_python_shadows_skypilots_package() -> None:
    assert not list((ROOT / "sky").rglob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_the_comment_says_how_to_launch_it(name: str) -> None:
    commands = list(commands_in(opening_comment(ROOT / "sky" / name), "sky"))
    assert any(f"sky/{name}" in words for words in commands), "the file's own launch is not among its commands"
    ends = {("sky", "down"), ("sky", "jobs", "cancel"), ("sky", "jobs", "pool"), ("sky", "serve", "down")}
    assert any(tuple(words[:n]) in ends for words in commands for n in (2, 3)) or name == "pool-job.yaml"


def test_sky_accepts_the_commands(read: dict[str, Any]) -> None:
    refused = {command for command, error in read["commands"].items() if error}
    assert refused == {shlex.join(words) for words in WRONG}, read["commands"]


def test_tramontane_accepts_the_commands() -> None:
    commands = [words for text in texts().values() for words in commands_in(text, "tramontane")]
    assert len(commands) > 5
    for _, *words in commands:
        make_parser().parse_args(words)  # exits for an unknown option


def test_the_machines_are_on_sale(tasks: dict[str, Any]) -> None:
    sold = {(offer.cloud, offer.gpu, offer.count) for offer in OFFERS}
    anywhere = {(gpu, count) for _, gpu, count in sold}
    for name, task in tasks.items():
        for resource in task["resources"]:
            ((gpu, count),) = resource["accelerators"].items()
            if resource["cloud"] is None:
                assert (gpu, count) in anywhere, name
            else:
                assert (resource["cloud"], gpu, count) in sold, f"{name}: {resource['cloud']} has no {gpu}:{count}"


def test_a_region_alone_is_enough_for_one_cloud(read: dict[str, Any]) -> None:
    """A region belongs to one cloud, so of a list of several clouds SkyPilot wants `--infra aws/us-east-1`."""
    errors = read["in_a_region"]
    assert errors[SEED] is None
    assert errors["serve.yaml"] is not None and "us-east-1" in errors["serve.yaml"]
    (launch,) = [words for words in commands_in(opening_comment(ROOT / "sky" / SEED), "sky") if "launch" in words]
    assert shlex.join(launch) == f"sky launch -c mistral-7b sky/{SEED} --region us-east-1"


def test_the_shortest_way(tasks: dict[str, Any]) -> None:
    task = tasks[SEED]
    assert [(r["cloud"], r["accelerators"], r["ports"]) for r in task["resources"]] == [("aws", {"A10G": 1}, ["8000"])]
    assert task["envs"]["MODEL"] == "mistralai/Mistral-7B-v0.1"
    assert ["sky", "status", "--ip", "mistral-7b"] in list(commands_in(opening_comment(ROOT / "sky" / SEED), "sky"))


def test_a_release_in_a_container(tasks: dict[str, Any]) -> None:
    (_, container) = task = (tasks["serve.yaml"], tasks["container.yaml"])
    assert {tuple(r["image_id"].values()) for r in container["resources"]} == {
        ("docker:ghcr.io/tramontane-project/tramontane:0.1.0",)
    }
    assert container["workdir"] is None
    assert container["mounts"] == {"/weights": "hf://mistralai/Mistral-7B-Instruct-v0.3"}
    lists = [sorted((r["cloud"], *r["accelerators"]) for r in t["resources"]) for t in task]
    assert lists[0] == lists[1]


@pytest.mark.parametrize("name", ["serve.yaml", "cluster.yaml", "service.yaml", "private.yaml", "batch.yaml"])
def test_all_three_clouds_and_the_named_cards(name: str, tasks: dict[str, Any]) -> None:
    resources = tasks[name]["resources"]
    assert {r["cloud"] for r in resources} == {"aws", "gcp", "azure"}
    assert {"A10G", "L4", "A100", "A100-80GB"} <= {gpu for r in resources for gpu in r["accelerators"]}


def test_tensor_parallel_counts(tasks: dict[str, Any]) -> None:
    counts = {(gpu, n) for r in tasks["serve-tp.yaml"]["resources"] for gpu, n in r["accelerators"].items()}
    assert {("A10G", 4), ("A100", 2), ("A100", 4), ("A100", 8)} <= counts
    assert all(n in (2, 4, 8) for _, n in counts)  # what 8 KV heads can be divided by


def test_more_gpus_are_faster_than_one_a10g(tasks: dict[str, Any]) -> None:
    """SkyPilot takes the cheapest of a list, so each must be worth its price. L4:2 would cost twice as much, and is slower."""
    asked = Question(
        model=describe_model(tasks["serve-tp.yaml"]["envs"]["MODEL"]),
        workload=Workload(context=8192, concurrency=1, prompt_tokens=4096),
        dtype="bfloat16",
    )

    def step_s(gpu: str, count: int) -> float:
        return make_plan(asked, find_gpu(gpu), count).speed.step_s

    slowest = step_s("A10G", 1)
    for resource in tasks["serve-tp.yaml"]["resources"]:
        ((gpu, count),) = resource["accelerators"].items()
        assert step_s(gpu, int(count)) < slowest / 1.3, f"{gpu}:{count}"
    assert step_s("L4", 2) > slowest / 1.3


def test_azures_a10_is_in_no_list(tasks: dict[str, Any]) -> None:
    assert not {(r["cloud"], *r["accelerators"]) for task in tasks.values() for r in task["resources"]} & LEFT_OUT


def test_only_public_endpoints_open_a_port(tasks: dict[str, Any]) -> None:
    ports = {name: {tuple(r["ports"] or ()) for r in task["resources"]} for name, task in tasks.items()}
    public = set(SERVES) - {"private.yaml"}
    assert ports == {name: {("8000",)} if name in public else {()} for name in NAMES}


def test_spot_is_for_what_can_lose_a_node(tasks: dict[str, Any]) -> None:
    spot = {name for name, task in tasks.items() if all(r["use_spot"] for r in task["resources"])}
    assert spot == {"service.yaml", "batch.yaml", "pool.yaml", "pool-job.yaml"}


def test_the_service(tasks: dict[str, Any]) -> None:
    service = tasks["service.yaml"]["service"]
    probe, policy = service["readiness_probe"], service["replica_policy"]
    assert probe["path"] == "/health/ready"
    assert "headers" not in probe, "the probe needs no key, with --public-health"
    assert 1 <= policy["min_replicas"] < policy["max_replicas"]
    assert policy["dynamic_ondemand_fallback"] and policy["base_ondemand_fallback_replicas"] >= 1
    assert tasks["service.yaml"]["resources"][0]["ports"] == ["8000"], "SkyServe takes the one port as the service's"


def test_rates_for_each_kind_of_gpu(tasks: dict[str, Any]) -> None:
    task = tasks["service-on-demand.yaml"]
    policy = task["service"]["replica_policy"]
    assert set(policy["target_qps_per_replica"]) == {gpu for r in task["resources"] for gpu in r["accelerators"]}
    assert task["service"]["load_balancing_policy"] == "instance_aware_least_load"
    # SkyServe's autoscaler for the fallback to on-demand nodes raises an error on rates for each kind.
    assert not {"dynamic_ondemand_fallback", "base_ondemand_fallback_replicas"} & set(policy)


def test_the_pool_and_its_job(tasks: dict[str, Any]) -> None:
    assert [name for name, task in tasks.items() if task["is_pool"]] == ["pool.yaml"]
    pool = tasks["pool.yaml"]["service"]["pool"]
    assert pool["min_workers"] == 0 < pool["max_workers"] and pool["queue_length_threshold"] == 1
    worker, job = (tasks[name]["resources"] for name in ("pool.yaml", "pool-job.yaml"))
    assert worker == job, "a job requests what a worker has"
    assert tasks["pool-job.yaml"]["workdir"] is None, "a pool takes neither workdir nor setup from a job"
    assert tasks["pool.yaml"]["envs"]["MODEL"] == tasks["pool-job.yaml"]["envs"]["MODEL"]


def test_several_nodes(tasks: dict[str, Any]) -> None:
    assert {name: task["num_nodes"] for name, task in tasks.items() if task["num_nodes"] > 1} == {"cluster.yaml": 2}


@pytest.mark.parametrize("name", NAMES)
def test_secrets_are_secrets(name: str, tasks: dict[str, Any]) -> None:
    task = tasks[name]
    assert not [env for env in task["envs"] if re.search("KEY|TOKEN|SECRET|PASSWORD", env)]
    assert ("TRAMONTANE_API_KEY" in task["secrets"]) == (name in SERVES and name != SEED)
    assert ("HF_TOKEN" in task["secrets"]) == (name in RUNS_OUR_CODE and name != SEED)
    launch = next(words for words in commands_in(opening_comment(ROOT / "sky" / name), "sky") if f"sky/{name}" in words)
    given = {launch[i + 1] for i, word in enumerate(launch) if word == "--secret"}
    assert given == set(task["secrets"]), "the command in the comment does not give each secret"


@pytest.mark.parametrize("name", RUNS_OUR_CODE)
def test_all_install_the_same_way_with_pins(name: str) -> None:
    task = yaml.safe_load((ROOT / "sky" / name).read_text(encoding="utf-8"))
    first = yaml.safe_load((ROOT / "sky" / "serve.yaml").read_text(encoding="utf-8"))["setup"]
    assert task["setup"].startswith(first)
    assert "--constraint constraints.txt" in first
    assert task["workdir"] == "." and task["envs"]["INSTALL"].startswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_sleeps_or_uses_the_latest_release(name: str) -> None:
    text = (ROOT / "sky" / name).read_text(encoding="utf-8")
    assert not re.search(r"\bsleep\b|\blatest\b", text)
