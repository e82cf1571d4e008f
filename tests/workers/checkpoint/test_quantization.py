"""quantization_config: what each field says, and one sentence for each kind of checkpoint that does not run."""

import pytest
from support.checkpoints.quantized.checkpoints import FP8, INT4, INT8, compressed

from workers.checkpoint.quantization import WHAT_RUNS, read_quantization
from workers.errors import ConfigError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def test_a_dense_checkpoint_has_none():
    assert read_quantization({}) is None
    assert read_quantization({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPTQ, ("gptq", "GPTQ int4", 4.5, 128)),
        (GPTQ | {"sym": False}, ("gptq", "GPTQ int4", 5.0, 128)),
        (GPTQ | {"bits": 8, "group_size": -1}, ("gptq", "GPTQ int8", 8.5, None)),
        (GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2"}, ("gptq_v2", "GPTQ int4", 4.5, None)),
        (AWQ, ("awq", "AWQ int4", 5.0, 128)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, ("awq", "AWQ int4", 5.0, 64)),
        (
            compressed(INT4 | {"strategy": "group", "group_size": 128}, form="pack-quantized"),
            ("compressed-tensors", "compressed-tensors int4", 5.0, 128),
        ),
        (
            compressed(INT8 | {"strategy": "channel"}, form="int-quantized"),
            ("compressed-tensors", "compressed-tensors int8", 9.0, None),
        ),
        (
            compressed(FP8 | {"strategy": "channel"}, form="float-quantized"),
            ("compressed-tensors", "compressed-tensors float8", 8, None),
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, ("fp8", "fp8", 8, None)),
    ],
)
def test_what_the_fields_say(config, expected):
    found = read_quantization({"quantization_config": config})
    assert (found.method, found.label, found.layer_bits, found.group_size) == expected


def test_blocks_of_8_bit_floats():
    fields = {"quant_method": "fp8", "weight_block_size": [128, 64]}
    assert read_quantization({"quantization_config": fields}).block_size == (128, 64)
    scheme = FP8 | {"strategy": "block", "block_structure": [32, 128]}
    assert read_quantization({"compression_config": compressed(scheme, form="float-quantized")}).block_size == (32, 128)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("gptq", "quantization_config is 'gptq', not a JSON object."),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quantized by 'bitsandbytes', which does not run here.",
        ),
        ({"load_in_4bit": True}, "quantized by an unknown method"),
        (GPTQ | {"bits": 3}, "quantized by 'gptq' in 3 bits"),
        ({"quant_method": "gptq"}, "quantization_config of 'gptq' lacks the field 'bits'."),
        (GPTQ | {"checkpoint_format": "marlin"}, "of GPTQ in the format 'marlin'"),
        (GPTQ | {"group_size": 0}, "group_size of quantization_config is 0."),
        (AWQ | {"version": "gemv"}, "of AWQ in the version 'gemv'"),
        (compressed(INT4, form="marlin-24"), "compressed-tensors in the format 'marlin-24'"),
        (compressed(FP8 | {"num_bits": 4}, form="pack-quantized"), "compressed-tensors with 'float' weights in 4 bits"),
        (compressed(INT8, form="int-quantized", sparsity_config={"format": "sparse-bitmask"}), "with sparse weights"),
        (compressed(INT8, form="int-quantized", transform_config={"config_groups": {"u": {}}}), "a transform_config"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "its config_groups say nothing of weights"),
        ({"quant_method": ["gptq"]}, "quantized by ['gptq'], which does not run here."),
        (
            compressed(INT8, form="int-quantized", sparsity_config="x"),
            "sparsity_config of quantization_config is 'x', not",
        ),
        (compressed(INT8, form="int-quantized", transform_config=[1]), "[1], not a JSON object."),
        (
            compressed(INT8, form="int-quantized") | {"ignore": 1.5},
            "ignore of quantization_config is 1.5, not a JSON list.",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 weights of the kind 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "block size of quantization_config is 128, not two"),
    ],
)
def test_what_does_not_run_is_named_in_one_sentence(config, words):
    with pytest.raises(ConfigError) as e:
        read_quantization({"quantization_config": config})
    assert words in e.value.message
    assert "download" in e.value.remedy.lower() or WHAT_RUNS in e.value.remedy
