"""The header of a GGUF file: what the package's reader gives, in less time, and one sentence for each way a file is damaged."""

import struct

import gguf
import numpy as np
import pytest
from support.checkpoints.gguf_files import write_gguf

from workers.checkpoint.gguf.gguf_config import read_parts
from workers.checkpoint.gguf.gguf_file import find_gguf, first_part, gguf_files, model_name, part_names, read_gguf
from workers.errors import CheckpointError, ConfigError

VALUES = {
    "a.text": "Grüße",
    "a.number": 7,
    "a.fraction": 0.5,
    "a.yes": True,
    "a.texts": ["", "<s>", "Ġthe", "日本"],
    "a.numbers": [1, 2, 3],
    "a.fractions": [0.25, 0.5],
}


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "model.gguf", metadata=VALUES)


def test_metadata_and_places_are_those_of_the_packages_reader(file):
    header, reference = read_gguf(file), gguf.GGUFReader(file)
    assert {key: header.metadata[key] for key in VALUES} == VALUES
    assert header.metadata == {
        key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")
    }
    assert list(header.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        found = header.tensors[tensor.name]
        assert found.dtype == tensor.tensor_type.name and found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.start, found.end - found.start) == (tensor.data_offset, tensor.n_bytes)


def test_an_empty_list_is_a_list(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", metadata=VALUES)
    data = path.read_bytes()
    key = b"a.texts"
    at = data.index(key) + len(key) + 4
    element, count = struct.unpack_from("<IQ", data, at)
    end = at + 12 + sum(8 + len(text.encode()) for text in VALUES["a.texts"])
    path.write_bytes(data[:at] + struct.pack("<IQ", element, 0) + data[end:] + bytes(64))
    assert count == 4 and read_gguf(path).metadata["a.texts"] == []


def test_every_cut_is_named(file):
    """However short the file is, it is one sentence with the file and what to do."""
    data = file.read_bytes()
    header_bytes = read_gguf(file).header_bytes
    for size in (0, 3, 7, 20, 40, *range(64, header_bytes, 97), header_bytes, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError) as e:
            read_gguf(file)
        assert str(file) in e.value.message and e.value.remedy is not None
        assert "truncated" in e.value.message or "not a GGUF file" in e.value.message, e.value.message
    assert f"it has {len(data) - 1:,} bytes instead of" in e.value.message


def test_every_damaged_byte_of_the_header_is_read_or_named(file):
    """Never an exception of another kind, never memory without bound, never a wait."""
    data = bytearray(file.read_bytes())
    for at in range(8, read_gguf(file).header_bytes, 11):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        file.write_bytes(damaged)
        try:
            read_gguf(file)
        except CheckpointError as e:
            assert str(file) in e.message


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGML" + bytes(40), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 9) + bytes(40), "is of GGUF version 9"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "is in big-endian byte order"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_another_file_is_named(tmp_path, start, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def change_tensor(file, name, offset, value):
    """Writes 4 bytes at an offset after a tensor's name: of a matrix, its dimensions are at 0, its sizes at 4 and 12, its type at 20."""
    data = bytearray(file.read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + offset
    data[at : at + 4] = struct.pack("<I", value)
    file.write_bytes(data)


def test_an_unknown_type_is_named(file):
    change_tensor(file, "blk.0.ffn_up.weight", 20, 4711)
    with pytest.raises(
        CheckpointError, match=r"'blk\.0\.ffn_up\.weight' of type 4711, which is not known here\. Use a file"
    ):
        read_gguf(file)


def test_an_impossible_shape_is_named(file):
    change_tensor(file, "blk.0.ffn_up.weight", 4, 33)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' has an impossible shape \[33, 96\]"):
        read_gguf(file)


def test_tensors_that_overlap_are_named(file):
    change_tensor(file, "blk.0.ffn_up.weight", 24, 0)
    with pytest.raises(CheckpointError, match="overlaps"):
        read_gguf(file)


def test_parts(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", split_max_tensors=7)
    first = tmp_path / "tiny-00001-of-00003.gguf"
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "tiny-00002-of-00003.gguf") == first
    assert gguf_files(first) == [tmp_path / name for name in part_names(first.name)]
    assert len(read_parts(first).tensors) == 21 and model_name(first) == "tiny"
    assert first_part(tmp_path / "whole.gguf") == tmp_path / "whole.gguf"


def test_a_missing_part_is_named(tmp_path):
    first = write_gguf(tmp_path / "tiny.gguf", split_max_tensors=7)
    (tmp_path / "tiny-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00003-of-00003\.gguf does not exist, one of the 3 parts"):
        read_parts(first)


def test_a_part_under_another_name_is_named(tmp_path):
    first = write_gguf(tmp_path / "tiny.gguf", split_max_tensors=7)
    with pytest.raises(CheckpointError, match=r"is one of 3 parts, but its name says that there are 1"):
        read_parts(first.rename(tmp_path / "tiny.gguf"))


def test_a_tensor_in_two_parts_is_named(tmp_path):
    first = write_gguf(tmp_path / "tiny.gguf", split_max_tensors=7)
    (tmp_path / "tiny-00003-of-00003.gguf").write_bytes((tmp_path / "tiny-00002-of-00003.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"is in both .*tiny-00002-of-00003.gguf and tiny-00003-of-00003.gguf"):
        read_parts(first)


def test_which_file_a_folder_means(tmp_path):
    assert find_gguf(tmp_path) is None
    for name in ("model.Q4_K_M.gguf", "mmproj-model-f16.gguf"):
        (tmp_path / name).touch()
    assert find_gguf(tmp_path) == tmp_path / "model.Q4_K_M.gguf"
    (tmp_path / "model.Q8_0.gguf").touch()
    with pytest.raises(ConfigError, match=r"2 GGUF models \(model\.Q4_K_M\.gguf, model\.Q8_0\.gguf\).*--gguf-file"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.gguf").write_bytes(np.zeros(100, dtype=np.uint8).tobytes())
    (folder / "model.gguf").symlink_to(tmp_path / "secret.gguf")
    with pytest.raises(ConfigError, match="is outside the model folder"):
        read_parts(folder / "model.gguf")
