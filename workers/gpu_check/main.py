"""Runs the checks in order within a time budget, and says what they found."""

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from workers.config import Quantization
from workers.device.require import require_gpu
from workers.errors import ConfigError
from workers.gpu_check import (
    attention_cases,
    ceilings,
    kernel_cases,
    model_cases,
    quantized_cases,
    sampler_cases,
    sanitizer,
    speed,
)
from workers.gpu_check.models import demo_model
from workers.gpu_check.report import Report

BUDGET_S = 480.0
SECTIONS = ("ceilings", "kernels", "attention", "quantized", "sampler", "models", "speed", "sanitizer")
# For compute-sanitizer, which makes kernels some hundred times slower. Only by name.
SMALL = "small"
CHECKED_QUANTIZATIONS: tuple[Quantization, ...] = ("int4", "fp8")


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that was checked is right, whatever the speed. 1: something is wrong, or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m workers.gpu_check", description=__doc__)
    parser.add_argument("--output", type=Path, help="writes what was found as JSON")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, SMALL], default=SECTIONS, metavar="SECTION")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="sections that begin later are left out")
    args = parser.parse_args(argv)
    try:
        report = check_gpu(_say, only=args.only, budget_s=args.budget_s, output=args.output)
    except ConfigError as e:
        _say(f"✗ {e}")
        return 1
    return int(report.is_wrong)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def check_gpu(
    say: Callable[[str], None],
    *,
    only: Sequence[str] = SECTIONS,
    budget_s: float = BUDGET_S,
    output: Path | None = None,
) -> Report:
    """Checks the first GPU that this process sees, and says each finding. output: a file for what was found, as JSON.

    Raises ConfigError with the reason if torch can use no GPU.
    """
    device = require_gpu("This process")
    facts = {
        "gpu": device.name,
        "memory_bytes": device.memory_bytes,
        "compute_capability": list(device.compute_capability),
        "driver": driver_release(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _triton_release(),
        "python": platform.python_version(),
    }
    say(", ".join(f"{name} {value}" for name, value in facts.items()))
    report = Report(budget_s=budget_s, say=say)
    _run(report, only, torch.device("cuda"))
    if output is not None:
        report.write(output, facts)
    say("Something is wrong, see ✗ above." if report.is_wrong else "All that was checked is right.")
    return report


def _run(report: Report, only: Sequence[str], device: torch.device) -> None:
    limits = None
    if "ceilings" in only or "speed" in only:
        with report.section("What this GPU reaches"):
            limits = ceilings.measure(report, device)
    if "kernels" in only or SMALL in only:
        with report.section("Kernels"):
            kernel_cases.check(report, device)
    if "attention" in only or SMALL in only:
        shapes = attention_cases.SHAPES[:: 12 if SMALL in only else 1]
        with report.section("Attention"):
            triton = attention_cases.selected("triton", device)
            attention_cases.check_values(report, "triton", triton, device, shapes)
            attention_cases.check_bits(report, "triton", triton, device, shapes[::6])
            in_8_bits = attention_cases.KV_SHAPES[:: 5 if SMALL in only else 1]
            attention_cases.check_values(report, "triton, KV in 8 bits,", triton, device, in_8_bits)
            attention_cases.check_bits(report, "triton, KV in 8 bits", triton, device, in_8_bits[::4])
        if SMALL not in only:
            with report.section("FlashAttention"):
                _check_flash(report, device)
    if "quantized" in only or SMALL in only:
        with report.section("Quantized weights"):
            quantized_cases.check(
                report, device, shape=quantized_cases.Shape(256, 512) if SMALL in only else quantized_cases.SHAPE
            )
    if "sampler" in only:
        with report.section("Sampling"):
            sampler_cases.check(report, device)
    if "models" in only:
        checks = {
            "A model": lambda: model_cases.against_transformers(report, device),
            "CUDA graphs": lambda: model_cases.graphs(report),
        }
        if (path := demo_model()) is not None:
            checks["Streams"] = lambda: model_cases.streams(report, path, device)
            for quantization in CHECKED_QUANTIZATIONS:
                checks[f"Streams with {quantization} weights"] = partial(
                    model_cases.quantized_streams, report, path, device, quantization
                )
            checks["Tensor parallel"] = lambda: model_cases.two_ranks(report, path, device)
        for name, check in checks.items():
            with report.section(name):
                check()
            torch.cuda.empty_cache()
        if path is None:
            with report.section("The demo model"):
                report.add("streams, and two tensor-parallel ranks", "left out", "its files are not here")
    if "speed" in only and limits is not None:
        with report.section("Speed, random 7B weights in bf16"):
            speed.check(report, limits)
        torch.cuda.empty_cache()
        with report.section("Speed of products with quantized weights"):
            quantized_cases.measure(report, limits, device)
        with report.section("Speed, random 7B weights in int4"):
            speed.check_quantized(report, limits, "int4")
        torch.cuda.empty_cache()
    if "sanitizer" in only:
        with report.section("compute-sanitizer"):
            sanitizer.check(report)


def _check_flash(report: Report, device: torch.device) -> None:
    """The second backend, which some builds of torch lack."""
    flash = attention_cases.selected("flash", device)
    shapes = [shape for shape in attention_cases.SHAPES if shape.block_size == 256]
    try:
        flash(shapes[0])
    except ConfigError as e:
        report.add("flash", "left out", str(e))
        return
    attention_cases.check_values(report, "flash", flash, device, shapes)


def driver_release() -> str | None:
    """As nvidia-smi gives it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _triton_release() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
