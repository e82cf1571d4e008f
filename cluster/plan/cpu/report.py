"""The output of `plan --gpu cpu`: a table for people, JSON for programs. Does no arithmetic except units."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.plan.cpu.machine import CpuMachine
from cluster.plan.cpu.planner import CpuPlan, CpuQuestion
from cluster.terminal.tables import plain_table
from workers.device.memory import gigabytes
from workers.device.model_bytes import num_parameters

_NONE = "–"
_ASSUMED = (
    "Speeds are upper bounds from memory bandwidth and arithmetic (the roofline). Expect less, and measure before you rely on them. What "
    "processes and the system take is an assumption."
)


def cpu_report(question: CpuQuestion, plans: Sequence[CpuPlan]) -> RenderableType:
    """plans: in their order of recommendation."""
    parts: list[RenderableType] = [Text(_headline(question, plans[0])), Text(_machine(question.machine)), Text()]
    table = plain_table()
    table.add_column("Weights in", no_wrap=True)
    for name in ("Weights", "KV cache", "Other", "In all", "Fits", "ms/token", "Tokens/s", "First token"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        speed = plan.speed
        sizes = (plan.weight_bytes, plan.kv_cache_bytes, plan.other_bytes, plan.needed_bytes)
        speeds = (f"{speed.step_s * 1e3:.1f}", f"{speed.tokens_per_s:,.1f}", f"{speed.prefill_s:,.1f} s")
        table.add_row(
            plan.name.replace(" weights and ", ", "),
            *map(gigabytes, sizes),
            "yes" if plan.fits else f"{gigabytes(plan.missing_bytes)} short",
            *(speeds if plan.fits else (_NONE,) * len(speeds)),
            style=None if plan.fits else "dim",
        )
    parts += [table, Text()]
    return Group(*parts, Text(_ASSUMED))


def cpu_json(question: CpuQuestion, plans: Sequence[CpuPlan]) -> dict[str, Any]:
    """chosen: index of the recommended plan, or null if none fits. Bytes are those of the one rank."""
    return {
        "model": question.model.name,
        "left_out": question.model.left_out,
        "machine": asdict(question.machine),
        "workload": asdict(question.workload),
        "chosen": 0 if plans and plans[0].fits else None,
        "plans": [_plan_json(plan) for plan in plans],
    }


def _plan_json(plan: CpuPlan) -> dict[str, Any]:
    sizes = ("weight_bytes", "kv_cache_bytes", "other_bytes", "needed_bytes", "usable_bytes", "missing_bytes")
    return {
        "dtype": plan.engine.dtype,
        "quantization": plan.engine.quantization,
        "kv_cache_dtype": plan.engine.kv_cache_dtype,
        "fits": plan.fits,
        "memory": {name: getattr(plan, name) for name in sizes},
        "speed": asdict(plan.speed),
        "command": plan.command,
    }


def _headline(question: CpuQuestion, plan: CpuPlan) -> str:
    work = question.workload
    kv_form = "" if plan.engine.kv_cache_dtype == "auto" else f"; the KV cache in {plan.engine.kv_cache_dtype}"
    requests = "1 request" if work.concurrency == 1 else f"{work.concurrency} requests"
    left_out = "" if question.model.left_out is None else f" Left out: {question.model.left_out}."
    return (
        f"{question.model.name}: {num_parameters(plan.engine) / 1e9:.2f} billion parameters.{left_out} {requests} at a time, each "
        f"with {work.prompt_tokens:,} prompt tokens and {work.output_tokens:,} output tokens{kv_form}."
    )


def _machine(machine: CpuMachine) -> str:
    flops = machine.rates("bfloat16" if machine.has_bfloat16 else "float32").flops_per_s
    return (
        f"{gigabytes(machine.memory_bytes)} of memory, {machine.num_cores} cores, {machine.bytes_per_s / 1e9:.0f} GB/s, "
        f"{machine.float32_flops_per_s / 1e9:,.0f} GFLOP/s in float32"
        + (f" and {flops / 1e9:,.0f} in bfloat16" if machine.has_bfloat16 else "")
        + f" ({machine.source})."
    )
