"""`tramontane doctor` as a user and a script meet it, on this machine, without Ray: what it prints and how it exits."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.hosts.doctor_runs import messages
from support.hosts.ray_hosts import free_port

from cluster.cli.main import main
from cluster.config.checkpoint_location import find_model
from cluster.doctor import local
from cluster.doctor.examine import num_visible_gpus
from workers.device.probe import NoGpu, probe
from workers.errors import ConfigError

QUICK = ("doctor", "--no-all-reduce")


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def broken(tmp_path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(find_model(None), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return folder


def test_a_healthy_machine(port, capsys):
    assert main([*QUICK, "--port", str(port)]) == 0
    said = capsys.readouterr().out
    for check in ("versions", "model", "interface", "gpu", "memory", "shared memory", "disk", "port"):
        assert any(line.startswith(check) for line in said.splitlines()), said
    assert "no problems" in said.splitlines()[-1]


def test_a_truncated_file_is_named_in_the_table_and_in_json(broken, port, capsys):
    assert main([*QUICK, str(broken), "--port", str(port)]) == 1
    said = capsys.readouterr()
    assert "model.safetensors is truncated" in said.out.replace("\n", " ") and "→ Download it again" in said.out
    assert said.err.splitlines()[-1].startswith("tramontane: Not ready to serve: 1 problem")
    assert main([*QUICK, str(broken), "--port", str(port), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["num_problems"] == 1 and report["all_reduce"] is None
    assert len(messages(report, "model", "problem")) == 1
    assert report["nodes"][0]["model"]["folder"] == str(broken)


@pytest.mark.parametrize(
    "options",
    [("--tensor-parallel-size", "0"), ("--port", "0"), ("--port", "70000"), ("--timeout", "0"), ("--timeout", "inf")],
)
def test_an_invalid_option_value(options, capsys):
    try:
        status = main([*QUICK, *options])
    except SystemExit as e:  # the parser's own end
        status = e.code
    assert status == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("model", ["/no/such/folder", "./nor/this"])
def test_a_folder_that_does_not_exist(model, port, capsys):
    assert main([*QUICK, model, "--port", str(port), "--json"]) == 1
    (message,) = messages(json.loads(capsys.readouterr().out), "model", "problem")
    assert model in message


def test_a_tensor_parallel_size_that_does_not_divide_the_model(port, capsys):
    assert main([*QUICK, "-tp", "3", "--port", str(port), "--json"]) == 1
    (message,) = messages(json.loads(capsys.readouterr().out), "model", "problem")
    assert "--tensor-parallel-size 3 does not work" in message


def test_device_cuda_without_a_gpu(port, capsys):
    if not isinstance(probe(), NoGpu):
        pytest.skip("this machine has a GPU")
    assert main(["doctor", "--device", "cuda", "--port", str(port), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert messages(report, "gpu", "problem")
    assert report["all_reduce"]["outcome"] == "not tried"
    assert report["all_reduce"]["reason"] == "No node can run a rank on a GPU."
    assert messages(report, "model", "ok")


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("GPU-6d3a", 1), ("", 0), ("-1", 0), (" 2 , ", 1)])
def test_how_many_gpus_cuda_visible_devices_leaves(visible, count):
    assert num_visible_gpus(visible) == count


def test_a_ray_address_that_does_not_answer_is_one_finding_among_the_machines_own(port, capsys):
    assert main(["doctor", "--ray-address", f"127.0.0.1:{port}", "--port", str(port), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (message,) = messages(report, "ray", "problem")
    assert f"Nothing answers at the Ray address 127.0.0.1:{port}" in message
    assert report["nodes"][0]["machine"]["num_cpus"] >= 1


@pytest.mark.parametrize(("page", "status"), [("<html><title>Tramontane</title>", 0), ("<html>It works!", 1)])
def test_a_port_in_use(page, status, capsys):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *args: object) -> None: ...  # type: ignore[override]

    server = HTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        assert main([*QUICK, "--port", str(server.server_port), "--json"]) == status
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
    found = messages(json.loads(capsys.readouterr().out), "port", "ok" if status == 0 else "problem")
    assert len(found) == 1 and str(server.server_port) in found[0]


GIB = 2**30


@pytest.mark.parametrize(
    ("answer", "severity", "said"),
    [
        (14 * GIB, "warning", "The first start downloads 14.0 GiB;"),
        (10**18, "problem", "not enough disk space to download owner/name"),
        (
            ConfigError("owner/name is gated.", remedy="Accept its terms."),
            "problem",
            "cannot be downloaded: owner/name is gated.",
        ),
    ],
)
def test_a_model_that_is_not_downloaded_yet(monkeypatch, capsys, port, answer, severity, said):
    def download_bytes(model: str, *, revision: str | None, gguf_file: str | None) -> int:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(local, "find_model", lambda model, revision, gguf_file: None)
    monkeypatch.setattr(local, "download_bytes", download_bytes)
    options = [*QUICK, "owner/name", "--port", str(port), "--json"]
    assert main(options) == (severity == "problem")
    report = json.loads(capsys.readouterr().out)
    (message,) = messages(report, "model", severity)
    assert said in message
    if isinstance(answer, ConfigError):
        assert [f["remedy"] for f in report["findings"] if f["sentence"] == message] == ["Accept its terms."]
    assert main([*options, "--strict"]) == 1, "--strict fails for warnings too"


def test_the_check_of_a_gpu_says_why_there_is_none(capsys, tmp_path):
    if not isinstance(probe(), NoGpu):
        pytest.skip("this machine has a GPU; `make test-gpu` checks it")
    report = tmp_path / "gpu.json"
    assert main(["doctor", "--gpu", "--gpu-report", str(report)]) == 2
    assert "This process cannot use a GPU: " in capsys.readouterr().err
    assert not report.exists()
