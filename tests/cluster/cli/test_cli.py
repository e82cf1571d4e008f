"""From options to configuration, and the messages for options that cannot work; nothing is started."""

import json
import socket
from pathlib import Path

import pytest

from cluster.cli.main import main
from cluster.cli.options.parser import make_parser
from cluster.cli.options.settings import serve_config
from cluster.cli.options.values import parse_bytes
from cluster.cli.serve import main as serve_module
from cluster.config import dtype
from cluster.config.checkpoint_location import resolve_model
from cluster.config.serve import API_KEY_ENV
from cluster.keys.file import API_KEYS_ENV, read_keys
from cluster.system.net import is_loopback
from workers.errors import CheckpointError, ConfigError
from workers.native.bfloat16 import Bfloat16Support

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.model.v3").touch()
    return tmp_path


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(API_KEY_ENV, raising=False)
    monkeypatch.delenv(API_KEYS_ENV, raising=False)


def configure(folder, *options, device="cpu"):
    args = make_parser().parse_args(["serve", str(folder), *options])
    return serve_config(args, *resolve_model(args.model), device=device)


@pytest.fixture
def old_cpu(monkeypatch):
    """This machine, as one without instructions for bfloat16."""
    obstacle = "has no instructions for bfloat16."
    monkeypatch.setattr(dtype, "bfloat16_support", lambda: Bfloat16Support(obstacle=obstacle))


def test_defaults_on_the_cpu(folder, old_cpu):
    config = configure(folder)
    assert (config.host, config.port, config.api_key, config.model_name) == ("127.0.0.1", 8000, None, folder.name)
    engine = config.engine
    assert (engine.dtype, engine.block_size, engine.max_model_len, engine.tensor_parallel_size) == (
        "float32",
        16,
        2048,
        1,
    )
    assert engine.enable_prefix_caching


def test_the_dtype_on_the_cpu_is_the_checkpoints_where_the_cpu_has_it(folder, monkeypatch, old_cpu):
    config = configure(folder)
    assert (config.engine.dtype, config.dtype_reason) == (
        "float32",
        "float32, because this machine has no instructions for bfloat16.",
    )
    monkeypatch.setattr(dtype, "bfloat16_support", lambda: Bfloat16Support(instructions="avx512_bf16"))
    config = configure(folder)
    assert config.engine.dtype == "bfloat16"
    assert config.dtype_reason is not None and "AVX512_BF16" in config.dtype_reason
    config = configure(folder, "--dtype", "float32")
    assert (config.engine.dtype, config.dtype_reason) == ("float32", None)


def test_defaults_on_cuda(folder):
    engine = configure(folder, device="cuda").engine
    assert (engine.dtype, engine.block_size) == ("bfloat16", 16)
    # The one backend that needs other blocks gets them.
    assert configure(folder, "--attention-backend", "flash", device="cuda").engine.block_size == 256


@pytest.mark.parametrize(
    ("options", "sizes", "left_to_the_gpu"),
    [
        ("", (256, 2048), {"max_num_seqs", "max_num_batched_tokens"}),
        ("--max-num-seqs 3000", (3000, 3000), {"max_num_batched_tokens"}),
        ("--max-num-batched-tokens 100", (100, 100), {"max_num_seqs"}),
        ("--max-num-seqs 8 --max-num-batched-tokens 64", (8, 64), set()),
    ],
)
def test_on_cuda_the_ranks_set_the_sizes_that_no_option_sets(folder, options, sizes, left_to_the_gpu):
    engine = configure(folder, *options.split(), device="cuda").engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == sizes
    assert set(engine.sized_by_device) == left_to_the_gpu
    assert configure(folder, *options.split()).engine.sized_by_device == ()


