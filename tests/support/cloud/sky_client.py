"""SkyPilot as a user runs it: the `sky` command on the laptop of a SlurmCloud, and the YAMLs of `sky/` adapted to Slurm.

Knows the command line and its JSON. Does not know what the tasks do.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from support.cloud.slurm_cloud import CHECKOUT, CLUSTER, PARTITION, SlurmCloud

ENV = {
    "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    "SKYPILOT_POD_MEMORY_GB_LIMIT": "6",  # limits how many controllers of managed jobs it starts
}
ACCELERATORS = "A10G:1"  # as in tests/cloud/slurm/etc/slurm/slurm.conf; SkyPilot sees one kind per node
JOB_IS_OVER = {
    "SUCCEEDED",
    "CANCELLED",
    "FAILED",
    "FAILED_SETUP",
    "FAILED_PRECHECKS",
    "FAILED_NO_RESOURCE",
    "FAILED_CONTROLLER",
}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Sky:
    def __init__(self, cloud: SlurmCloud) -> None:
        self._cloud = cloud
        self._command = Path(sys.executable).parent / "sky"

    def __call__(self, *arguments: str | Path, timeout_s: float = 900) -> str:
        """Runs `sky ARGUMENTS` in the checkout; returns its output."""
        output = self._cloud.run([self._command, *arguments], env=ENV, timeout_s=timeout_s)
        return _COLOURS.sub("", output)

    def jobs(self) -> dict[int, str]:
        """Every managed job and its status."""
        return {job["job_id"]: job["status"] for job in json.loads(self("jobs", "queue", "--all", "--output", "json"))}


def on_slurm(yaml_file: str, folder: Path, **changes: Mapping[str, object]) -> Path:
    """A copy of sky/YAML_FILE for Slurm, which opens no ports and has no spot nodes: the accelerator that the nodes claim, on two CPUs.

    The nodes' GPU is only a claim, so the ranks are told to compute on the CPU.
    changes: to other sections, such as pool={"max_workers": 2}.
    """
    task = yaml.safe_load((CHECKOUT / "sky" / yaml_file).read_text())
    task["resources"] = {"infra": f"slurm/{CLUSTER}/{PARTITION}", "cpus": "2+", "accelerators": ACCELERATORS}
    options = "BATCH_OPTIONS" if yaml_file == "pool-job.yaml" else "SERVE_OPTIONS"
    if options in task["envs"]:
        task["envs"][options] = "--device cpu"
    for section, change in changes.items():
        task[section].update(change)
    path = folder / yaml_file
    path.write_text(yaml.safe_dump(task, sort_keys=False))
    return path


def env_options(envs: Mapping[str, str], secrets: Mapping[str, str] | None = None) -> Iterable[str]:
    """`--env` or `--secret` for each of them."""
    for option, values in (("--env", envs), ("--secret", secrets or {})):
        for name, value in values.items():
            yield from (option, f"{name}={value}")
