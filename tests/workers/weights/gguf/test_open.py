"""A GGUF file as a mapping of tensors: names, row order, slices that read their part only, and a sentence for each fault."""

import gguf
import numpy as np
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType
from support.checkpoints.gguf_files import LARGE, dequantized_model, read_reference, write_gguf
from support.checkpoints.tiny import make_tiny_model

from workers.checkpoint.model_config import load_model_config
from workers.errors import CheckpointError
from workers.quant.forms import GroupedForm
from workers.quant.quantized import dense_values
from workers.weights.forms import read_forms
from workers.weights.gguf.open import open_gguf
from workers.weights.names import expected_shapes

EVERY_WAY = ("F32", "BF16", "F16", "Q4_1", "Q8_0", "IQ4_XS", "IQ2_XS", "TQ2_0", "Q2_K", "Q4_K", "Q6_K")


def assert_same(values, expected):
    """Bit for bit; minima of groups of 16 are added in two halves, which may round differently."""
    values = dense_values(values).float()
    assert torch.equal(values, expected) or torch.allclose(values, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", EVERY_WAY)
def test_tensors_have_the_names_shapes_and_numbers_of_hugging_face(tmp_path, dtype):
    model = make_tiny_model(sliding_window=None, **LARGE)
    path = write_gguf(tmp_path / "model.gguf", model, dtype=dtype)
    config = load_model_config(path)
    sources = open_gguf(path, head_dim=config.head_dim)
    assert {name: source.shape for name, source in sources.items()} == expected_shapes(config)
    for name, parameter in dequantized_model(path, model).state_dict().items():
        assert_same(sources[name][:], parameter)


@pytest.mark.parametrize("dtype", EVERY_WAY)
def test_rows_and_columns_are_parts_of_the_whole(tmp_path, dtype):
    path = write_gguf(tmp_path / "model.gguf", make_tiny_model(sliding_window=None, **LARGE), dtype=dtype)
    sources = open_gguf(path, head_dim=32)
    whole = dense_values(sources["model.layers.0.mlp.down_proj.weight"][:])
    source = sources["model.layers.0.mlp.down_proj.weight"]
    assert_same(source[64:100], whole[64:100])
    assert_same(source[:, 128:192], whole[:, 128:192])
    assert_same(source[3:5, 32:64], whole[3:5, 32:64])
    q = dense_values(sources["model.layers.0.self_attn.q_proj.weight"][:])
    assert_same(sources["model.layers.0.self_attn.q_proj.weight"][32:96], q[32:96])


def test_a_slice_reads_its_own_bytes_only(tmp_path):
    """Two rows, and a column of blocks, of a tensor of 9 GB, most of which is a hole in the file."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    shape = (1 << 22, 4096)
    num_bytes = shape[0] * shape[1] // 32 * 18
    writer.add_tensor_info("output.weight", shape, np.float32, num_bytes, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as f:
        f.truncate(-(-path.stat().st_size // 32) * 32 + num_bytes)
    source = open_gguf(path, head_dim=2)["lm_head.weight"]
    before = psutil.Process().memory_info().rss
    assert source[shape[0] - 2 :].values.shape == (2, 4096)
    assert source[:1000, 4064:].values.shape == (1000, 32)
    assert psutil.Process().memory_info().rss - before < 50e6


def test_columns_of_one_rank_are_whole_groups(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", dtype="Q4_0")
    source = open_gguf(path, head_dim=8)["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"'blk\.0\.ffn_down\.weight'.*groups of 32 columns.*tensor-parallel-size"
    ):
        source[:, 48:96]


def test_forms_are_read_from_the_header(tmp_path):
    model = make_tiny_model(sliding_window=None, tie_word_embeddings=True)
    path = write_gguf(tmp_path / "model.gguf", model, dtype={"embed": "Q8_0", "v_proj": "Q5_0", "": "Q4_1"})
    forms = read_forms(path, load_model_config(path))
    assert forms["model.layers.1.self_attn.q_proj.weight"] == GroupedForm(num_bits=4, group_size=32, has_minima=True)
    assert forms["model.layers.1.self_attn.v_proj.weight"] == GroupedForm(num_bits=8, group_size=32)
    assert forms["lm_head.weight"] == forms["model.embed_tokens.weight"] == GroupedForm(num_bits=8, group_size=32)
    assert forms["model.norm.weight"] is None


def test_a_split_model_is_one_model(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", split_max_tensors=7)
    assert path.name == "tiny-00001-of-00003.gguf"
    sources = open_gguf(tmp_path, head_dim=8)
    assert sources.keys() == expected_shapes(load_model_config(tmp_path)).keys()
    norm = read_reference(path)["output_norm.weight"]
    assert torch.equal(sources["model.norm.weight"][:], norm)
    # Any part means the model.
    assert load_model_config(tmp_path / "tiny-00002-of-00003.gguf") == load_model_config(path)


def test_numbers_that_are_not_aligned_are_read(tmp_path):
    """A file may put tensors at any multiple of its own alignment."""
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_raw(
        tmp_path / "model.gguf", {"rope_freqs.weight": np.arange(3, dtype=np.int8), "token_embd.weight": expected}
    )
    assert open_gguf(path, head_dim=2)["model.embed_tokens.weight"][:].tolist() == expected.tolist()


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    path = write_raw(tmp_path / "model.gguf", {"output_norm.weight": np.arange(3, dtype=np.int8)})
    with pytest.raises(CheckpointError, match=r"output_norm\.weight .* type I8, which is not supported.*Q4_K_M"):
        open_gguf(path, head_dim=2)


def write_raw(path, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(1)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_groups_of_16_are_padded_to_32(tmp_path):
    """Each is followed by its own inputs once more, with weights of zero, so that products have groups of 32."""
    path = write_gguf(tmp_path / "model.gguf", make_tiny_model(sliding_window=None, **LARGE), dtype="Q6_K")
    values = open_gguf(path, head_dim=32)["model.layers.0.mlp.up_proj.weight"][:8]
    assert values.group_size == 32 and values.shape == (8, 512)
    assert values.inputs[:48].tolist() == [*range(16), *range(16), *range(16, 32)]
    assert not values.values.view(8, -1, 2, 16)[:, :, 1].any()


def test_types_without_a_form_are_said_with_what_they_take(tmp_path, caplog):
    """Of a layer's seven matrices all but q and k."""
    kinds = {"q_proj": "Q4_0", "k_proj": "Q4_0", "embed": "Q8_0", "lm_head": "Q8_0", "": "IQ2_XS"}
    path = write_gguf(tmp_path / "model.gguf", make_tiny_model(sliding_window=None, **LARGE), dtype=kinds)
    open_gguf(path, head_dim=32)
    assert "5 matrices of the types IQ2_XS have no form of their own here" in caplog.text
    caplog.clear()
    open_gguf(write_gguf(tmp_path / "other.gguf"), head_dim=8)
    assert caplog.text == ""
