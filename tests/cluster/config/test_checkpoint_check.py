"""What is not a checkpoint, or is a hostile one, is refused in one sentence before anything starts, and nothing outside it is opened."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints.checkpoint_files import CONFIG, WEIGHTS, headers_of, write_checkpoint, write_weights

from cluster.cli.main import main
from cluster.config.checkpoint_check import check_checkpoint, examine_checkpoint
from cluster.config.checkpoint_kinds import SUPPORTED
from cluster.doctor.model_files import read_model
from workers.errors import CheckpointError, ConfigError, TramontaneError

MAX_SECONDS = 10.0  # each takes milliseconds; a busy machine may pause


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def fault_of(folder: Path, **options: str) -> TramontaneError:
    start = time.monotonic()
    with pytest.raises((ConfigError, CheckpointError)) as e:
        check_checkpoint(folder, **options)
    assert time.monotonic() - start < MAX_SECONDS
    error = e.value
    assert error.remedy is not None and error.remedy.endswith("."), "the message must say what to do"
    assert len(error.message) < 500 and "\n" not in error.message, "one sentence"
    return error


def test_a_complete_checkpoint(folder: Path) -> None:
    check_checkpoint(folder)
    found = examine_checkpoint(folder)
    assert found.config is not None and found.num_files == 1 and found.num_bytes == (folder / WEIGHTS).stat().st_size


def test_a_dense_checkpoint_is_examined_without_torch(folder: Path) -> None:
    """Which takes a second of a server's start."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom cluster.config.checkpoint_check import examine_checkpoint\n"
        f"assert not examine_checkpoint(Path({str(folder)!r})).faults\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


@pytest.mark.parametrize(
    ("files", "message", "remedy"),
    [
        ([], "is empty.", SUPPORTED),
        (["a.ggml"], "has weights in the old GGML format (a.ggml), which is not supported.", SUPPORTED),
        (["a.gguf", "b.gguf"], "has 2 GGUF models (a.gguf, b.gguf).", "Name one with --gguf-file."),
        (["config.json", "mmproj-a.gguf"], "has no GGUF file of a language model.", "Name one with --gguf-file."),
        (["adapter_config.json", "adapter_model.safetensors"], "has a LoRA adapter (adapter_config.json)", "Merge the"),
        (["adapter_model.bin", "config.json"], "has a LoRA adapter (adapter_model.bin), not a model.", "Merge the"),
        (["tokenizer.json"], "has only a tokenizer (tokenizer.json): neither config.json", SUPPORTED),
        (
            ["pytorch_model.bin", "config.json"],
            "has the weights only as a pickle file (pytorch_model.bin)",
            "Convert it to safetensors.",
        ),
        (
            ["consolidated.00.pth", "params.json"],
            "has the weights only as a pickle file (consolidated.00.pth)",
            "Convert it to",
        ),
        (["model.safetensors"], "has weights (model.safetensors), but neither config.json", "Put the configuration"),
        (["README.md", "a", "b", "c"], "has no model, but README.md, a, b and 1 more: neither", SUPPORTED),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else None,
)
def test_what_is_there_instead_is_said(tmp_path: Path, files: list[str], message: str, remedy: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    error = fault_of(tmp_path)
    assert error.message.startswith(f"{tmp_path} {message.split('(')[0]}") and message in error.message
    assert error.remedy is not None and error.remedy.startswith(remedy)
    assert [f.message for f in read_model(str(tmp_path)).faults] == [error.message], "the doctor says the same"


@pytest.mark.parametrize("command", [["serve"], ["generate", "--prompt", "x"], ["plan"]], ids=lambda c: c[0])
def test_every_command_says_it_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "model.ggml").touch()
    name, *options = command
    assert main([name, str(tmp_path), *options]) != 0
    said = capsys.readouterr().err
    assert f"{tmp_path} has weights in the old GGML format (model.ggml), which is not supported." in " ".join(
        said.split()
    )
    assert "Ray" not in said


def test_plan_warns_of_what_does_not_change_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.model.v3").unlink()
    (folder / "tokenizer.json").write_text("{}")
    error = fault_of(folder)
    assert "tokenizer.json is not a tokenizer in Hugging Face's format" in error.message
    assert main(["plan", str(folder)]) == 0
    assert f"warning: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tekken.json", "tekken"), ("tokenizer.json", "Hugging Face's format"), ("tokenizer.model.v7", "SentencePiece")],
)
def test_a_tokenizer_of_each_kind_that_cannot_be_read_is_named(folder: Path, name: str, kind: str) -> None:
    (folder / "tokenizer.model.v3").unlink()
    (folder / name).write_text("{}")
    error = fault_of(folder)
    assert str(folder / name) in error.message and kind in error.message
    assert error.remedy


SMALL = ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
SMALL += ["chat_template.json", "special_tokens_map.json", "tekken.json"]


@pytest.mark.parametrize("name", [*SMALL, WEIGHTS, "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["a named pipe", "a directory", "a socket"])
def test_only_regular_files_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    else:
        monkeypatch.chdir(folder)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(name)
    assert fault_of(folder).message == f"{path} is {kind}, not a regular file."


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer_config.json", "tokenizer.model.v3"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, folder: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).replace(outside) if (folder / name).exists() else outside.write_text("{}")
    (folder / name).symlink_to(outside)
    assert fault_of(folder).message == f"{folder / name} is outside the model folder, where no file is opened."
    outside.unlink()
    assert fault_of(folder).message == f"{folder / name} is a link to a file that does not exist."


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_a_small_file_of_many_gigabytes_is_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("w") as f:
        f.truncate(1 << 40)
    assert "has 1,099,511,627,776 bytes" in fault_of(folder).message


def test_a_hub_caches_own_links_are_followed(tmp_path: Path) -> None:
    """models--owner--name/snapshots/REVISION/config.json -> ../../blobs/HASH"""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "5f0b02c7"
    blobs.mkdir()
    snapshot.parent.mkdir()
    write_checkpoint(snapshot)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.replace(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    check_checkpoint(snapshot)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "../model.safetensors", "a\0.safetensors", ""])
def test_an_index_names_nothing_outside_the_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    message = fault_of(folder).message
    assert message.startswith(f"{folder}/model.safetensors.index.json names ")
    assert message.endswith("which is not a safetensors file in the folder.")


DEEP = '{"a": ' * 100_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", DEEP),
        ("generation_config.json", DEEP),
        ("model.safetensors.index.json", DEEP),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("tokenizer_config.json", DEEP),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("added_tokens.json", "{"),
        ("special_tokens_map.json", DEEP),
    ],
    ids=lambda v: f"{v:.30}",
)
def test_broken_json_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert fault_of(folder).message.startswith(f"{folder / name} ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat_template.jinja", "{% for m in messages %}"),
        ("chat_template.jinja", "{{ messages | no_such_filter }}"),
        ("chat_template.jinja", "{{ " + "(" * 50_000),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% if %}"})),
        ("additional_chat_templates/tool_use.jinja", "{{"),
        ("chat_template.jinja", "{{ messages[0].content.x.y }}"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ raise_exception('Never.') }}"})),
    ],
    ids=lambda v: f"{v:.30}",
)
def test_a_chat_template_that_cannot_write_a_question_is_found_at_start(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    error = fault_of(folder)
    assert "chat template" in error.message and error.param == "--chat-template"
    assert "--chat-template" in str(error.remedy)
    check_checkpoint(folder, chat_template="v3")  # it is not used then


def change(name: str, **fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header = headers_of(folder)
        header[name] = header.get(name, {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}) | fields
        write_weights(folder / WEIGHTS, header)

    return damage


def raw(header: bytes, *, length: int | None = None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write_weights(folder / WEIGHTS, header)
        if length is not None:
            (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + header)

    return damage


def rename(old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write_weights(folder / WEIGHTS, {new if name == old else name: t for name, t in headers_of(folder).items()})

    return damage


ONE = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (raw(b"{}", length=2**63), "is not a safetensors file, or is truncated in its header"),
        (raw(b"{}", length=2**64 - 1), "is not a safetensors file, or is truncated in its header"),
        (raw(b"{}", length=99_999_999), "is not a safetensors file, or is truncated in its header"),
        (raw(b""), "does not have a valid safetensors header"),
        (raw(b"[]"), "does not have a valid safetensors header"),
        (raw(b'{"a": 1}'), "does not have a valid safetensors header"),
        (raw(DEEP.encode()), "does not have a valid safetensors header"),
        (
            raw(b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 1' + b"0" * 5000 + b"]}}"),
            "valid safetensors header",
        ),
        (raw(b"{}"), "lacks the tensor model.embed_tokens.weight (and 20 more)"),
        (raw(json.dumps({"a": ONE})[:-1].encode() + b', "a": ' + json.dumps(ONE).encode() + b"}"), "it has 'a' twice"),
        (change("model.norm.weight", data_offsets=[0, 16]), "overlaps the one before it"),
        (change("model.norm.weight", data_offsets=[-16, 0]), "an impossible shape or place"),
        (change("model.norm.weight", data_offsets=[16, 0]), "an impossible shape or place"),
        (change("model.norm.weight", shape=[-8]), "an impossible shape or place"),
        (change("model.norm.weight", shape=[8.0]), "an impossible shape or place"),
        (change("model.norm.weight", shape=[2**62, 2**62]), "which its shape does not need"),
        (change("model.norm.weight", dtype="F8_E4M3", shape=[16]), "is of type F8_E4M3, which is not supported"),
        (change("model.norm.weight", shape=[4, 2]), "has shape [4, 2], but the model's configuration asks for [8]"),
        (change("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias in "),
        (rename("model.norm.weight", "norm.weight"), "lacks the tensor model.norm.weight"),
        (rename("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.qweight"), "has quantized weights"),
    ],
)
def test_hostile_headers(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    assert words in fault_of(folder).message


@pytest.mark.parametrize("name", ["cos_cached", "sin_cached", "inv_freq"])
def test_stray_buffers_of_old_conversions_have_no_effect(folder: Path, name: str) -> None:
    header = headers_of(folder)
    end = max(tensor["data_offsets"][1] for tensor in header.values())
    header[f"model.layers.1.self_attn.rotary_emb.{name}"] = {
        "dtype": "F32",
        "shape": [2],
        "data_offsets": [end, end + 8],
    }
    write_weights(folder / WEIGHTS, header)
    check_checkpoint(folder)


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_head_that_differs_from_the_embedding(folder: Path, differs: bool) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    if differs:
        with (folder / WEIGHTS).open("r+b") as f:
            f.seek(-1, os.SEEK_END)  # of lm_head.weight, the last tensor
            f.write(b"\1")
        assert "lm_head.weight in " in fault_of(folder).message and "tied" in fault_of(folder).message
    else:
        check_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2000},
        {"vocab_size": 10**12},
        {"hidden_size": 10**9},
        {"head_dim": 10**9},
        {"rope_theta": 10**400},
        {"rms_norm_eps": "1e-5"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": {"quant_method": "awq"}},
    ],
    ids=lambda c: f"{json.dumps(c):.40}",
)
def test_absurd_numbers_and_quantized_models(folder: Path, changes: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    fault_of(folder)


def test_the_weights_decide_over_a_configuration_that_does_not_fit(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 5000}))
    error = fault_of(folder)
    assert "has shape [4096, 8], but the model's configuration asks for [5000, 8]" in error.message
