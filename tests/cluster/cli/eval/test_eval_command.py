"""`tramontane eval` itself against a small server on loopback: what it asks, prints, writes, and how it goes on after an interruption."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main

SUITE = """
name: mine
items:
  - {id: sum, prompt: "What is 1 + 1?", check: {numeric: 2}}
  - {id: word, prompt: "Say hello.", check: {contains: hello}}
  - {id: choice, prompt: "Is water wet? Answer:", check: {choice: {options: ["yes", "no"], answer: "yes"}}}
"""


class Server(ThreadingHTTPServer):
    """answers: {model: what it says}. fail_from: the number of the request from which on all get 500."""

    daemon_threads = True

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []
        self.fail_from: int | None = None
        self.key: str | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": name} for name in self.server.answers]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.bodies.append(body)
        if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
            return self._answer(401, {"error": {"message": "Wrong key."}})
        if server.fail_from is not None and len(server.bodies) >= server.fail_from:
            return self._answer(500, {"error": {"message": "It broke."}})
        if body["model"] not in server.answers:
            return self._answer(404, {"error": {"message": "No such model.", "code": "model_not_found"}})
        if body.get("echo"):
            prompt = body["prompt"]
            at = prompt.rindex(" ")
            found = {"token_logprobs": [None, -0.5 if prompt.endswith("yes") else -3.0], "text_offset": [0, at]}
            return self._answer(200, {"choices": [{"text": prompt, "logprobs": found}]})
        text = server.answers[body["model"]]
        choice = {"message": {"content": text}} if self.path.startswith("/v1/chat") else {"text": text}
        return self._answer(200, {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(**answers: str) -> Iterator[Server]:
    with Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def suite(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(SUITE)
    return str(tmp_path / "mine.yaml")


def run(server: Server, suite: str, tmp_path: Path, *options: str) -> int:
    return main(["eval", suite, "--url", server.url, "--output", str(tmp_path / "out"), "--patience", "0.01", *options])


def test_a_model_and_its_baseline(suite, tmp_path, capsys):
    with serving(new="2, hello", old="3, hello") as server:
        assert run(server, suite, tmp_path, "--baseline", "old", "--price-output", "1000000") == 0
        asked = [(b["model"], b.get("temperature"), b.get("seed")) for b in server.bodies if "messages" in b]
    assert sorted(asked) == sorted([("new", 0.0, 0)] * 2 + [("old", 0.0, 0)] * 2)
    out = capsys.readouterr().out
    assert "100% (44% to 100%)" in out
    assert "67% (21% to 94%)" in out
    assert "total: new is not clearly different from old" in out
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["models"][0]["total"]["cost_usd"] == 10.0
    assert data["models"][0]["suites"]["mine"]["share"]["passed"] == 3
    assert "Evaluation of new" in (tmp_path / "out" / "report.html").read_text()


def test_after_an_error_the_same_command_goes_on(suite, tmp_path, capsys):
    with serving(new="2, hello") as server:
        server.fail_from = 2
        assert run(server, suite, tmp_path, "--concurrency", "1") == 0
        assert "2 items have an error" in " ".join(capsys.readouterr().err.split())
        server.fail_from = None
        before = len(server.bodies)
        assert run(server, suite, tmp_path, "--concurrency", "1") == 0
        assert "What is 1 + 1?" not in json.dumps(server.bodies[before:]), "it was answered"
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["models"][0]["total"]["share"]["passed"] == 3


def test_a_model_that_answers_nothing_has_no_report(suite, tmp_path, capsys):
    with serving(small="hello") as server:
        assert (
            main(["eval", str(suite), "--url", server.url, "--model", "nobody", "--output", str(tmp_path / "out")]) == 1
        )
    shown = capsys.readouterr()
    said = " ".join(shown.err.split())
    assert "nobody has answered none of the 3 questions. The first error: No such model." in said
    assert "nobody" not in shown.out and not (tmp_path / "out" / "report.json").exists()


def test_completions_for_models_without_a_template(suite, tmp_path):
    with serving(base="2 hello") as server:
        assert run(server, suite, tmp_path, "--endpoint", "completions", "--set", "top_p=0.5") == 0
        bodies = [b for b in server.bodies if not b.get("echo")]
    assert {b["prompt"] for b in bodies} == {"What is 1 + 1?", "Say hello."}
    assert all(b["top_p"] == 0.5 for b in bodies)


def test_two_servers_with_one_name(suite, tmp_path, capsys):
    with serving(m="2 hello") as one, serving(m="nothing") as other:
        assert run(one, suite, tmp_path, "--baseline-url", other.url) == 0
        assert f"m ({other.url})" in capsys.readouterr().out


def test_a_judge(tmp_path, capsys):
    path = tmp_path / "judged.yaml"
    path.write_text('items: [{id: a, prompt: Greet me., check: {judge: "Is it kind?"}}]')
    with serving(m="Hello, friend!", strict="No.", mild="Yes.") as server:
        assert run(server, str(path), tmp_path) == 2
        assert "--judge" in capsys.readouterr().err
        assert run(server, str(path), tmp_path, "--judge", "strict") == 0
        assert "0% (" in capsys.readouterr().out
        assert run(server, str(path), tmp_path, "--judge", "mild") == 0
        assert "100% (" in capsys.readouterr().out
    assert any("Is it kind?" in json.dumps(b) for b in server.bodies)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "m"], "is the model itself"),
        (["--api-key", "wrong"], "Wrong key"),
    ],
)
def test_what_cannot_work_is_said(suite, tmp_path, capsys, options, message):
    with serving(m="2 hello") as server:
        server.key = "right" if "--api-key" in options else None
        assert run(server, suite, tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_no_server(suite, tmp_path, capsys):
    with serving(m="") as server:
        url = server.url
    assert main(["eval", suite, "--url", url, "--output", str(tmp_path / "out")]) == 1
    assert "Nothing answers" in capsys.readouterr().err


def test_an_unknown_suite(tmp_path, capsys):
    assert main(["eval", "poetry", "--output", str(tmp_path / "out")]) == 2
    assert "reasoning" in capsys.readouterr().err
