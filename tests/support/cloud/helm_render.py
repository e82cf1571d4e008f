"""Helm itself on deploy/helm, through its Go library; run as a script by the linters' Python, since the project does not install Helm.

Reads a list of values from stdin and writes one result for each: the manifests, or why Helm refuses them.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

CHART = "deploy/helm/tramontane"
NAME = "demo"


def render(python: str, root: str, values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"lint": the findings, "files": file name -> text} for each of `values`, or {"error": why}."""
    done = subprocess.run(
        [python, __file__], cwd=root, input=json.dumps(values), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _main() -> None:
    import helm_python as helm

    results: list[dict[str, Any]] = []
    with helm.Chart.load(CHART) as chart:
        for values in json.load(sys.stdin):
            try:
                files = chart.render(values, name=NAME, namespace="prod")
            except helm.HelmError as e:
                results.append({"error": str(e)})
                continue
            results.append({"lint": helm.lint(CHART, values), "files": files})
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
