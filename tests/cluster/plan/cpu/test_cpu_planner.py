"""Plans for a machine without a GPU, against hand arithmetic: what fits, which form is recommended, and what a refusal says."""

import re
from dataclasses import replace

import pytest

from cluster.cli.options.parser import make_parser
from cluster.plan.cpu.machine import MAX_BYTES_PER_S, assumed
from cluster.plan.cpu.planner import CpuQuestion, make_cpu_plans, refusal
from cluster.plan.models import V0_3, PlannedModel
from cluster.plan.roofline import Workload
from workers.device.fit import check_fits
from workers.device.memory import Memory
from workers.errors import ConfigError

GB = 10**9
NAME = "mistralai/Mistral-7B-v0.3"


def question(
    *, memory: int = 32 * GB, cores: int = 2, instructions: str | None = "avx512_bf16", concurrency: int = 4
) -> CpuQuestion:
    return CpuQuestion(
        model=PlannedModel(name=NAME, config=V0_3),
        machine=assumed(num_cores=cores, memory_bytes=memory, instructions=instructions),
        workload=Workload(context=8192, concurrency=concurrency, prompt_tokens=4096),
    )


def forms(asked: CpuQuestion) -> list[tuple[str, bool]]:
    return [(plan.name, plan.fits) for plan in make_cpu_plans(asked)]


def test_the_form_that_changes_the_weights_least_and_fits_is_recommended():
    """Weights 14.5, 7.8 and 4.3 GB; KV cache 4.3; 1.5 for the rest; 0.95 of the memory may be used."""
    whole, int8, int4 = "bfloat16", "int8 weights and bfloat16", "int4 weights and bfloat16"
    assert forms(question()) == [(whole, True), (int8, True), (int4, True)]
    assert forms(question(memory=20 * GB)) == [(int8, True), (int4, True), (whole, False)]
    assert forms(question(memory=12 * GB)) == [(int4, True), (whole, False), (int8, False)]
    assert not any(fits for _, fits in forms(question(memory=8 * GB)))


def test_without_bfloat16_the_default_is_float32():
    assert [name for name, _ in forms(question(instructions=None))] == [
        "bfloat16",
        "int8 weights and float32",
        "int4 weights and float32",
        "float32",  # 29.0 GB of weights do not fit in 32
    ]
    plan = make_cpu_plans(question(instructions=None))[0]
    assert "--dtype bfloat16" in plan.command
    narrow = replace(question(instructions=None), keeps_narrow=True)
    plan = make_cpu_plans(narrow)[0]
    assert plan.name == "float32" and plan.fits and "--dtype" not in plan.command
    assert 14.7 * GB < plan.weight_bytes < 14.8 * GB, "half of that, but for the embedding and the norms"


def test_a_form_that_is_asked_for_is_the_only_one():
    asked = replace(question(), dtype="float32", quantization="int8")
    (plan,) = make_cpu_plans(asked)
    assert (plan.engine.dtype, plan.engine.quantization) == ("float32", "int8")
    assert "--dtype float32 --quantization int8" in plan.command


def test_memory_by_hand():
    """KV cache: 4 requests of 512 blocks and the null block, each 2 x 32 x 16 x 8 x 128 x 2 bytes. Weights with the rotary table."""
    plan = make_cpu_plans(question())[0]
    assert plan.kv_cache_bytes == (4 * 512 + 1) * 2_097_152
    assert plan.weight_bytes == 14_496_047_104 + 8192 * 2 * 128 * 4


def test_speed_by_hand():
    """A step reads the weights without the embedding, and 6,144 tokens of 131,072 bytes for each request. A prompt of 4,096 tokens in
    chunks of 1,024 is arithmetic, as in test_roofline.py.
    """
    plan = make_cpu_plans(question())[0]
    assert plan.speed.step_s == pytest.approx((14_227_611_648 + 4 * 6144 * 131_072) / 50e9)
    weights = 4096 * 2 * 6_979_588_096 + 4 * 2 * 134_217_728
    attention = 1024 * 4 * 4096 * 32 * (512 + 1536 + 2560 + 3584)
    assert plan.speed.prefill_s == pytest.approx((weights + attention) / 940e9, rel=1e-4)
    int4 = make_cpu_plans(replace(question(), quantization="int4"))[0]
    assert int4.speed.step_s == pytest.approx((222_298_112 * 18 + 266_240 * 2 + 4 * 6144 * 131_072) / 50e9)


def test_a_kv_cache_in_8_bits_by_hand():
    asked = replace(question(), kv_cache_dtype="int8")
    plan = make_cpu_plans(asked)[0]
    assert plan.kv_cache_bytes == (4 * 512 + 1) * 2 * 32 * 16 * 8 * (128 + 4)
    assert plan.speed.step_s == pytest.approx((14_227_611_648 + 4 * 6144 * 67_584) / 50e9)
    assert "--kv-cache-dtype int8" in plan.command
    assert make_parser().parse_args(plan.command.split()[1:]).kv_cache_dtype == "int8"
    tight = question(memory=9 * GB)
    assert "--kv-cache-dtype int8;" in str(refusal(tight, make_cpu_plans(tight)))
    assert any(plan.fits for plan in make_cpu_plans(replace(tight, kv_cache_dtype="int8")))


def test_cores_share_the_memory():
    few, many = (
        assumed(num_cores=4, memory_bytes=GB, instructions="avx512_bf16"),
        assumed(num_cores=64, memory_bytes=GB, instructions="avx512_bf16"),
    )
    assert (few.bytes_per_s, many.bytes_per_s) == (100e9, MAX_BYTES_PER_S)
    assert many.float32_flops_per_s == 16 * few.float32_flops_per_s


def test_serve_takes_the_command_and_finds_that_it_fits():
    for plan in make_cpu_plans(question()):
        args = make_parser().parse_args(plan.command.split()[1:])
        assert args.kv_cache_memory >= plan.kv_cache_bytes
        assert (args.max_model_len, args.max_num_seqs) == (8192, 4)
        assert args.quantization == plan.engine.quantization
        served = replace(plan.engine, kv_cache_bytes=args.kv_cache_memory)
        memory = Memory(total_bytes=32 * GB, available_bytes=plan.needed_bytes)
        assert check_fits(served, num_ranks=1, memory=memory, where="this machine") is None


def test_a_refusal_has_the_numbers_and_every_remedy_works():
    asked = question(memory=8 * GB)
    message = str(refusal(asked, make_cpu_plans(asked)))
    assert "with int4 weights and bfloat16 it needs 10.1 GB, of which the weights take 4.3 GB" in message
    fewer, shorter, more = (
        re.search(p, message) for p in (r"--concurrency (\d+)", r"--context (\d+)", r"with ([\d.]+) GB of memory\.")
    )
    assert fewer is not None and shorter is not None and more is not None
    work = asked.workload
    for workload in (replace(work, concurrency=int(fewer[1])), replace(work, context=int(shorter[1]), prompt_tokens=1)):
        assert any(plan.fits for plan in make_cpu_plans(replace(asked, workload=workload)))
    assert any(fits for _, fits in forms(question(memory=int((float(more[1]) + 0.1) * GB))))


def test_a_model_that_cannot_be_quantized_has_the_other_forms():
    odd = replace(question(), model=PlannedModel(name="odd", config=replace(V0_3, intermediate_size=14_344)))
    assert [name for name, _ in forms(odd)] == ["bfloat16"]
    with pytest.raises(ConfigError, match="intermediate size is 14344"):
        make_cpu_plans(replace(odd, quantization="int4"))
