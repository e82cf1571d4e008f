"""The Helm chart: linted and rendered by Helm, judged by Kubernetes' own schemas; names that resolve, and numbers that fit."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.cloud.custom_kinds import PACKAGES, judge
from support.cloud.deployments import DEPLOY, PINS, PROJECT, linter, serve_arguments
from support.cloud.helm_render import NAME, render
from support.paths import ROOT

from cluster.api.endpoints.table import ENDPOINTS

Manifest = dict[str, Any]
CHART = DEPLOY / "helm" / "tramontane"
KUBERNETES = "1.33"
# Everything that can be turned on.
FULL: dict[str, Any] = {
    "model": {"id": "s3://bucket/model", "servedName": "mistral", "cache": {"claim": "weights"}},
    "keysSecretName": "keys",
    "serviceAccountName": "reader",
    "replicas": {"min": 2, "max": 6, "tensorParallelSize": 4, "nodeSelector": {"kind": "gpu"}},
    "gateways": {"serveOptions": ["--max-model-len", 8192]},
    "batches": {"storeSecretName": "database", "filesClaim": "files"},
    "tls": {"secretName": "tls"},
    "ingress": {"enabled": True, "className": "nginx", "host": "llm.example.org", "tlsSecretName": "llm"},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "toInferencePool": True},
    "inferencePool": {"enabled": True},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "keda": {"enabled": True},
    "ray": {"faultTolerance": {"enabled": True, "passwordSecretName": "redis"}},
    "image": {"pullSecrets": ["registry"]},
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replica": {"min": 1}}, "additional properties 'replica' not allowed"),
    ({"replicas": {"tensorParallelSize": 3}}, "value must be one of 1, 2, 4, 8"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs names the Gateway"),
    ({"ingress": {"enabled": True, "tlsSecretName": "t"}}, "ingress.host names the host of the certificate"),
]
# Custom kinds, which Kubernetes' schemas do not know.
CUSTOM = {"RayCluster", "PodMonitor", "ScaledObject", "HTTPRoute", "InferencePool"}
# What Kubernetes leaves to pods on the nodes that it must fit: GKE keeps 2.7 of the 16 GiB of a g2-standard-4, EKS 1 of those of a
# g5.xlarge.
ALLOCATABLE_GIB, ALLOCATABLE_CPUS = 13.3, 3.9


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    try:
        subprocess.run([linter("python"), "-c", "import helm_python"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        pytest.skip("Helm's library is not installed; `make lint-deploy` does that")
    return render(linter("python"), str(ROOT), [{}, FULL, *(values for values, _ in REFUSED)])


def manifests(result: dict[str, Any]) -> list[Manifest]:
    files = [text for name, text in result["files"].items() if name.endswith(".yaml")]
    return [manifest for text in files for manifest in yaml.safe_load_all(text) if manifest]


@pytest.fixture(params=["plain", "full"])
def rendered(request: pytest.FixtureRequest, results: list[dict[str, Any]]) -> list[Manifest]:
    return manifests(results[("plain", "full").index(request.param)])


def of_kind(rendered: list[Manifest], kind: str) -> Manifest:
    return next(m for m in rendered if m["kind"] == kind)


def gateway(rendered: list[Manifest]) -> Manifest:
    (container,) = of_kind(rendered, "Deployment")["spec"]["template"]["spec"]["containers"]
    return container


def served(rendered: list[Manifest]) -> Any:
    return serve_arguments(gateway(rendered)["args"][0], {})


def memory_gib(text: str) -> float:
    return float(text.removesuffix("Gi"))


def test_the_default_values_are_what_their_schema_allows() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)
    assert set(schema["properties"]) - {"global"} == set(values), "a value without a schema is refused"
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        jsonschema.validate({"replica": {}}, schema)


def test_the_chart_has_the_projects_release() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (PROJECT["version"], PROJECT["version"])
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["ray"]["version"] == PINS["ray"]


def test_helm_finds_nothing_wrong(results: list[dict[str, Any]]) -> None:
    for result in results[:2]:
        assert result["lint"]["errors"] == []
        assert [m["error"] for m in result["lint"]["messages"]] == ["icon is recommended"]


def test_wrong_values_are_refused_with_the_reason(results: list[dict[str, Any]]) -> None:
    for result, (_, message) in zip(results[2:], REFUSED, strict=True):
        assert message in result["error"]


def test_the_kinds(results: list[dict[str, Any]]) -> None:
    plain, full = (sorted(m["kind"] for m in manifests(result)) for result in results[:2])
    basic = ["Deployment", "NetworkPolicy", "NetworkPolicy", "NetworkPolicy", "PodDisruptionBudget", "RayCluster"]
    assert plain == [*basic, "Service"]
    more = ["HTTPRoute", "InferencePool", "Ingress", "PodMonitor", "PodMonitor", "ScaledObject"]
    assert full == sorted([*basic, "Service", *more])


def test_kubernetes_own_schemas_accept_everything(rendered: list[Manifest], tmp_path: Path) -> None:
    cluster = of_kind(rendered, "RayCluster")
    pods = [cluster["spec"]["headGroupSpec"]["template"], cluster["spec"]["workerGroupSpecs"][0]["template"]]
    judged = [m for m in rendered if m["kind"] not in CUSTOM]
    judged += [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "p"}, "template": pod} for pod in pods]
    path = tmp_path / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(judged))
    command = [linter("kubernetes-validate"), "--strict", "-k", KUBERNETES, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kuberay_knows_every_field(rendered: list[Manifest]) -> None:
    schema = json.loads((Path(__file__).parent / "raycluster_schema.json").read_text())
    jsonschema.validate(of_kind(rendered, "RayCluster"), schema)


def test_custom_kinds_follow_the_schemas_of_their_projects(results: list[dict[str, Any]], tmp_path: Path) -> None:
    full = [m for m in manifests(results[1]) if m["kind"] in PACKAGES]
    assert {m["kind"] for m in full} == set(PACKAGES)
    route = next(m for m in full if m["kind"] == "HTTPRoute")
    scaled = next(m for m in full if m["kind"] == "ScaledObject")
    misspelled = {**scaled, "spec": {**scaled["spec"], "minReplicas": 1}}
    wrong = {**route, "spec": {**route["spec"], "rules": [{"timeouts": {"request": "soon"}}]}}
    for name, judged, message in (("a", [misspelled], "minReplicas"), ("b", [*full, wrong], "timeouts/request")):
        (tmp_path / name).mkdir()
        (found,) = judge(judged, tmp_path / name)
        assert message in found, "what is wrong with the one manifest that is wrong"


def test_the_inference_pool_is_of_its_first_stable_version(results: list[dict[str, Any]]) -> None:
    """No package has its schema. Written after the custom resource definition of version 1."""
    pool = of_kind(manifests(results[1]), "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    spec = pool["spec"]
    assert set(spec) == {"selector", "targetPorts", "endpointPickerRef"} and set(spec["selector"]) == {"matchLabels"}
    assert spec["targetPorts"] == [{"number": 8000}]
    assert set(spec["endpointPickerRef"]) == {"name", "port"} and set(spec["endpointPickerRef"]["port"]) == {"number"}


def test_a_replica_fits_the_smallest_nodes_with_a_gpu(results: list[dict[str, Any]]) -> None:
    (group,) = of_kind(manifests(results[0]), "RayCluster")["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    for container in (*pod["containers"], *pod["initContainers"]):
        requests = container["resources"]["requests"]
        assert memory_gib(requests["memory"]) < ALLOCATABLE_GIB - 0.5, "the daemons of the node need some too"
        assert float(requests["cpu"]) < ALLOCATABLE_CPUS - 0.5
    (main,) = pod["containers"]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_rollout_drops_nothing(rendered: list[Manifest]) -> None:
    deployment = of_kind(rendered, "Deployment")["spec"]
    scaled = next((m for m in rendered if m["kind"] == "ScaledObject"), None)
    assert (deployment["replicas"] if scaled is None else scaled["spec"]["minReplicaCount"]) == 2
    assert ("replicas" in deployment) == (scaled is None), "Helm would undo what KEDA decided"
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    before = int(gateway(rendered)["lifecycle"]["preStop"]["exec"]["command"][-1])
    grace = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    assert before + served(rendered).drain_timeout < grace
    assert of_kind(rendered, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_gateways_share_what_they_write(results: list[dict[str, Any]]) -> None:
    plain, full = (manifests(result) for result in results[:2])
    assert served(plain).no_batches, "each gateway would have files of its own"
    assert not served(full).no_batches
    env = {v["name"]: v.get("valueFrom") for v in gateway(full)["env"]}
    assert env["TRAMONTANE_BATCH_STORE"] == {"secretKeyRef": {"name": "database", "key": "url"}}
    volumes = {v["name"]: v for v in of_kind(full, "Deployment")["spec"]["template"]["spec"]["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "files"


def test_what_is_served(results: list[dict[str, Any]]) -> None:
    plain, full = (served(manifests(result)) for result in results[:2])
    assert (plain.model, plain.served_model_name) == ("/models/model", "mistralai/Mistral-7B-Instruct-v0.3")
    assert (plain.replicas, plain.tensor_parallel_size, plain.host) == ((1, 4), 1, "0.0.0.0")
    assert (full.served_model_name, full.replicas, full.tensor_parallel_size) == ("mistral", (2, 6), 4)
    assert (full.max_model_len, str(full.api_keys)) == (8192, "/keys/keys.json")
    assert (str(full.tls_cert), str(full.tls_key)) == ("/tls/tls.crt", "/tls/tls.key")


def test_probes_ask_what_answers_without_a_key(rendered: list[Manifest]) -> None:
    container, args = gateway(rendered), served(rendered)
    paths = {endpoint.path: endpoint for endpoint in ENDPOINTS}
    for probe in ("startupProbe", "livenessProbe"):
        assert paths[container[probe]["httpGet"]["path"]].is_open
    assert args.public_health and container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    schemes = {container[p]["httpGet"]["scheme"] for p in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert schemes == {"HTTPS" if args.tls_cert else "HTTP"}


def test_every_mount_is_a_volume_and_every_selector_selects(rendered: list[Manifest]) -> None:
    cluster, deployment = of_kind(rendered, "RayCluster")["spec"], of_kind(rendered, "Deployment")["spec"]
    templates = [
        cluster["headGroupSpec"]["template"],
        cluster["workerGroupSpecs"][0]["template"],
        deployment["template"],
    ]
    for template in templates:
        pod = template["spec"]
        names = {volume["name"] for volume in pod["volumes"]}
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= names
            assert container["image"] == f"ghcr.io/tramontane-project/tramontane:{PROJECT['version']}"
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    labels = templates[-1]["metadata"]["labels"].items()
    assert deployment["selector"]["matchLabels"].items() <= labels
    for kind in ("Service", "InferencePool", "PodDisruptionBudget", "PodMonitor"):
        for manifest in rendered:
            if manifest["kind"] == kind and not manifest["metadata"]["name"].endswith("-ray"):
                selector = manifest["spec"]["selector"]
                assert selector.get("matchLabels", selector).items() <= labels, kind
    inside = of_kind(rendered, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
    assert all(inside <= template["metadata"]["labels"].items() for template in templates)


def test_prometheus_reaches_rays_pods(rendered: list[Manifest]) -> None:
    rules = of_kind(rendered, "NetworkPolicy")["spec"]["ingress"]
    (rule,) = [r for r in rules if "ports" in r]
    assert rule["ports"] == [{"port": 8080}]
    cluster = of_kind(rendered, "RayCluster")["spec"]
    for template in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        (container,) = template["spec"]["containers"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]


def test_custom_kinds_name_what_is_there(results: list[dict[str, Any]]) -> None:
    full = manifests(results[1])
    route = of_kind(full, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]
    assert (route["kind"], route["name"]) == ("InferencePool", of_kind(full, "InferencePool")["metadata"]["name"])
    scaled = of_kind(full, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == of_kind(full, "Deployment")["metadata"]["name"] == NAME
    query = scaled["triggers"][0]["metadata"]["query"]
    known = (ROOT / "docs" / "monitoring.md").read_text()
    for metric in re.findall(r"tramontane:(\w+)", query):
        assert f"`{metric}`" in known
    monitor = of_kind(full, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in gateway(full)["ports"]}
    assert endpoint["scheme"] == "https" and monitor["metadata"]["labels"]["release"] == "prometheus"
    redis = of_kind(full, "RayCluster")["spec"]["gcsFaultToleranceOptions"]
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "password"}
