"""The command itself, offline: tables, JSON, exit codes, and a YAML that SkyPilot accepts."""

import json
import socket

import pytest
import yaml
from support.checkpoints.tiny import write_tiny_checkpoint
from support.cloud.sky_reading import commands_in, opening_comment, read_with_sky

from cluster.cli.main import main
from cluster.plan.gpus import GPUS
from workers.device.memory import read_memory

MODEL = "mistralai/Mistral-7B-Instruct-v0.3"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A home without SkyPilot's files, and no network."""

    def refuse(*_):
        raise OSError("no network in this test")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_a_plan_for_one_gpu(capsys):
    assert main(["plan", MODEL, "--gpu", "A10G", "--context", "8192", "--concurrency", "32"]) == 0
    out = capsys.readouterr().out
    assert "7.25 billion parameters, bfloat16, 128 KiB of KV cache per token, full attention" in out
    assert "Recommended: 4 A10G, --tensor-parallel-size 4." in out
    row = next(line for line in out.splitlines() if line.startswith("A10G      4"))
    seven = next(line for line in out.splitlines() if line.startswith("7 x A10G  1"))
    assert " 32  yes" in seven  # the requests of all replicas
    assert "7.04" in seven
    assert "16,384" in row
    assert (
        "Defaults of `serve` there: up to 256 sequences and 2,048 tokens a step (batches: 64 beside other requests)."
        in out
    )
    assert "5.67" in row
    assert "g5.12xlarge" in out
    assert "SkyPilot's hosted catalog v8" in out


def test_a_plan_with_the_kv_cache_in_8_bits(capsys):
    assert main(["plan", MODEL, "--gpu", "A10G", "--kv-cache-dtype", "int8"]) == 0
    assert "66 KiB of KV cache per token in int8, full attention" in capsys.readouterr().out


def test_a_plan_with_adapters_leaves_room_for_their_slots(capsys):
    options = ["plan", MODEL, "--gpu", "A10G:1", "--concurrency", "2", "--json"]
    assert main(options) == 0
    without = json.loads(capsys.readouterr().out)["plans"][0]["memory"]
    assert main([*options, "--enable-lora", "--max-loras", "4"]) == 0
    memory = json.loads(capsys.readouterr().out)["plans"][0]["memory"]
    assert without["adapter_bytes"] == 0 and 1.34e9 < memory["adapter_bytes"] < 1.35e9
    assert memory["kv_cache_bytes"] < without["kv_cache_bytes"] - 1.3e9
    assert main(["plan", MODEL, "--gpu", "A10G", "--enable-lora", "--max-lora-rank", "16"]) == 0
    assert (
        "8 adapters of rank up to 16 at a time: 0.67 GB where one GPU has all of the model." in capsys.readouterr().out
    )


