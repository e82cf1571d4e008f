"""The checks of a GPU, with the CPU in its place where they need no kernel: they pass what is right and find what is wrong."""

import json

import pytest
import torch
from support import triton_interpreter
from support.paths import DEMO_MODEL

from workers.attention.sdpa import SdpaBackend
from workers.device import require
from workers.device.probe import NoGpu
from workers.gpu_check import attention_cases, main, model_cases, quantized_cases, sampler_cases
from workers.gpu_check.attention_cases import Shape
from workers.gpu_check.report import Report
from workers.quant.pack_cuda import GroupedMatrix

CPU = torch.device("cpu")
SHAPES = [
    Shape(group=4, head_dim=16, window=100, block_size=16),
    Shape(group=1, head_dim=16, window=None, block_size=4),
]


@pytest.fixture
def report() -> Report:
    return Report(budget_s=100.0, say=lambda line: None)


class ShiftedBackend(SdpaBackend):
    """Off by a hundredth, and by more in a larger batch."""

    def forward(self, q, k_cache, v_cache, metadata):
        return super().forward(q, k_cache, v_cache, metadata) * (1.1 + 0.01 * len(q))


class ZerosForUnused(SdpaBackend):
    """The specification's products span whole tiles, so unused slots must be numbers."""

    def forward(self, q, k_cache, v_cache, metadata):
        return super().forward(q, k_cache.nan_to_num(0.0), v_cache.nan_to_num(0.0), metadata)


def made_of(kind):
    return lambda shape: kind(**attention_cases.sizes(shape))


def test_a_right_backend_passes(report):
    attention_cases.check_values(report, "right", made_of(ZerosForUnused), CPU, SHAPES)
    assert [line.status for line in report.lines] == ["ok"]


@pytest.mark.parametrize("backend", [ShiftedBackend, SdpaBackend])
def test_wrong_values_are_found(report, backend):
    attention_cases.check_values(report, "wrong", made_of(backend), CPU, SHAPES)
    assert [line.status for line in report.lines] == ["wrong"]


def test_bits_that_depend_on_the_batch_are_found(report):
    attention_cases.check_bits(report, "right", made_of(ZerosForUnused), CPU, SHAPES[:1])
    attention_cases.check_bits(report, "wrong", made_of(ShiftedBackend), CPU, SHAPES[:1])
    assert [line.status for line in report.lines] == ["ok", "wrong"]


class ZerosForUnusedIn8Bits(SdpaBackend):
    def forward(self, q, k_cache, v_cache, metadata):
        return super().forward(q, *(cache.dequantize().nan_to_num(0.0) for cache in (k_cache, v_cache)), metadata)


def test_keys_and_values_in_8_bits_are_checked(report):
    shapes = [Shape(group=2, head_dim=16, window=100, block_size=4, kv=kv) for kv in ("int8", "fp8")]
    attention_cases.check_values(report, "right", made_of(ZerosForUnusedIn8Bits), CPU, shapes)
    attention_cases.check_bits(report, "right", made_of(ZerosForUnusedIn8Bits), CPU, shapes[:1])
    attention_cases.check_values(report, "wrong", made_of(SdpaBackend), CPU, shapes)
    assert [line.status for line in report.lines] == ["ok", "ok", "wrong"]


def test_sampled_tokens_are_compared(report):
    sampler_cases.check(report, CPU, num_steps=2)
    assert [line.status for line in report.lines] == ["ok", "ok"], report.lines


def test_streams_are_cut_and_resumed(report):
    model_cases.streams(report, DEMO_MODEL, CPU, num_streams=3)
    assert [line.status for line in report.lines] == ["ok", "ok"], report.lines
    assert "3 equal" in report.lines[0].detail and "93 of 93" in report.lines[1].detail


def test_streams_with_quantised_weights_are_cut_and_resumed(report):
    model_cases.quantized_streams(report, DEMO_MODEL, CPU, "int8", num_streams=2)
    assert [line.status for line in report.lines] == ["ok"] and "62 of 62" in report.lines[0].detail, report.lines


def test_products_with_quantised_weights_are_compared(report, monkeypatch):
    triton_interpreter.install()
    monkeypatch.setattr(quantized_cases, "ROWS", (1, 20))
    monkeypatch.setattr(quantized_cases, "BITS_ROWS", 3)
    quantized_cases.check(report, CPU, shape=quantized_cases.Shape(32, 256))
    assert {line.status for line in report.lines} == {"ok"} and len(report.lines) == 2 * 8 + 1, report.lines


def test_a_wrong_product_is_found(report, monkeypatch):
    triton_interpreter.install()
    monkeypatch.setattr(quantized_cases, "ROWS", (1,))
    monkeypatch.setattr(quantized_cases, "BITS_ROWS", 1)
    right = GroupedMatrix.multiply
    monkeypatch.setattr(GroupedMatrix, "multiply", lambda self, x: right(self, x) * 1.02)
    quantized_cases.check(report, CPU, shape=quantized_cases.Shape(32, 128))
    assert [line.status for line in report.lines] == ["wrong", "ok"] * 8 + ["ok"]


def test_two_ranks_on_one_device(report):
    model_cases.two_ranks(report, DEMO_MODEL, CPU)
    assert [line.status for line in report.lines] == ["ok"], report.lines


def test_a_section_that_fails_does_not_end_the_others(report):
    with report.section("first"):
        raise RuntimeError("CUDA error: an illegal memory access\nand much more")
    with report.section("second"):
        report.add("figure", "measured", ms=2.0)
    assert report.is_wrong
    assert [(line.section, line.status) for line in report.lines] == [("first", "wrong"), ("second", "measured")]
    assert report.lines[0].detail == "RuntimeError: CUDA error: an illegal memory access"


def test_the_time_limit_and_the_file(tmp_path):
    now = [0.0]
    report = Report(budget_s=10.0, say=lambda line: None, clock=lambda: now[0])
    assert report.has_time
    now[0] = 10.0
    assert not report.has_time
    with report.section("Speed"):
        report.target("decode", 0.5, 0.85, ms=3.0)
    report.write(tmp_path / "gpu.json", {"gpu": "A10G"})
    body = json.loads((tmp_path / "gpu.json").read_text())
    assert body["facts"] == {"gpu": "A10G"} and body["is_wrong"] is False
    assert body["lines"][0]["status"] == "slow" and body["lines"][0]["figures"] == {
        "share": 0.5,
        "target": 0.85,
        "ms": 3.0,
    }


def test_without_a_gpu_it_says_why_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(require, "probe", lambda: NoGpu(message="No GPU is here.", remedy="Use one.", has_gpu=False))
    assert main.main([]) == 1
    assert capsys.readouterr().out == "✗ This process cannot use a GPU: no GPU is here. Use one.\n"
