"""`tramontane bench` itself against a small server on loopback: what it finds out, sends, counts, prints and writes."""

import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.servers.openai_server import OpenAIServer

from cluster.cli.main import main

LOAD = ("--concurrency", "2", "--requests", "6", "--prompt-tokens", "20", "--output-tokens", "4", "--warmup", "0")


def run(server: OpenAIServer, tmp_path: Path, *options: str, load: tuple[str, ...] = LOAD) -> dict[str, Any]:
    """The JSON of a benchmark that ends well."""
    out = tmp_path / "out.json"
    assert main(["bench", "--url", server.url, *load, "--json", str(out), *options]) == 0
    return dict(json.loads(out.read_text()))


def loads(server: OpenAIServer) -> list[dict[str, Any]]:
    """The bodies of the load, without those that ask what the server takes."""
    return [body for body in server.bodies if body["max_tokens"] > 1]


def test_a_closed_loop_from_ids_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = tmp_path / "out.html"
    with OpenAIServer() as server:
        found = run(server, tmp_path, "--html", str(html), "--objective", "ttft=1m", "--price-per-hour", "1")
        bodies = loads(server)
    assert len(bodies) == 6
    assert all(len(b["prompt"]) == 20 and all(i >= 1000 for i in b["prompt"]) for b in bodies)
    assert len({tuple(b["prompt"]) for b in bodies}) == 6
    assert {(b["model"], b["max_tokens"], b["ignore_eos"], b["temperature"]) for b in bodies} == {("tiny", 4, True, 0)}
    (level,) = found["levels"]
    assert (level["level"], level["ok"], level["failed"]) == ("2 streams", 6, 0)
    assert (level["rounds"][0]["num_prompt_tokens"], level["rounds"][0]["num_output_tokens"]) == (120, 24)
    assert level["metrics"]["met"]["median"] == 100
    assert level["metrics"]["usd_per_million"]["median"] > 0
    assert found["servers"] == [{"url": server.url, "model": "tiny", "endpoint": "completions", "prompts": "token ids"}]
    remarks = " ".join(found["remarks"])
    assert not any(words in remarks for words in ("failed", "as text", "refuses", "no token counts", "shorter"))
    out = capsys.readouterr().out
    assert re.search(r"2 streams +6 +0 ", out)
    assert "2 streams" in html.read_text()


