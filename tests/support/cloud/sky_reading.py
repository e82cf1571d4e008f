"""What SkyPilot itself reads in a task's YAML and in its own command lines, as JSON; run as a script, since it needs a process of its own.

SkyPilot keeps state in HOME and would fetch catalogs of prices. `read_with_sky` gives it a HOME with nothing but a small catalog, no
network, and the secrets that a user would have exported.
"""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.cloud.sky_catalog import write_catalog
from support.paths import ROOT

SECRETS = {"HF_TOKEN": "hf-token", "TRAMONTANE_API_KEY": "the-key", "RAY_AUTH_TOKEN": "ab" * 32}
TIMEOUT_S = 60.0
_DEAD_END = "http://127.0.0.1:9"  # the discard port


def read_with_sky(home: Path, paths: Sequence[Path], commands: Sequence[Sequence[str]]) -> dict[str, Any]:
    """{"tasks": {file name: what SkyPilot makes of it}, "commands": {command line: its error, or null}, "in_a_region": {file name: its
    error, or null}}: of `sky launch FILE --region us-east-1`.
    """
    write_catalog(home)
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {
        "HOME": str(home),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "http_proxy": _DEAD_END,
        "https_proxy": _DEAD_END,
    }
    given = json.dumps({"paths": [str(p) for p in paths], "commands": [list(c) for c in commands]})
    done = subprocess.run(
        [sys.executable, "-m", "support.cloud.sky_reading"],
        cwd=ROOT / "tests",
        input=given,
        capture_output=True,
        text=True,
        env=env | SECRETS,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"SkyPilot refuses something:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def opening_comment(path: Path) -> str:
    """The lines before the first one that is not a comment, without their # signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])


def commands_in(text: str, program: str) -> Iterator[list[str]]:
    """Each command line of `program`, at the beginning of a line or alone in $(...), without its comment and what comes after it."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for found in [line.strip(), *re.findall(r"\$\(([^()]*)\)", line)]:
            if found.startswith(f"{program} "):
                words = shlex.shlex(found, posix=True, punctuation_chars=";&|")
                words.whitespace_split = True
                yield list(itertools.takewhile(lambda word: word[0] not in ";&|", words))


def _describe(path: str) -> dict[str, Any]:
    from sky.serve.serve_utils import validate_service_task

    import sky

    names = re.findall(r"^  ([A-Z_]+): null$", Path(path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    secrets = [(name, SECRETS[name]) for name in names]
    task = sky.Task.from_yaml_config(sky.utils.yaml_utils.read_yaml(path), secrets_overrides=secrets)
    task.validate()
    if task.service is not None:
        validate_service_task(task, pool=task.service.pool)  # what `sky serve up` and `sky jobs pool apply` begin with
    return {
        "service": None if task.service is None else task.service.to_yaml_config(),
        "is_pool": task.service is not None and task.service.pool,
        "num_nodes": task.num_nodes,
        "envs": task.envs,
        "secrets": sorted(names),
        "workdir": task.workdir,
        "mounts": {there: storage.source for there, storage in task.storage_mounts.items()} | (task.file_mounts or {}),
        "resources": [
            {
                "cloud": None if r.cloud is None else str(r.cloud).lower(),
                "accelerators": r.accelerators,
                "ports": r.ports,
                "use_spot": r.use_spot,
                "image_id": r.image_id,
            }
            for r in task.resources
        ],
    }


def _error_in_a_region(path: str) -> str | None:
    """Why `sky launch` does not take the file with `--region us-east-1`, or None; nothing is launched."""
    from sky.client.cli.command import _make_task_or_dag_from_entrypoint_with_overrides as make_task
    from sky.exceptions import NoCloudAccessError

    secrets = list(SECRETS.items())
    try:
        task = make_task((path,), region="us-east-1", secret=secrets)
        task.validate()
    except (ValueError, NoCloudAccessError) as e:
        return str(e) or type(e).__name__
    return None


def _error_of(command: Sequence[str]) -> str | None:
    """Why SkyPilot's command line rejects it, or None; nothing is executed."""
    import click
    from sky.client.cli.command import cli

    _, *words = command
    current: click.Command = cli
    try:
        while isinstance(current, click.Group):
            name = words.pop(0)
            found = current.get_command(click.Context(current), name)
            if found is None:
                return f"there is no command {name!r}"
            current = found
        current.make_context(current.name, words)
    except (click.ClickException, IndexError) as e:
        return str(e) or type(e).__name__
    return None


def _main() -> None:
    given: dict[str, Iterable[Any]] = json.load(sys.stdin)
    tasks = {Path(path).name: _describe(path) for path in given["paths"]}
    errors = {shlex.join(command): _error_of(command) for command in given["commands"]}
    regions = {Path(path).name: _error_in_a_region(path) for path in given["paths"]}
    print(json.dumps({"tasks": tasks, "commands": errors, "in_a_region": regions}))


if __name__ == "__main__":
    _main()
