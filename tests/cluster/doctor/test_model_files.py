"""Complete checkpoint folders, and every way a download goes wrong: the finding names the bad file."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.config.checkpoint_location import find_model
from cluster.doctor.facts import Node
from cluster.doctor.judge.models import judge_models
from cluster.doctor.model_files import read_model
from cluster.plan.models import describe_model

DEMO = find_model(None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The demo model in two files with an index, as the Hub has larger ones."""
    for name in ("config.json", "tokenizer.model.v3"):
        shutil.copy(DEMO / name, tmp_path)
    tensors = load_file(DEMO / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def faults(folder) -> list[str]:
    """Their messages; each has a remedy."""
    found = read_model(str(folder)).faults
    assert all(f.remedy.endswith(".") for f in found), found
    return [f.message for f in found]


def test_a_complete_model(folder):
    model = read_model(str(folder))
    assert model.faults == () and model.num_files == 2 and model.bytes_per_weight == 2
    assert model.num_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert read_model(str(DEMO)).faults == ()


def test_tensors_that_are_left_out_are_named_by_doctor_and_plan(folder):
    path = folder / "model-00001-of-00002.safetensors"
    more = ("vision_tower.patch_conv.weight", "vision_tower.ln_pre.weight", "multi_modal_projector.linear_1.weight")
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    save_file(load_file(path) | {name: torch.ones(2) for name in (*more, *buffers)}, path)
    says = "3 tensors for images (multi_modal_projector, vision_tower) and 1 tensor for rotary embedding, which is computed"
    model = read_model(str(folder))
    assert model.left_out == says and not model.faults
    (finding,) = judge_models([Node(address="10.0.0.1", model=model)])
    assert finding.message.endswith(f", and a tokenizer. Left out: {says}.")
    assert describe_model(str(folder)).left_out == says
    assert read_model(str(DEMO)).left_out is None and describe_model(str(DEMO)).left_out is None


def test_the_fingerprint_changes_with_the_files(folder):
    before = read_model(str(folder)).fingerprint
    assert read_model(str(folder)).fingerprint == before
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert read_model(str(folder)).fingerprint != before


def truncate(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lengthen(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 7)


def cut_header(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def empty(folder):
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


def git_lfs_pointer(folder):
    (folder / "model-00002-of-00002.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4999819336\n"
    )


def other_format(folder):
    header = b'{"weight": {"dtype": "F32", "shape": [1]}}'
    (folder / "model-00002-of-00002.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def header_that_is_a_list(folder):
    (folder / "model-00002-of-00002.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")


def remove_file(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def remove_file_and_index(folder):
    remove_file(folder)
    (folder / "model.safetensors.index.json").unlink()


def other_revision(folder):
    path = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(sorted(tensors))))
    save_file({**tensors, "extra": torch.zeros(1)}, path)


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def remove_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')


def remove_tokenizer(folder):
    (folder / "tokenizer.model.v3").unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.model.v3").write_bytes(b"no protobuf at all")


def only_pickles(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (truncate, ["model-00002-of-00002.safetensors is truncated: it has ", " bytes instead of "]),
        (lengthen, ["model-00002-of-00002.safetensors is longer than its header says"]),
        (
            cut_header,
            ["model-00002-of-00002.safetensors (0.0 MiB) is not a safetensors file, or is truncated in its header"],
        ),
        (
            empty,
            ["model-00002-of-00002.safetensors (0.0 MiB) is not a safetensors file, or is truncated in its header"],
        ),
        (git_lfs_pointer, ["model-00002-of-00002.safetensors is a Git LFS pointer"]),
        (other_format, ["model-00002-of-00002.safetensors does not have a valid safetensors header"]),
        (header_that_is_a_list, ["model-00002-of-00002.safetensors does not have a valid safetensors header"]),
        (remove_file, ["names model-00002-of-00002.safetensors, which does not exist"]),
        (remove_file_and_index, ["lacks the tensor model.embed_tokens.weight (and 27 more)"]),
        (other_revision, ["in model-00002-of-00002.safetensors, which does not have it"]),
        (break_index, ["is not a safetensors index"]),
        (remove_config, ["has weights (model-00001-of-00002.safetensors, ", "but neither config.json"]),
        (break_config, ["MixtralForCausalLM"]),
        (remove_tokenizer, ["has no tokenizer"]),
        (break_tokenizer, ["is not a SentencePiece model"]),
        (only_pickles, ["only as a pickle file (pytorch_model.bin)"]),
    ],
)
def test_the_fault_is_named(folder, damage, parts):
    damage(folder)
    (message, *_) = faults(folder)
    for part in parts:
        assert part in message


def test_a_folder_that_does_not_exist_on_this_node(tmp_path):
    assert faults(tmp_path / "nowhere") == [f"The model folder {tmp_path}/nowhere does not exist on this node."]


def test_all_faults_are_reported(folder):
    truncate(folder)
    remove_tokenizer(folder)
    assert len(faults(folder)) == 2
