"""The examples of the README and of docs/api.md, run against a server: each gives an answer of the status and shape that the page prints.

An example is a fence `sh` with nothing but curl commands, or a fence `python`; the next fence is its answer: `json` (one document per
command), `http` (with a status line and headers), or `text` (what the program prints, or a stream of events). Values of the keys in EXACT
must be equal, others need the same type only: ids, times and the model's words differ.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.adapters import write_adapter
from support.documents import Fence, fences
from support.paths import DEMO_MODEL, ROOT
from support.servers.system_server import API_KEY, Server

from workers.checkpoint.model_config import load_model_config

pytestmark = pytest.mark.system

PAGES = (ROOT / "README.md", ROOT / "docs" / "api.md", ROOT / "docs" / "adapters.md")
ADAPTERS = "/srv/adapters"  # the folder of the pages' adapters
ADDRESS = "http://127.0.0.1:8000"  # of the pages' server
EXACT = ("object", "model", "role", "finish_reason", "type", "param", "code", "status", "name")
# `openai` raises unless an answer is what the client expects, so Python examples run in a process of their own.
TIMEOUT_S = 180


def examples(path: Path) -> Iterator[Any]:
    found = list(fences(path.read_text(encoding="utf-8")))
    for example, answer in itertools.pairwise(found):
        commands = [line for line in example.text.splitlines() if line and not line.startswith((" ", "#"))]
        is_curl = (
            example.kind == "sh"
            and commands
            and all(c.startswith("curl ") and ADDRESS in example.text for c in commands)
        )
        if is_curl or example.kind == "python":
            yield pytest.param(example, answer, id=f"{path.name}:{example.line}")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("support", "support-v2")):
        write_adapter(folder / name, load_model_config(DEMO_MODEL), seed=seed, strength=0.02)
    return folder


@pytest.mark.parametrize(("example", "answer"), [e for path in PAGES for e in examples(path)])
def test_the_example_gives_what_the_page_prints(
    example: Fence, answer: Fence, server: Server, adapters: Path, tmp_path: Path
) -> None:
    code = (
        example.text.replace(ADDRESS, server.url)
        .replace(ADAPTERS, str(adapters))
        .replace('api_key="none"', f'api_key="{API_KEY}"')
    )
    if example.kind == "python":
        command = [sys.executable, "-c", code]
    else:
        quiet = f'curl() {{ command curl -sS -H "Authorization: Bearer {API_KEY}" "$@" && echo; }}\n'
        command = ["bash", "-e", "-c", quiet + code]
    env = {**os.environ, "no_proxy": "*"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    compare(done.stdout, answer)


def compare(printed: str, answer: Fence) -> None:
    if answer.kind == "json":
        real, page = documents(printed), documents(answer.text)
        assert [shape(r) for r in real] == [shape(p) for p in page]
    elif answer.kind == "http":
        (real_head, _, real_body), (head, _, body) = (
            printed.replace("\r\n", "\n").partition("\n\n"),
            answer.text.partition("\n\n"),
        )
        status, *names = (line.split(":")[0] for line in head.splitlines())
        real_status, *real_names = (line.split(":")[0] for line in real_head.splitlines())
        assert real_status == status
        assert set(names) <= set(real_names)
        assert shape(json.loads(real_body)) == shape(json.loads(body))
    elif answer.text.startswith("data: "):
        real, page = events(printed), events(answer.text)
        assert real[-1] == page[-1] == "[DONE]"
        missing = [p for p in page if p not in real]
        assert not missing, f"no event of this shape came: {missing[0]}; these did: {real}"
    else:
        assert answer.kind == "text", f"line {answer.line}: the fence after an example is its answer"
        assert printed == answer.text


def documents(text: str) -> list[Any]:
    """JSON documents one after another."""
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        document, end = decoder.raw_decode(rest)
        found.append(document)
        rest = rest[end:].lstrip()
    return found


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [shape(json.loads(d)) if d.startswith("{") else d for d in data]


def shape(value: Any, key: str = "") -> Any:
    """The value without what differs between runs: scalars become their type's name unless their key is in EXACT.

    A list of numbers or texts becomes the types in it, for its length is the model's choice.
    """
    if isinstance(value, dict):
        return {k: shape(v, k) for k, v in value.items()}
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return [shape(v) for v in value]
    if isinstance(value, list):
        return sorted({type(v).__name__ for v in value})
    return value if key in EXACT else type(value).__name__


@pytest.mark.parametrize(
    ("real", "page"),
    [
        ('{"object": "list", "data": []}', '{"object": "model", "data": []}'),
        ('{"error": {"code": "a"}}', '{"error": {"code": "a", "param": null}}'),
        ('{"text": "a"}', '{"text": null}'),
        ('{"a": 1}', '{"a": 1}{"a": 1}'),
    ],
)
def test_a_wrong_page_is_noticed(real: str, page: str) -> None:
    with pytest.raises(AssertionError):
        compare(real, Fence("json", page, 1))
