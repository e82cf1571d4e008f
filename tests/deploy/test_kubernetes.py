"""The Kubernetes manifests: the schemas of KubeRay and Kubernetes, names that resolve, and numbers that fit the server and each other."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.cloud.deployments import DEPLOY, PINS, PROJECT, linter, serve_arguments
from support.cloud.dockerfile import instructions

from cluster.api.endpoints.table import ENDPOINTS
from cluster.config.serve import API_KEY_ENV

Manifest = dict[str, Any]
FOLDER = DEPLOY / "kubernetes"
KUBERNETES = "1.33"
ALL: list[Manifest] = list(yaml.safe_load_all((FOLDER / "tramontane.yaml").read_text()))
TEXT = (FOLDER / "tramontane.yaml").read_text()


def of_kind(kind: str) -> Manifest:
    (found,) = [manifest for manifest in ALL if manifest["kind"] == kind]
    return found


CLUSTER = of_kind("RayCluster")
HEAD = CLUSTER["spec"]["headGroupSpec"]
(WORKERS,) = CLUSTER["spec"]["workerGroupSpecs"]
DEPLOYMENT = of_kind("Deployment")
TEMPLATES = {
    "head": HEAD["template"],
    "worker": WORKERS["template"],
    "gateway": DEPLOYMENT["spec"]["template"],
}
(GATEWAY,) = TEMPLATES["gateway"]["spec"]["containers"]
ADDRESS = f"{CLUSTER['metadata']['name']}-head-svc:6379"  # as KubeRay names it


def containers() -> Iterator[tuple[str, Manifest, Manifest]]:
    """(where, the pod's spec, the container)."""
    for name, template in TEMPLATES.items():
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            yield f"{name}/{container['name']}", template["spec"], container


def served() -> Any:
    return serve_arguments(GATEWAY["args"][0], of_kind("ConfigMap")["data"])


def test_the_ray_cluster_has_only_fields_that_kuberay_knows() -> None:
    schema = json.loads((Path(__file__).parent / "raycluster_schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate({**CLUSTER, "spec": {**CLUSTER["spec"], "workerGroupSpecs": [{"minReplica": 1}]}}, schema)


@pytest.mark.parametrize("manifest", ALL, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}")
def test_kubernetes_own_schemas_accept_everything(manifest: Manifest, tmp_path: Path) -> None:
    # Kubernetes has no schema for KubeRay's kind; only its pods can be checked.
    pods = [HEAD["template"], WORKERS["template"]] if manifest is CLUSTER else []
    judged = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod} for pod in pods
    ] or [manifest]
    path = tmp_path / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(judged))
    command = [linter("kubernetes-validate"), "--strict", "-k", KUBERNETES, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kustomize_puts_the_registry_into_every_pod() -> None:
    done = subprocess.run([linter("kubectl"), "kustomize", str(FOLDER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert images == {f"registry.example.com/tramontane:{PROJECT['version']}"}
    assert len(list(yaml.safe_load_all(done.stdout))) == len(ALL)


def test_the_image_is_the_one_that_kustomize_replaces() -> None:
    (image,) = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["images"]
    assert image["newTag"] == PROJECT["version"]
    assert {container["image"] for _, _, container in containers()} == {image["name"]}
    assert CLUSTER["spec"]["rayVersion"] == PINS["ray"]


def test_every_name_resolves() -> None:
    maps = {of_kind("ConfigMap")["metadata"]["name"]}
    claims = {of_kind("PersistentVolumeClaim")["metadata"]["name"]}
    made = re.search(r"create secret generic (\S+) (.*)", TEXT)
    secrets = {
        made[1]: set(re.findall(r"--from-literal=([\w-]+)=", made[2])),
        CLUSTER["metadata"]["name"]: {"auth_token"},
    }
    for where, pod, container in containers():
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in maps, where
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in secrets[reference["name"]], f"{where}: {variable['name']}"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container.get("volumeMounts", []):
            volume = volumes[mount["name"]]
            assert mount["name"] != "data" or volume["persistentVolumeClaim"]["claimName"] in claims
    labels = TEMPLATES["gateway"]["metadata"]["labels"]
    assert of_kind("Service")["spec"]["selector"].items() <= labels.items()
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (port,) = of_kind("Service")["spec"]["ports"]
    assert {p["name"]: p["containerPort"] for p in GATEWAY["ports"]} == {port["targetPort"]: served().port}
    policies = [m for m in ALL if m["kind"] == "NetworkPolicy"]
    inside = policies[0]["spec"]["podSelector"]["matchLabels"]
    for name, template in TEMPLATES.items():
        assert inside.items() <= template["metadata"]["labels"].items(), f"{name} is outside of the policy"


def test_no_container_has_more_rights_than_it_needs() -> None:
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert CLUSTER["spec"]["autoscalerOptions"]["securityContext"] == restricted, "KubeRay adds this container"
    for where, pod, container in containers():
        assert container["securityContext"] == restricted, where
        assert {"requests", "limits"} <= container["resources"].keys(), where
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}, where
        user = next(i.value for i in instructions(DEPLOY / "docker" / "Dockerfile") if i.name == "USER")
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


def test_shared_memory_is_memory_and_leaves_room_for_the_ranks() -> None:
    for name, template in TEMPLATES.items():
        (shm,) = [v["emptyDir"] for v in template["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["medium"] == "Memory"
        (container,) = template["spec"]["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"], name
    for group in (HEAD, WORKERS):
        assert int(group["rayStartParams"]["object-store-memory"]) < 256 * 2**20


def test_the_gateway_joins_the_ray_cluster_with_its_token() -> None:
    script = GATEWAY["args"][0]
    assert served().ray_address == ADDRESS and f"ray start --address {ADDRESS} --num-cpus 0 --num-gpus 0" in script
    waiting = TEMPLATES["gateway"]["spec"]["initContainers"][-1]
    assert ADDRESS in waiting["command"][-1]
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    for container in (waiting, GATEWAY):
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == CLUSTER["metadata"]["name"]
    assert API_KEY_ENV in env and served().host == "0.0.0.0"


def test_there_can_be_as_many_pods_as_replicas() -> None:
    args = served()
    low, high = args.replicas
    (worker,) = WORKERS["template"]["spec"]["containers"]
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) == args.tensor_parallel_size
    assert (WORKERS["minReplicas"], WORKERS["maxReplicas"]) == (low, high)
    assert CLUSTER["spec"]["enableInTreeAutoscaling"]
    assert [HEAD["rayStartParams"][f"num-{kind}"] for kind in ("cpus", "gpus")] == ["0", "0"]
    assert args.device == "cuda", "with no GPU pod at the start `auto` would mean the CPU"
    assert CLUSTER["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] < args.scale_down_after


def test_gateway_and_ranks_read_the_same_model_from_the_same_folder() -> None:
    downloads = {name: template["spec"]["initContainers"][0] for name, template in TEMPLATES.items() if name != "head"}
    for name, container in downloads.items():
        words = [*container["command"], *container.get("args", [])]
        assert words[:3] == ["hf", "download", "$(MODEL)"] and words[words.index("--revision") + 1] == "$(REVISION)"
        assert words[words.index("--local-dir") + 1] == served().model, name
        mount = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "models")
        (main,) = TEMPLATES[name]["spec"]["containers"]
        assert {"name": "models", "mountPath": mount} in main["volumeMounts"] and served().model.startswith(mount)
    assert served().served_model_name == of_kind("ConfigMap")["data"]["MODEL"]


def test_the_download_command_succeeds_with_the_pinned_releases() -> None:
    """With a typer that does not match click, `hf` fails after its work is done, and a pod would restart forever."""
    command = [str(Path(sys.executable).parent / "hf"), "version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_probes_use_existing_paths_and_the_drain_fits_into_the_grace_period() -> None:
    paths = {endpoint.path: endpoint for endpoint in ENDPOINTS}
    for probe in ("startupProbe", "livenessProbe"):
        assert paths[GATEWAY[probe]["httpGet"]["path"]].is_open, "kubelet has no key"
    copied = [i.words()[-1] for i in instructions(DEPLOY / "docker" / "Dockerfile") if i.name == "COPY"]
    (command,) = GATEWAY["readinessProbe"]["exec"]["command"]
    assert f"/usr/local/bin/{command}" in copied
    before = int(GATEWAY["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert before + served().drain_timeout < TEMPLATES["gateway"]["spec"]["terminationGracePeriodSeconds"]