def test_without_a_gpu_option_all_gpus_are_compared_cheapest_first(capsys):
    assert main(["plan", MODEL, "--concurrency", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == 0
    assert {p["gpu"] for p in found["plans"]} == set(GPUS)
    costs = [
        p["offers"][0]["on_demand"]["usd_per_hour"]
        for p in found["plans"]
        if p["fits"] and p["offers"] and p["offers"][0]["on_demand"]
    ]
    assert len(costs) > 10
    assert costs == sorted(costs)


def test_json_says_what_the_table_says(capsys):
    assert main(["plan", MODEL, "--gpu", "A10G", "-tp", "4", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert (plan["gpu"], plan["tensor_parallel_size"], plan["fits"]) == ("A10G", 4, True)
    assert plan["memory"]["num_kv_blocks"] == plan["memory"]["needed_blocks"] == 16_384
    assert plan["defaults"] == {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_background_tokens": 64}
    price = plan["offers"][0]["on_demand"]
    assert price["source"]["date"]
    million_s = 1e6 / plan["speed"]["tokens_per_s"]
    assert price["usd_per_million_tokens"] == pytest.approx(price["usd_per_hour"] * million_s / 3600)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "T4"], "--gpu T4 is not known. Use one of A10G"),
        (["--gpu", "A10G", "-tp", "1", "--concurrency", "400"], "are missing. Use one of: --concurrency 5; --context"),
        (["--gpu", "A10G:4", "-tp", "2"], "--gpu A10G:4 and --tensor-parallel-size 2 are different numbers of GPUs."),
        (["--gpu", "A10G:x"], "--gpu A10G:x has no number of GPUs after the colon. Write it like A10G:4."),
        (
            ["--gpu", "H100:1", "--cloud", "gcp", "--write", "x.yaml"],
            "No machine with exactly 1 H100 is known on gcp with a price on demand. Choose another --gpu or "
            "--tensor-parallel-size, or add --spot, or remove --cloud.",
        ),
        (["--context", "40000"], "--context 40000 does not work with"),
        (["--context", "100", "--prompt-tokens", "100"], "--prompt-tokens 100 leaves no room"),
        (["--concurrency", "0"], "--concurrency 0 is not a number of requests"),
        (["--tensor-parallel-size", "3"], "Use one of 1, 2, 4, 8"),
        (["--gpu-memory-utilization", "1.5"], "Use a value above 0 and up to 1."),
        (["--gpu", "A10G:4", "--cloud", "gcp", "--write", "x.yaml"], "No machine with exactly 4 A10G is known on gcp"),
        (["--gpu", "A10G", "--dtype", "float32"], "--dtype float32 does not work on GPUs"),
        (["--gpu", "A10G", "--memory", "8GB"], "--memory has no effect without --gpu cpu."),
        (["--gpu", "cpu", "--write", "x.yaml"], "--write has no effect with --gpu cpu. Leave it out."),
        (["--gpu", "cpu", "--spot"], "--spot has no effect with --gpu cpu."),
        (["--gpu", "cpu", "--enable-lora"], "--enable-lora has no effect with --gpu cpu."),
        (["--max-loras", "4"], "--max-loras has no effect without --enable-lora."),
        (["--gpu", "cpu", "-tp", "2"], "--tensor-parallel-size has no effect with --gpu cpu."),
        (["--gpu", "cpu", "--memory", "4GB"], "does not fit in 4.0 GB of memory with 4 x 8,192 tokens"),
        (["--gpu", "cpu", "--concurrency", "0"], "--concurrency 0 is not a number of requests"),
    ],
)
def test_an_impossible_plan_is_rejected_with_a_remedy(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", MODEL, *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))


def test_no_gpu_is_no_size(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", MODEL, "--gpu", "A10G", "-tp", "0"])
    assert stopped.value.code == 2
    assert "--tensor-parallel-size/-tp: 0 is less than 1" in capsys.readouterr().err


def test_which_gpu_holds_7b_in_int4_with_a_context_of_32k(capsys, tmp_path):
    """One L4 holds 4 such contexts beside 4.3 GB of weights, and none but one beside the 14.5 GB of bfloat16."""
    options = ["--context", "32768", "--concurrency", "3", "--gpu", "L4", "-tp", "1"]
    assert main(["plan", MODEL, *options]) == 0
    assert "Recommended: 3 x L4, --tensor-parallel-size 1 --replicas 3" in capsys.readouterr().out
    task = tmp_path / "task.yaml"
    assert main(["plan", MODEL, *options, "--quantization", "int4", "--write", str(task)]) == 0
    assert "int4 weights and bfloat16" in capsys.readouterr().out
    assert "--quantization int4" in task.read_text()
    assert main(["plan", MODEL, *options, "--quantization", "int4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantization"] == "int4" and found["plans"][0]["memory"]["weight_bytes"] == pytest.approx(
        4.3e9, rel=0.01
    )


def test_a_plan_for_a_machine_without_a_gpu(capsys):
    options = ["--gpu", "cpu", "--memory", "12GB", "--cores", "8", "--dtype", "bfloat16"]
    assert main(["plan", MODEL, *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "12.0 GB of memory, 8 cores" in out
    assert f"Recommended: tramontane serve {MODEL} --device cpu" in out
    assert "--quantization int4 --max-model-len 8192 --max-num-seqs 4 --kv-cache-memory 4098MiB" in out
    assert main(["plan", MODEL, *options, "--json", "--quantization", "int4"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    assert (found["dtype"], found["quantization"], found["fits"]) == ("bfloat16", "int4", True)
    assert found["memory"]["needed_bytes"] <= found["memory"]["usable_bytes"] < 12e9
    assert found["command"] in out


def test_a_plan_without_options_is_for_this_machine(capsys, tmp_path):
    folder = write_tiny_checkpoint(tmp_path)
    assert main(["plan", str(folder), "--gpu", "CPU", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = read_memory()
    assert memory is not None and found["machine"]["memory_bytes"] == memory.total_bytes
    assert found["plans"][0]["dtype"] == "float32"  # as the checkpoint


def test_a_model_that_does_not_exist(capsys):
    assert main(["plan", "./nowhere", "--gpu", "A10G"]) == 2
    assert "The model folder ./nowhere does not exist" in capsys.readouterr().err


def test_a_local_checkpoint_is_read(capsys, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "my model", num_shards=2)
    assert main(["plan", str(folder), "--gpu", "L4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "bfloat16"  # although it is float32: see --dtype
    assert found["workload"]["context"] == 4096  # what it was made for
    assert [p["tensor_parallel_size"] for p in found["plans"]] == [1, 2, 4, 8]  # it has eight query heads
    next(folder.glob("model-*.safetensors")).unlink()
    assert main(["plan", str(folder), "--gpu", "L4"]) == 1
    assert "which does not exist. Download it too." in capsys.readouterr().err


def test_skypilot_accepts_what_is_written(tmp_path, capsys):
    folder = write_tiny_checkpoint(tmp_path / "tuned")
    asked = {
        "on_demand.yaml": [MODEL, "--gpu", "A10G"],
        "spot.yaml": [MODEL, "--gpu", "A100-80GB", "--spot", "--gpu-memory-utilization", "0.85", "--concurrency", "16"],
        "local.yaml": [str(folder), "--gpu", "L4", "-tp", "1"],
        "seven.yaml": [MODEL, "--gpu", "A10G:1"],
    }
    for name, options in asked.items():
        assert main(["plan", *options, "--write", str(tmp_path / name)]) == 0, capsys.readouterr().err
    paths = [tmp_path / name for name in asked]
    commands = [c for path in paths for c in commands_in(opening_comment(path), "sky")]
    assert len(commands) == 8
    read = read_with_sky(tmp_path / "sky_home", paths, commands)
    assert set(read["commands"].values()) == {None}, read["commands"]
    tasks = read["tasks"]
    assert [(r["cloud"], r["accelerators"], r["use_spot"]) for r in tasks["on_demand.yaml"]["resources"]] == [
        ("aws", {"A10G": 4}, False)
    ]
    assert tasks["on_demand.yaml"]["envs"]["MODEL"] == MODEL
    # Several replicas: sky/cluster.yaml with a node for each.
    assert (tasks["on_demand.yaml"]["num_nodes"], tasks["seven.yaml"]["num_nodes"]) == (1, 7)
    assert [(r["cloud"], r["accelerators"]) for r in tasks["seven.yaml"]["resources"]] == [("aws", {"A10G": 1})]
    assert tasks["seven.yaml"]["envs"]["SERVE_OPTIONS"] == "--max-model-len 8192 --max-num-seqs 5"
    assert "RAY_AUTH_TOKEN" in tasks["seven.yaml"]["secrets"]
    assert tasks["on_demand.yaml"]["envs"]["SERVE_OPTIONS"] == "--max-model-len 8192 --max-num-seqs 32"
    assert sorted((r["cloud"], r["use_spot"]) for r in tasks["spot.yaml"]["resources"]) == [
        ("azure", True),
        ("gcp", True),
    ]
    assert "--gpu-memory-utilization 0.85" in tasks["spot.yaml"]["envs"]["SERVE_OPTIONS"]
    local = yaml.safe_load((tmp_path / "local.yaml").read_text())
    assert local["file_mounts"] == {"~/model": str(folder)}
    assert tasks["local.yaml"]["envs"]["MODEL"] == "~/model"
    assert tasks["local.yaml"]["envs"]["SERVE_OPTIONS"].endswith("--dtype bfloat16 --served-model-name tuned")
    # The script and everything else is sky/serve.yaml's.
    assert tasks["spot.yaml"]["secrets"] == ["HF_TOKEN", "TRAMONTANE_API_KEY"]
    assert "tramontane serve" in local["run"]


def test_an_existing_file_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert main(["plan", MODEL, "--gpu", "A10G", "--write", str(path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_the_written_options_are_options_of_serve(tmp_path):
    """`tramontane serve` parses them."""
    from cluster.cli.options.parser import make_parser

    path = tmp_path / "a.yaml"
    options = ["--gpu", "H100", "-tp", "8", "--concurrency", "2000", "--context", "1024", "--dtype", "float16"]
    options += ["--kv-cache-dtype", "fp8"]
    assert main(["plan", MODEL, *options, "--gpu-memory-utilization", "0.8", "--write", str(path)]) == 0
    words = yaml.safe_load(path.read_text())["envs"]["SERVE_OPTIONS"].split()
    args = make_parser().parse_args(["serve", MODEL, *words])
    # The ranks choose the tokens of a step, as the plan did.
    assert (args.max_model_len, args.max_num_seqs, args.max_num_batched_tokens) == (1024, 2000, None)
    assert (args.dtype, args.kv_cache_dtype, args.gpu_memory_utilization) == ("float16", "fp8", 0.8)
