"""Judges manifests of custom kinds by the schemas that their projects publish, as the npm packages @kubernetes-models have them.

The packages' validators find missing fields and wrong values. As in a cluster, they accept a field that the schema does not know,
so the TypeScript compiler reads each manifest as a literal of its kind's type.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.cloud.deployments import NODE_MODULES

PACKAGES = {
    "HTTPRoute": "gateway-api/gateway.networking.k8s.io/v1",
    "PodMonitor": "prometheus-operator/monitoring.coreos.com/v1",
    "ScaledObject": "keda/keda.sh/v1alpha1",
}
_CHECK = "function check(run: () => void) { try { run(); } catch (e) { console.log((e as Error).message); } }\n"


def judge(manifests: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """What is wrong with them. folder: an empty one to work in. Skips the test without npm's packages."""
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "typescript").exists():
        pytest.skip("the schemas of custom kinds are not installed; `make lint-deploy` does that where there is npm")
    (folder / "node_modules").symlink_to(NODE_MODULES)
    kinds = sorted({manifest["kind"] for manifest in manifests})
    imports = "".join(
        f'import {{ {kind} }} from "@kubernetes-models/{PACKAGES[kind]}/{kind}";\n'
        f'import type {{ I{kind} }} from "@kubernetes-models/{PACKAGES[kind]}/{kind}";\n'
        for kind in kinds
    )
    literals = [f"const m{i}: I{m['kind']} = {json.dumps(m)};\n" for i, m in enumerate(manifests)]
    checks = [f"check(() => new {m['kind']}(m{i}).validate());\n" for i, m in enumerate(manifests)]
    source = folder / "manifests.mts"
    source.write_text("".join([imports, *literals, _CHECK, *checks]))
    options = ["--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"]
    compiler = NODE_MODULES / "typescript" / "bin" / "tsc"
    compiled = _run(node, compiler, *options, source, folder=folder)
    if compiled.returncode:
        return re.findall(r"error TS\d+: (.*)", compiled.stdout) or [compiled.stdout + compiled.stderr]
    ran = _run(node, folder / "manifests.mjs", folder=folder)
    return [ran.stderr] if ran.returncode else ran.stdout.splitlines()


def _run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
