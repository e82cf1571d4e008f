"""From data to a served adapter, with the commands of the README: make data, fine-tune the demo model, evaluate, load as a canary, promote.

`make test-story` runs it. Each step is the real command in a process of its own, beside a real server. The numbers are those of a training
of less than a minute.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from support.paths import DEMO_MODEL, ROOT
from support.servers.system_server import API_KEY, COMMAND, Server

pytest.importorskip("peft")

FINETUNE = ROOT / "examples" / "finetune"
FIRST_STEPS, ALL_STEPS = 10, 45
OPTIONS = ("--batch-size", "8", "--accumulate", "1", "--lr", "0.003", "--rank", "8", "--save-every", "10")

pytestmark = [pytest.mark.story, pytest.mark.timeout(400)]


def run(*words: str | Path, cwd: Path) -> str:
    """What a command prints. It fails the test where it fails."""
    env = {**os.environ, "TRAMONTANE_API_KEY": API_KEY}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def ask(server: Server, model: str, item: dict, *, system: str, request_id: str) -> tuple[str, str | None]:
    """The answer, and the revision that gave it."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": item["prompt"]}]
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps({"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}).encode(),
        headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json", "X-Request-Id": request_id},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
        return answer["choices"][0]["message"]["content"].strip(), response.headers.get("X-Tramontane-Adapter")


def test_from_data_to_a_promoted_adapter(tmp_path):
    train = [
        sys.executable,
        FINETUNE / "finetune.py",
        DEMO_MODEL,
        "support/train.jsonl",
        "--output",
        "adapter",
        *OPTIONS,
    ]
    run(sys.executable, FINETUNE / "make_data.py", "support", "--train", "360", "--items", "32", cwd=tmp_path)
    server = Server("--enable-lora")
    try:
        # Loaded early: what the first steps gave. Training then goes on from there.
        run(*train, "--steps", str(FIRST_STEPS), cwd=tmp_path)
        url = ("--url", server.url)
        said = run(COMMAND, "adapters", "load", "support", "adapter", *url, cwd=tmp_path)
        first = said.split()[2]
        assert f"Going on from step {FIRST_STEPS}." in run(*train, "--steps", str(ALL_STEPS), cwd=tmp_path)
        assert (tmp_path / "adapter" / "loss.png").exists()

        said = run(COMMAND, "adapters", "load", "support", "adapter", "--canary", "50%", *url, cwd=tmp_path)
        canary = said.split()[4]
        assert first != canary and canary.startswith("support@")
        run(
            COMMAND,
            "eval",
            "support/support.yaml",
            "--model",
            canary,
            "--baseline",
            "demo_model",
            "--output",
            "eval",
            *url,
            cwd=tmp_path,
        )
        new, base = json.loads((tmp_path / "eval" / "report.json").read_text())["models"]
        assert new["suites"]["support"]["share"]["value"] > 0.6
        assert base["suites"]["support"]["share"]["value"] < 0.3
        difference = new["against_baseline"]["support"]
        assert difference["low"] > 0 and difference["p_value"] < 0.001, "the interval excludes zero"

        suite = yaml.safe_load((tmp_path / "support" / "support.yaml").read_text())
        items, system = suite["items"], suite["system"]
        during = [ask(server, "support", item, system=system, request_id=f"r{i}") for i, item in enumerate(items[:12])]
        assert {revision for _, revision in during} == {first, canary}, "each has its share of new requests"
        run(COMMAND, "adapters", "promote", "support", *url, cwd=tmp_path)
        after = [ask(server, "support", item, system=system, request_id=f"r{i}") for i, item in enumerate(items[:12])]
        assert {revision for _, revision in after} == {canary}
        right = [answer == item["check"]["exact"] for (answer, _), item in zip(after, items, strict=False)]
        assert sum(right) >= 7, during
        assert ask(server, "demo_model", items[0], system=system, request_id="base")[1] is None
    finally:
        server.kill()
