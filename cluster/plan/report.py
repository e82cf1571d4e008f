"""The output of `plan`: tables for people, JSON for programs. Does no arithmetic except units."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.plan.offers import Offer, Price
from cluster.plan.planner import Plan, Question
from cluster.terminal.tables import plain_table
from workers.config import ModelConfig, describe_dtype
from workers.device.memory import gigabytes
from workers.device.model_bytes import lora_bytes, num_parameters

_NONE = "–"
_ASSUMED = (
    "Speeds are upper bounds from memory bandwidth and arithmetic (the roofline). Expect less, and measure before you rely on them. The "
    "KV cache is computed as the engine does it; the memory that CUDA itself needs is an assumption."
)


def report(question: Question, plans: Sequence[Plan], *, one_gpu: bool) -> RenderableType:
    """one_gpu: also show the sizes that do not fit. With several GPUs they are only named."""
    parts: list[RenderableType] = [Text(_headline(question, plans[0])), Text()]
    fitting = [p for p in plans if p.fits]
    shown = sorted(plans, key=lambda p: p.tensor_parallel_size) if one_gpu else [p for p in fitting if p.offers]
    if shown:
        parts += [_plan_table(shown, concurrency=question.workload.concurrency, spot=question.spot), Text()]
    if not one_gpu and len(fitting) < len(plans):
        parts += [Text(f"Too small: {', '.join(_gpus(p) for p in plans if not p.fits)}."), Text()]
    if fitting:
        best = fitting[0]
        parts += [Text(f"Recommended: {_machine(question, best)}"), Text(_defaults(best))]
        if best.offers:
            parts += [_offer_table(best), Text(_sources(best))]
        parts += [Text()]
    return Group(*parts, Text(_ASSUMED))


def as_json(question: Question, plans: Sequence[Plan]) -> dict[str, Any]:
    """chosen: index of the recommended plan, or null if none fits. Memory is per rank, speed per replica, `usd_per_hour` per machine, of
    which each replica has one; `source` is the origin and date of a price.
    `defaults`: the sizes of `serve` on that GPU, where no option sets them.
    """
    return {
        "model": question.model.name,
        "left_out": question.model.left_out,
        "dtype": question.dtype,
        "quantization": question.quantization,
        "workload": asdict(question.workload),
        "chosen": 0 if plans and plans[0].fits else None,
        "plans": [_plan_json(plan) for plan in plans],
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    memory = plan.memory
    derived = ("needed_blocks", "missing_bytes", "num_kv_tokens", "max_sequences")
    return {
        "gpu": plan.gpu.name,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "num_replicas": plan.num_replicas,
        "fits": plan.fits,
        "memory": asdict(memory) | {name: getattr(memory, name) for name in derived},
        "speed": asdict(plan.speed),
        "defaults": asdict(plan.gpu.sizes),
        "offers": [_offer_json(plan, offer) for offer in plan.offers],
    }


def _offer_json(plan: Plan, offer: Offer) -> dict[str, Any]:
    fields = asdict(offer)
    for kind, price in (("on_demand", offer.on_demand), ("spot", offer.spot)):
        if price is not None:
            fields[kind]["usd_per_million_tokens"] = plan.usd_per_million_tokens(price)
    return fields


def _headline(question: Question, plan: Plan) -> str:
    engine, workload, model = question.engine(1, plan.gpu), question.workload, question.model.config
    kv_form = "" if engine.kv_cache_dtype == "auto" else f" in {engine.kv_cache_dtype}"
    form = describe_dtype(engine.dtype, engine.weight_form)
    on_disk = question.model.checkpoint_bytes
    disk = "" if on_disk is None else f", {gigabytes(on_disk)} on disk"
    left_out = "" if question.model.left_out is None else f" Left out: {question.model.left_out}."
    return (
        f"{question.model.name}: {num_parameters(engine) / 1e9:.2f} billion parameters, {form}{disk}, "
        f"{engine.kv_token_bytes / 1024:g} KiB of KV cache per token{kv_form}, {_attention(model)}.{left_out}\n"
        f"{workload.concurrency} requests at a time, each with {workload.prompt_tokens:,} prompt tokens and "
        f"{workload.output_tokens:,} output tokens.{_adapters(question, plan)}"
    )


def _adapters(question: Question, plan: Plan) -> str:
    if not question.enable_lora:
        return ""
    size = gigabytes(lora_bytes(question.engine(1, plan.gpu)))
    return f"\n{question.max_loras} adapters of rank up to {question.max_lora_rank} at a time: {size} where one GPU has all of the model."


def _attention(model: ModelConfig) -> str:
    """ "sliding window of 4,096"; of different layers "full attention in 9 layers, sliding window of 32,768 in 27 layers"."""
    counts = Counter(model.layer_windows)

    def name(window: int | None) -> str:
        return "full attention" if window is None else f"sliding window of {window:,}"

    if len(counts) == 1:
        return name(model.widest_window)
    windows = dict.fromkeys(group.window for group in model.layer_groups)
    return ", ".join(f"{name(window)} in {counts[window]} layers" for window in windows)


def _plan_table(plans: Sequence[Plan], *, concurrency: int, spot: bool) -> Table:
    table = _table("GPU", "TP", "Weights", "KV cache", "Blocks", "KV tokens", "Requests", "Fits", "ms/token")
    for name in ("Tokens/s", "First token", "Spot $/h" if spot else "$/h", "$/1M tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        memory, speed, price = plan.memory, plan.speed, plan.price
        table.add_row(
            plan.gpu.name if plan.num_replicas == 1 else f"{plan.num_replicas} x {plan.gpu.name}",
            str(plan.tensor_parallel_size),
            gigabytes(memory.weight_bytes),
            gigabytes(max(0, memory.kv_cache_bytes)),
            f"{memory.num_kv_blocks:,}",
            f"{memory.num_kv_tokens:,}",
            f"{min(concurrency, plan.num_replicas * memory.max_sequences):,}",
            "yes" if plan.fits else f"{gigabytes(memory.missing_bytes)} short",
            *(
                (
                    f"{speed.step_s * 1e3:.1f}",
                    f"{plan.tokens_per_s:,.0f}",
                    f"{speed.prefill_s * 1e3:,.0f} ms",
                    *_costs(plan, price),
                )
                if plan.fits
                else (_NONE,) * 5
            ),
            style=None if plan.fits else "dim",
        )
    return table


def _offer_table(plan: Plan) -> Table:
    table = _table(
        "Cloud", "Machine", "Region", "On demand $/h", "$/1M tokens", "As of", "Spot $/h", "$/1M tokens", "As of"
    )
    for offer in plan.offers:
        region = next((p.region for p in (offer.price(spot=plan.spot), offer.on_demand, offer.spot) if p), _NONE)
        table.add_row(
            offer.cloud,
            offer.instance_type if plan.num_replicas == 1 else f"{plan.num_replicas} x {offer.instance_type}",
            region,
            *(*_costs(plan, offer.on_demand), _date(offer.on_demand)),
            *(*_costs(plan, offer.spot), _date(offer.spot)),
        )
    return table


def _machine(question: Question, plan: Plan) -> str:
    gpus = f"{_gpus(plan)}, --tensor-parallel-size {plan.tensor_parallel_size}"
    if plan.num_replicas > 1:
        each = plan.memory.num_sequences
        gpus += f" --replicas {plan.num_replicas}: each replica on a machine of its own, with up to {each:,} requests"
    if plan.offers:
        return f"{gpus}."
    where = "" if question.cloud is None else f" on {question.cloud}"
    sold = "known to have exactly these GPUs" if question.spot else "known to be sold on demand with exactly these GPUs"
    return f"{gpus}. No machine{where} is {sold}; use your own."


def _defaults(plan: Plan) -> str:
    sizes = plan.gpu.sizes
    return (
        f"Defaults of `serve` there: up to {sizes.max_num_seqs} sequences and {sizes.max_num_batched_tokens:,} tokens a step "
        f"(batches: {sizes.max_background_tokens} beside other requests)."
    )


def _sources(plan: Plan) -> str:
    prices = [p for offer in plan.offers for p in (offer.on_demand, offer.spot) if p is not None]
    sources = dict.fromkeys(f"{p.source.name} ({p.source.date})" for p in prices)
    return f"Prices: {'; '.join(sources)}."


def _gpus(plan: Plan) -> str:
    gpus = f"{plan.tensor_parallel_size} {plan.gpu.name}"
    if plan.num_replicas == 1:
        return gpus
    return f"{plan.num_replicas} x {plan.gpu.name if plan.tensor_parallel_size == 1 else gpus}"


def _costs(plan: Plan, price: Price | None) -> tuple[str, str]:
    if price is None:
        return _NONE, _NONE
    return f"{plan.usd_per_hour(price):.2f}", f"{plan.usd_per_million_tokens(price):.2f}"


def _date(price: Price | None) -> str:
    return _NONE if price is None else price.source.date


def _table(first: str, *others: str) -> Table:
    table = plain_table()
    table.add_column(first, no_wrap=True)
    for name in others:
        left = name in ("Machine", "Region")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table