def test_every_engine_option_arrives(folder):
    options = "-tp 2 --dtype float16 --max-model-len 512 --max-num-seqs 8 --max-num-batched-tokens 64 --block-size 32"
    options += " --num-kv-blocks 99 --kv-cache-memory 2MiB --gpu-memory-utilization 0.5 --no-prefix-caching"
    engine = configure(folder, *options.split()).engine
    assert engine.tensor_parallel_size == 2
    assert engine.dtype == "float16"
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_num_batched_tokens) == (512, 8, 64)
    assert (engine.block_size, engine.num_kv_blocks, engine.kv_cache_bytes) == (32, 99, 2 * 2**20)
    assert engine.gpu_memory_utilization == 0.5
    assert not engine.enable_prefix_caching
    assert engine.quantization is None
    assert configure(folder, "--quantization", "int4").engine.quantization == "int4"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_form_of_weights_runs_on_both_devices(folder, device):
    for form in ("int8", "int4", "fp8"):
        assert configure(folder, "--quantization", form, device=device).engine.quantization == form


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--tensor-parallel-size 3", r"Use one of 1, 2, 4\."),
        ("--tensor-parallel-size 0", r"Use one of 1, 2, 4\."),
        ("--max-model-len 4096", r"Use at most 2048\."),
        ("--host 0.0.0.0", "add --api-key KEY, set TRAMONTANE_API_KEY"),
        ("--host ::", "tramontane keys create"),
        ("--tls-cert a.pem", r"--tls-cert needs --tls-key too\. Add --tls-key\."),
        ("--tls-key a.pem", r"--tls-key needs --tls-cert too\."),
        ("--cors-origin https://a.org/path", "Write it like https://example.org"),
        ("--cors-origin *", "has no key"),
        ("--port 70000", "Use 1 to 65535"),
        ("--drain-timeout -1", "negative"),
        ("--drain-timeout inf", "infinite"),
        ("--placement-timeout 0", "--placement-timeout 0 is not a valid time"),
        ("--placement-timeout nan", "--placement-timeout nan"),
        ("--queue-timeout 0", "--queue-timeout 0 is not a valid time"),
        ("--ttft-objective nan", "--ttft-objective nan"),
        ("--scale-down-after -5", "--scale-down-after -5"),
        ("--name Mine_1", "lower-case letters"),
        ("--no-batches --data-dir d", "have no effect with --no-batches"),
        ("--batch-store redis://h", "not the address of a PostgreSQL database"),
        ("--gpu-memory-utilization 1.5", "gpu_memory_utilization"),
        ("--max-num-seqs 64 --max-num-batched-tokens 8", "max_num_batched_tokens"),
        (
            "--quantization int4 -tp 2",
            "on 2 ranks: .* attention heads' width would begin at 16, .* Use --tensor-parallel-size 1, or leave",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_with_one_line(folder, capsys, options, says):
    with pytest.raises(ConfigError, match=says):
        configure(folder, *options.split())
    assert main(["serve", str(folder), *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tramontane: ")
    assert captured.err.count("\n") == 1, "one line, no traceback"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--replicas 0", "MIN:MAX"),
        ("--replicas 3:1", "MIN:MAX"),
        ("--gateways 0", "less than 1"),
        ("--max-queued-tokens 0", "less than 1"),
        ("--routing-policy random", "prefix"),
        ("--kv-cache-memory lots", "amount of memory"),
    ],
)
def test_options_that_cannot_be_read_name_themselves(option, says, capsys):
    with pytest.raises(SystemExit) as e:
        main(["serve", *option.split()])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert option.split()[0] in err and says in err


def test_every_cluster_option_arrives(folder):
    options = "--replicas 0:3 --gateways 2 --name mine --ray-address h:1 --drain-timeout 0 --scale-down-after 5"
    options += " --ttft-objective 0.5 --routing-policy least_load --max-queued-tokens 9 --queue-timeout 7"
    config = configure(folder, *options.split())
    assert (config.min_replicas, config.max_replicas, config.num_gateways) == (0, 3, 2)
    assert (config.deployment, config.ray_address) == ("mine", "h:1")
    assert (config.drain_timeout_s, config.scale_down_after_s, config.ttft_objective_s) == (0, 5, 0.5)
    assert (config.routing_policy, config.max_queued_tokens, config.queue_timeout_s) == ("least_load", 9, 7)


def test_the_key_is_in_no_representation(folder):
    assert "s3cret" not in repr(configure(folder, "--api-key", "s3cret"))


def test_an_empty_or_broken_key_is_refused(folder):
    for key in ("", "two words", "ключ"):
        with pytest.raises(ConfigError, match="API key"):
            configure(folder, "--host", "0.0.0.0", "--api-key", key)


def test_a_key_opens_the_public_address(folder):
    assert configure(folder, "--host", "0.0.0.0", "--api-key", "k").api_key == "k"
    config = configure(folder, "--host", "0.0.0.0", "--api-keys", "keys.json")
    assert config.has_keys and not config.is_local
    assert config.api_keys == str(Path.cwd() / "keys.json"), "a gateway has another working directory"
    assert configure(folder).is_local and not configure(folder, "--api-key", "k").is_local


def test_every_security_option_arrives(folder):
    options = "--tls-cert /c --tls-key /k --cors-origin https://a.org --cors-origin http://b:1 --log-prompts"
    config = configure(folder, *options.split())
    assert (config.tls_cert, config.tls_key, config.log_prompts) == ("/c", "/k", True)
    assert config.cors_origins == ("https://a.org", "http://b:1")
    assert config.url(1) == "https://127.0.0.1:1"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--api-keys /none/keys.json", "/none/keys.json does not exist. Create it with"),
        ("--tls-cert /none/c --tls-key /none/k", "--tls-cert /none/c cannot be read"),
    ],
)
def test_missing_files_are_refused_before_anything_starts(folder, capsys, options, says):
    assert main(["serve", str(folder), *options.split()]) == 2
    assert says in capsys.readouterr().err


