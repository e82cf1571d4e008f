"""The output of `plan --finetune`: a table for people, JSON for programs. Does no arithmetic except units."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.plan.finetune.memory import Training, num_adapter_parameters
from cluster.plan.finetune.planner import FinetunePlan
from cluster.plan.models import PlannedModel
from cluster.terminal.tables import plain_table
from workers.device.memory import gigabytes

_NONE = "–"
_ASSUMED = (
    "For examples/finetune/finetune.py. Adapters: with their gradients and Adam's moments. Activations: the inputs of all layers, kept for "
    "the backward pass. Working set: one layer, or the logits, while it is computed. This and CUDA's own memory are estimates. Speeds are "
    "upper bounds from the GPU's arithmetic: expect a third to a half."
)


def finetune_report(model: PlannedModel, training: Training, plans: Sequence[FinetunePlan]) -> RenderableType:
    """plans: the recommended one first."""
    table = plain_table()
    for title in ("GPU", "Base in"):
        table.add_column(title, no_wrap=True)
    for title in (
        "Weights",
        "Adapters",
        "Activations",
        "Working set",
        "CUDA",
        "Total",
        "GPU has",
        "Fits",
        "Tokens/s",
        "USD/h",
        "USD/M tokens",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for plan in plans:
        memory, usd = plan.memory, plan.usd_per_million_tokens
        sizes = (memory.weights, memory.adapters, memory.kept, memory.most, memory.cuda, memory.total)
        table.add_row(
            plan.gpu.name,
            plan.quantization or "bfloat16",
            *map(gigabytes, sizes),
            gigabytes(plan.gpu.memory_bytes),
            "yes" if plan.fits else "no",
            f"{plan.tokens_per_s:,.0f}",
            _NONE if plan.price is None else f"{plan.price.usd_per_hour:.2f}",
            _NONE if usd is None else f"{usd:.2f}",
            style=None if plan.fits else "dim",
        )
    shown: list[RenderableType] = [Text(_headline(model, training)), Text(), table, Text()]
    if plans[0].fits:
        best = plans[0]
        where = "" if best.offer is None else f", {best.offer.cloud} {best.offer.instance_type}"
        shown += [
            Text(f"Recommended: one {best.gpu.name}{where}, the base in {best.quantization or 'bfloat16'}"),
            Text(),
        ]
    return Group(*shown, Text(_ASSUMED))


def command(model: PlannedModel, training: Training, plan: FinetunePlan) -> str:
    """Of the recipe."""
    sizes = f"--batch-size {training.batch_size} --max-length {training.max_length} --rank {training.rank}"
    return f"python examples/finetune/finetune.py {model.name} DATA --output OUT {sizes}{plan.options}"


def finetune_json(model: PlannedModel, training: Training, plans: Sequence[FinetunePlan]) -> dict[str, Any]:
    """chosen: index of the recommended plan, or null if none fits."""
    return {
        "model": model.name,
        "training": asdict(training),
        "adapter_parameters": num_adapter_parameters(model.config, training.rank),
        "chosen": 0 if plans[0].fits else None,
        "plans": [
            {
                "gpu": plan.gpu.name,
                "quantization": plan.quantization,
                "memory": {**asdict(plan.memory), "total": plan.memory.total, "gpu": plan.gpu.memory_bytes},
                "fits": plan.fits,
                "tokens_per_s": plan.tokens_per_s,
                "price": None if plan.price is None else asdict(plan.price),
                "usd_per_million_tokens": plan.usd_per_million_tokens,
                "command": command(model, training, plan),
            }
            for plan in plans
        ],
    }


def _headline(model: PlannedModel, training: Training) -> str:
    num = num_adapter_parameters(model.config, training.rank)
    return (
        f"{model.name}: LoRA of rank {training.rank} beside every matrix of a layer, {num / 1e6:.1f} M parameters; "
        f"{training.batch_size} conversations of {training.max_length:,} tokens at a time"
    )