def test_the_same_seed_sends_the_same_bodies_and_rounds_differ(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        run(server, tmp_path, "--rounds", "2", "--concurrency", "1")
        first = loads(server)
        server.bodies.clear()
        run(server, tmp_path, "--rounds", "2", "--concurrency", "1")
        assert loads(server) == first
    assert len({tuple(b["prompt"]) for b in first}) == 12


def test_warm_up_requests_do_not_count(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        found = run(server, tmp_path, "--warmup", "3")
        assert server.num_loaded == 9
    assert found["levels"][0]["ok"] == 6


def test_what_a_server_does_not_take_is_left_out_and_named(tmp_path: Path) -> None:
    with OpenAIServer(refuses=("ignore_eos",), takes_ids=False, sends_usage=False) as server:
        found = run(server, tmp_path)
        bodies = loads(server)
    assert all(isinstance(b["prompt"], str) and "ignore_eos" not in b for b in bodies)
    remarks = " ".join(found["remarks"])
    for words in ("sent as text", "refuses `ignore_eos`", "no token counts", "a word is taken for a token"):
        assert words in remarks
    assert found["levels"][0]["rounds"][0]["num_output_tokens"] == 24  # events


def test_text_has_the_asked_number_of_tokens_where_usage_says_how_long_a_word_is(tmp_path: Path) -> None:
    with OpenAIServer(has_tokenize=False, tokens_per_word=2, num_extra=4) as server:
        found = run(server, tmp_path, "--endpoint", "chat")
        bodies = loads(server)
    assert all(len(b["messages"][0]["content"].split()) == 8 for b in bodies)  # 4 + 2 x 8 are 20
    assert found["levels"][0]["rounds"][0]["num_prompt_tokens"] == 120
    assert found["levels"][0]["rounds"][0]["num_events"] == 24  # without the opening one, which only has a role


def test_ids_from_a_vocabulary_of_a_given_size(tmp_path: Path) -> None:
    with OpenAIServer(has_tokenize=False) as server:
        run(server, tmp_path, "--vocab-size", "80", "--set", "temperature=0.5", "--set", "user=me")
        bodies = loads(server)
    assert {i for b in bodies for i in b["prompt"]} <= set(range(10, 80))
    assert {(b["temperature"], b["user"]) for b in bodies} == {(0.5, "me")}


@pytest.mark.parametrize(
    ("fate", "kind", "message"),
    [
        (429, "HTTP 429", "status 429"),
        (500, "HTTP 500", "status 500"),
        (401, "HTTP 401", "status 401"),
        ("break", "stream broke off", ""),
        ("end", "stream ended early", "before its end"),
        ("error", "error in the stream", "out of memory"),
    ],
)
def test_failures_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fate: int | str, kind: str, message: str
) -> None:
    with OpenAIServer(fail=lambda n: fate if n % 3 == 1 else None, headers={"Retry-After": "0"}) as server:
        found = run(server, tmp_path)
    (level,) = found["levels"]
    assert (level["ok"], level["failed"]) == (4, 2)
    assert level["problems"][kind]["num"] == 2
    assert message in level["problems"][kind]["message"]
    out = " ".join(capsys.readouterr().out.split())
    assert f"2 requests failed: {kind}" in out
    if fate == 429:
        assert "It asked to wait up to 0 s." in out


def test_a_server_that_dies_is_an_error_of_each_later_request(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        died = threading.Event()

        def stop(number: int) -> int | None:
            if number == 3:
                # The listener first: no later connection is accepted, and this one breaks.
                server._loop.create_task(server._runner.cleanup())
                died.set()
                return 500
            return None

        server.fail = stop
        found = run(server, tmp_path, "--concurrency", "1")
        assert died.is_set()
    (level,) = found["levels"]
    assert (level["ok"], level["failed"]) == (3, 3)
    assert level["problems"]["cannot connect"]["num"] == 2


def test_two_servers_take_turns_and_get_the_same_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with OpenAIServer(token_s=0.005) as slow, OpenAIServer(model="quick", key="k2") as quick:
        found = run(
            slow, tmp_path, "--compare", quick.url, "--compare-api-key", "k2", "--rounds", "3", "--output-tokens", "2-6"
        )
        first, second = loads(slow), loads(quick)
    assert len({b["max_tokens"] for b in first}) > 1
    assert sorted(b["max_tokens"] for b in first) == sorted(b["max_tokens"] for b in second)
    assert not {tuple(b["prompt"]) for b in first} & {tuple(b["prompt"]) for b in second}
    assert {b["model"] for b in second} == {"quick"}
    assert [(row["level"], row["server"], len(row["rounds"])) for row in found["levels"]] == [
        ("2 streams", 0, 3),
        ("2 streams", 1, 3),
    ]
    assert found["ratios"][0]["metrics"]["gap_p50"]["high"] < 1
    assert re.search(r"generated tokens/s .* better", capsys.readouterr().out)


def test_the_key_of_one_server_is_not_sent_to_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with OpenAIServer(key="secret") as first, OpenAIServer(key="secret") as second:
        options = ["--url", first.url, "--compare", second.url, "--api-key", "secret"]
        assert main(["bench", *options, *LOAD]) == 2
        error = capsys.readouterr().err
    assert f"--compare {second.url}: a key is needed. Check its key, --compare-api-key." in error


def test_a_poisson_load_and_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,30,3\n2023-11-16 18:15:47.6805900,9,2\n"
        "2023-11-16 18:15:48.6805900,999,2\n"
    )
    with OpenAIServer() as server:
        load = ("--rate", "500", "--requests", "20", "--prompt-tokens", "5", "--output-tokens", "2", "--warmup", "0")
        found = run(server, tmp_path, load=load)
        assert (found["levels"][0]["level"], found["levels"][0]["ok"]) == ("500 requests/s", 20)
        server.bodies.clear()
        load = ("--trace", str(trace), "--trace-speed", "100", "--max-prompt-tokens", "500", "--warmup", "0")
        found = run(server, tmp_path, "--all-requests", load=load)
        assert [(len(b["prompt"]), b["max_tokens"]) for b in loads(server)] == [(30, 3), (9, 2)]
    assert found["levels"][0]["level"] == "azure, 100 times as fast"
    asked = [r["asked_s"] for r in found["levels"][0]["rounds"][0]["requests"]]
    assert sorted(asked) == pytest.approx([0, 0.01])


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(number: int) -> None:
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # the server's thread; the signal is for the main one

    with OpenAIServer(fail=lambda n: interrupt(n)) as server:
        found = run(server, tmp_path, "--requests", "5000", "--concurrency", "1")
    assert found["complete"] is False
    assert 5 <= found["levels"][0]["ok"] < 5000
    assert "The benchmark was stopped before its end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--concurrency", "1", "--rate", "2"), "--concurrency and --rate are different loads"),
        (("--trace-speed", "2"), "--trace-speed has no effect without --trace"),
        (("--num-prefixes", "2"), "--num-prefixes has no effect without --shared-prefix"),
        (("--compare-model", "x"), "--compare-model has no effect without --compare"),
        (("--all-requests",), "--all-requests has no effect without --json"),
        (("--json", "/nowhere/x.json"), "--json /nowhere/x.json cannot be written"),
        (("--trace", "/nowhere.csv"), "--trace /nowhere.csv cannot be read"),
        (("--text", "--vocab-size", "9"), "--vocab-size has no effect on prompts that are text"),
        (("--url", "ftp://x"), "--url ftp://x is not the address of a server"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--concurrency=0", "--rate=0", "--prompt-tokens=x", "--objective=x", "--timeout=-1"]
)
def test_values_that_cannot_be_read_are_refused_with_the_form(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["bench", option])
    assert e.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_plots_without_matplotlib_say_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["bench", "--plots", str(tmp_path)]) == 2
    assert "Install it with: pip install 'tramontane[bench]'" in capsys.readouterr().err


def test_plots_are_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with OpenAIServer() as server:
        run(server, tmp_path, "--plots", str(tmp_path / "plots"))
    files = sorted((tmp_path / "plots").iterdir())
    assert [f.name for f in files] == ["e2e_distribution.png", "gap_distribution.png", "ttft_distribution.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_a_server_that_cannot_be_measured_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for options in ((), ("--model", "m")):
        assert main(["bench", "--url", f"http://127.0.0.1:{port}", *options]) == 1
        assert "Connection refused" in capsys.readouterr().err
    with OpenAIServer(key="secret") as server:
        assert main(["bench", "--url", server.url]) == 2
        assert "a key is needed" in capsys.readouterr().err
        assert main(["bench", "--url", server.url, "--model", "m"]) == 2
        assert "refuses this client: a key is needed" in capsys.readouterr().err
    with OpenAIServer(has_models=False) as server:
        assert main(["bench", "--url", server.url]) == 2
        assert "has no /v1/models" in capsys.readouterr().err
    with OpenAIServer(refuses=("model",)) as server:
        assert main(["bench", "--url", server.url]) == 2
        assert "refuses even a request for one token (HTTP 400): unknown field" in capsys.readouterr().err
    with OpenAIServer() as server:
        assert main(["bench", "--url", f"{server.url}/elsewhere", "--model", "m"]) == 2
        assert "has no /v1/completions" in capsys.readouterr().err


def test_keys_are_not_written_into_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenAIServer(key="secret") as server:
        argv = ["tramontane", "bench", "--api-key", "secret", "--compare-api-key=secret", "--url", "x y"]
        monkeypatch.setattr("sys.argv", argv)
        found = run(server, tmp_path, "--api-key", "secret")
    assert found["command"] == "tramontane bench --api-key ... --compare-api-key=... --url 'x y'"
    assert "secret" not in json.dumps(found)