def test_keys_are_created_listed_used_and_revoked(tmp_path, capsys, monkeypatch):
    path = tmp_path / "keys.json"
    monkeypatch.setenv(API_KEYS_ENV, str(path))
    limits = "--requests-per-minute 6 --tokens-per-minute 70 --max-concurrency 8 --model a --model b --priority -1"
    assert main(["keys", "create", "alice", *limits.split(), "--admin"]) == 0
    secret = capsys.readouterr().out
    assert secret.startswith("tm-") and secret.count("\n") == 1, "nothing but the secret, for a shell's $(...)"
    (key,) = read_keys(path)
    assert main(["keys", "list"]) == 0
    table = capsys.readouterr().out
    for word in (key.id, "alice", "admin, 6 requests/min, 70 tokens/min, 8 at once, models a, b, priority -1"):
        assert word in " ".join(table.split())
    assert secret.strip() not in table and key.sha256 not in table
    assert main(["keys", "list", "--json", "--file", str(path)]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["limits"]["tokens_per_minute"] == 70 and line["usage"]["requests"] == 0
    assert main(["keys", "usage", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["keys", "revoke", "alice"]) == 0
    assert read_keys(path) == []
    capsys.readouterr()
    for arguments, says in (
        (["revoke", "alice"], "no key 'alice'"),
        (["create", "bob", "--priority", "99999999999"], "priority"),
        (["create", "bob", "--max-concurrency", "0"], "at least 1"),
        (["usage", "--days", "0"], "at least 1"),
        (["list", "--file", "/none/x"], "does not exist"),
    ):
        assert main(["keys", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_the_key_comes_from_the_environment_too(folder, monkeypatch):
    seen = []
    monkeypatch.setenv(API_KEY_ENV, "from-env")
    monkeypatch.setattr(serve_module, "serve", lambda args: seen.append(args.api_key))
    assert main(["serve", str(folder)]) == 0
    assert main(["serve", str(folder), "--api-key", "given"]) == 0
    assert seen == ["from-env", "given"]


def test_a_taken_port_is_refused_before_anything_starts(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    assert f"Port {port} on 127.0.0.1 cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_a_missing_folder_is_named(model, capsys):
    assert main(["serve", model]) == 2
    assert model in capsys.readouterr().err


def test_a_hub_id_without_the_hub_says_so(monkeypatch, capsys, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert main(["serve", "mistralai/Mistral-7B-v0.3"]) == 2
    assert "mistralai/Mistral-7B-v0.3 is not a folder here" in capsys.readouterr().err


def test_other_failures_exit_with_1_and_bugs_show_themselves(folder, monkeypatch, capsys):
    def fail(args):
        raise CheckpointError("The file is truncated.")

    monkeypatch.setattr(serve_module, "serve", fail)
    assert main(["serve", str(folder)]) == 1
    assert capsys.readouterr().err == "tramontane: The file is truncated.\n"


def test_an_error_is_shown_as_message_remedy_and_notes(folder, monkeypatch, capsys):
    def fail(args):
        error = CheckpointError("The file is truncated.", remedy="Download it again.")
        error.add_note("Nothing is lost: `tramontane batch resume out` continues.")
        raise error

    monkeypatch.setattr(serve_module, "serve", fail)
    assert main(["serve", str(folder)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "tramontane: The file is truncated. Download it again."
    assert second == "Nothing is lost: `tramontane batch resume out` continues."


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GiB", 4 * 2**30), ("500MB", 500 * 10**6), ("1.5g", 1_500_000_000), ("4096", 4096), (" 2 KiB ", 2048)],
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "4XB", "0", "GiB"])
def test_strange_amounts_are_refused(text):
    with pytest.raises(ValueError, match="memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected
