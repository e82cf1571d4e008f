"""Logits of quantised checkpoints beside those of the dense checkpoints that they stand for, on one rank and on two.

Products of whole numbers round their inputs to 8 bits; those of 8-bit floats, and what becomes dense, do not.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.quantized import packers
from support.checkpoints.quantized.checkpoints import FP8, INT4, INT8, KINDS, WIDE, Kind, compressed, write_quantized
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config
from support.native import native_library
from support.ranks.rank_threads import run_ranks

from workers.attention.backend import AttentionMetadata
from workers.device.model_bytes import weight_bytes
from workers.engine import build
from workers.engine.build import build_runner
from workers.errors import ConfigError
from workers.native.matrices import HEADER_BYTES
from workers.parallel.group import SingleRank

BLOCK = 16
NUM_TOKENS = 40
NOT_ROUNDED = ("gptq, groups of 16", "float-quantized", "float-quantized, blocks", "fp8, static", "fp8, dynamic")


def logits_of(folder, *, size=1, **settings):
    """[NUM_TOKENS, vocab_size] of one prompt."""
    config = make_config(folder, tensor_parallel_size=size, num_threads=1, **settings)
    token_ids = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))

    def program(tp):
        runner = build_runner(config, tp)
        model = config.model
        num_blocks = -(-NUM_TOKENS // BLOCK)
        shape = (1 + num_blocks, BLOCK, model.kv_heads_per_rank(tp.size), model.head_dim)
        dtype = getattr(torch, config.dtype)
        kv_caches = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.num_hidden_layers)
        ]
        metadata = AttentionMetadata(
            slot_mapping=torch.arange(BLOCK, BLOCK + NUM_TOKENS),
            block_table=torch.arange(1, 1 + num_blocks, dtype=torch.int32).unsqueeze(0),
            seq_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
            query_lens=[NUM_TOKENS],
            context_lens=[NUM_TOKENS],
            max_query_len=NUM_TOKENS,
            max_seq_len=NUM_TOKENS,
        )
        with torch.inference_mode():
            hidden_states = runner.model(token_ids, torch.arange(NUM_TOKENS), kv_caches, [metadata])
            return runner.model.compute_logits(hidden_states)

    return run_ranks(size, program)[0]


def distance(logits, expected):
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dense_weights(kind, tmp_path):
    quantized, meant = write_quantized(tmp_path, kind)
    expected, logits = logits_of(meant), logits_of(quantized)
    if kind in NOT_ROUNDED:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    else:
        assert 0 < distance(logits, expected) < 0.03
    assert distance(logits_of(quantized, size=2), expected) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_the_need_of_memory_is_what_is_loaded(kind, tmp_path):
    """Scales of compressed-tensors may turn out to be exact in 16 bits; what act-order adds is little in a larger model."""
    native_library("avx2")  # skips where there can be none
    folder, _ = write_quantized(tmp_path, kind)
    config = make_config(folder, num_threads=1)
    weights, orders = 0, 0
    for parameter in build_runner(config, SingleRank()).model.parameters():
        if parameter.dtype is torch.int64:
            orders += parameter.nbytes
        else:
            # Packed quantized matrices begin with a header.
            weights += parameter.nbytes - (HEADER_BYTES if parameter.dtype is torch.uint8 else 0)
    expected = weight_bytes(config)
    if "float" in kind or "fp8" in kind:
        # Scales of rows are not counted.
        assert expected <= weights <= 1.05 * expected
    elif "quantized" in kind:
        assert 0.8 * expected < weights <= expected
    else:
        assert weights == expected
    assert (orders > 0) == ("act-order" in kind)


def test_each_shard_of_a_layer_keeps_its_own_form(tmp_path):
    """The key projection is dense, and so is an output head that the layers' scheme does not cover."""
    folder, meant = write_quantized(tmp_path, "gptq", dense=("lm_head", "k_proj", "layers.0.mlp.up_proj"))
    assert 0 < distance(logits_of(folder), logits_of(meant)) < 0.03


def test_several_schemes_in_one_checkpoint(tmp_path):
    """compressed-tensors' "mixed-precision": int8 for the one matrix with 128 inputs, int4 and e4m3 for the others."""

    def pack(weight):
        if weight.shape[1] == WIDE["intermediate_size"]:
            return packers.int_quantized(weight)
        return packers.float8(weight, per="row") if weight.shape[0] == 32 else packers.pack_quantized(weight)

    fields = compressed(INT4 | {"strategy": "group", "group_size": 32}, form="mixed-precision")
    fields["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": INT8 | {"strategy": "channel"}}
    fields["config_groups"]["group_2"] = {"targets": ["re:.*[kv]_proj"], "weights": FP8 | {"strategy": "channel"}}
    folder, meant = write_quantized(tmp_path, Kind(pack, {}, fields))
    assert 0 < distance(logits_of(folder), logits_of(meant)) < 0.03
    assert distance(logits_of(folder, size=2), logits_of(meant)) < 0.03


@pytest.mark.parametrize(
    "kind",
    [
        "awq",
        "gptq, act-order",
        "gptq without groups",
        "int-quantized, groups, asymmetric",
        "fp8, static",
        "fp8, dynamic",
    ],
)
def test_three_ranks(kind, tmp_path):
    """SmolLM2's 9 and 3 heads, and an intermediate size of 7 units of 32, which some ranks have one more of than others."""
    sizes = {"hidden_size": 96, "intermediate_size": 224, "head_dim": 32}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    folder, meant = write_quantized(tmp_path, kind, **sizes, **heads)
    assert 0 < distance(logits_of(folder, size=3), logits_of(meant)) < 0.03


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_three_ranks_that_quantise_a_dense_checkpoint(quantization, tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 224, "head_dim": 32, "num_hidden_layers": 1}
    folder = write_tiny_checkpoint(tmp_path, **sizes, num_attention_heads=9, num_key_value_heads=3)
    one = logits_of(folder, quantization=quantization)
    assert distance(one, logits_of(folder)) > 1e-3
    # Ranks add their parts in another order, and scales are of a rank's part of a row.
    assert distance(logits_of(folder, size=3, quantization=quantization), one) < 0.06


@pytest.mark.parametrize("scheme", ["TENSOR", "NO_SCALES"])
def test_mistrals_own_layout_of_fp8(scheme, tmp_path, caplog):
    """params.json says "quantization", and a matrix has qscale_weight and, where inputs have a scale, qscale_act."""
    for name in ("quantized", "meant"):
        write_tiny_checkpoint(tmp_path / name, layout="mistral", **WIDE)
    tensors, meant = {}, {}
    for name, weight in load_file(tmp_path / "meant" / "consolidated.safetensors").items():
        is_linear = "attention.w" in name or "feed_forward" in name
        parts, value = packers.float8(weight) if is_linear else ({"weight": weight}, weight)
        module = name.removesuffix(".weight")
        names = {"weight": "weight", "weight_scale": "qscale_weight"}
        tensors |= {f"{module}.{names[suffix]}": tensor for suffix, tensor in parts.items()}
        if is_linear and scheme == "TENSOR":
            tensors[f"{module}.qscale_act"] = torch.tensor(0.5)
        meant[name] = value
    save_file(tensors, tmp_path / "quantized" / "consolidated.safetensors")
    save_file(meant, tmp_path / "meant" / "consolidated.safetensors")
    params = json.loads((tmp_path / "quantized" / "params.json").read_text())
    params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}
    (tmp_path / "quantized" / "params.json").write_text(json.dumps(params))
    with caplog.at_level("INFO", logger="workers"):
        logits = logits_of(tmp_path / "quantized")
    torch.testing.assert_close(logits, logits_of(tmp_path / "meant"), rtol=1e-4, atol=1e-4)
    assert distance(logits_of(tmp_path / "quantized", size=2), logits) < 1e-4
    said = "The static scales of inputs (input_scale) of 8 matrices have no effect" in caplog.text
    assert said == (scheme == "TENSOR"), caplog.text


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_folders_whose_configuration_is_in_a_file_of_its_own(kind, tmp_path):
    """As the first versions of AutoGPTQ and AutoAWQ wrote them, the former under a name of its own."""
    folder, _ = write_quantized(tmp_path, kind)
    expected = logits_of(folder)
    config = json.loads((folder / "config.json").read_text())
    found = config.pop("quantization_config")
    found.pop("quant_method")
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "gptq":
        del found["checkpoint_format"]
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    else:
        found = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / {"gptq": "quantize_config.json", "awq": "quant_config.json"}[kind]).write_text(json.dumps(found))
    assert torch.equal(logits_of(folder), expected)


def test_a_size_that_would_cut_groups_is_refused_with_those_that_run(tmp_path):
    """Three heads of 16: two of them on each of three ranks end within a group of 32."""
    sizes = {"hidden_size": 96, "intermediate_size": 224, "head_dim": 16, "num_hidden_layers": 1}
    folder, _ = write_quantized(tmp_path, "awq", **sizes, num_attention_heads=6, num_key_value_heads=3)
    assert make_config(folder, tensor_parallel_size=3).tensor_parallel_size == 3
    message = (
        r"groups of 32 .* AWQ int4 .* attention heads' width would begin at 48, .* Use --tensor-parallel-size 1 or 3\."
    )
    with pytest.raises(ConfigError, match=message):
        make_config(folder, tensor_parallel_size=2)


def test_a_quantised_output_head(tmp_path):
    folder, meant = write_quantized(tmp_path, "gptq, asymmetric", dense=(), vocab_size=264)
    assert 0 < distance(logits_of(folder), logits_of(meant)) < 0.03
    assert 0 < distance(logits_of(folder, size=2), logits_of(meant)) < 0.03


@pytest.mark.parametrize("kind", ["gptq, act-order, asymmetric", "int-quantized"])
def test_every_instruction_set_gives_the_same_bits(kind, tmp_path, monkeypatch):
    folder, _ = write_quantized(tmp_path, kind, dense=())
    native_library("avx2")
    expected = None
    for name in ("avx512", "avx2", None):
        library = None if name is None else native_library(name)
        monkeypatch.setattr(build, "_library", lambda device, library=library: library)
        w = stored_product(folder)
        expected = w if expected is None else expected
        assert torch.equal(w, expected), name


def stored_product(folder):
    """Of one layer: other layers' torch kernels have bits of their own."""
    runner = build_runner(make_config(folder, num_threads=1), SingleRank())
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    layer = runner.model.model.layers[1].mlp.down_proj
    with torch.inference_mode():
        return layer(x)
