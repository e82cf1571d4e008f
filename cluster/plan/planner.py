"""Makes plans from a question (model, GPU, context, concurrency): one per GPU and tensor-parallel size, the recommended one first.

Where one replica cannot hold all requests, a plan has several, each on a machine of its own. Pure: values in, values out. If nothing fits,
it says how much is missing and what would fit.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.plan.gpus import GPUS, Gpu
from cluster.plan.memory import RankMemory, rank_memory
from cluster.plan.models import PlannedModel
from cluster.plan.offers import Cloud, Offer, Price, find_offers
from cluster.plan.roofline import Speed, Workload, speed
from workers.config import Dtype, EngineConfig, KVCacheDtype, ModelConfig, Quantization
from workers.device.memory import gigabytes
from workers.device.sizes import decide
from workers.errors import ConfigError

# Of one machine; more have none of the clouds.
MAX_GPUS = 8
# Of one plan. More requests than these hold are a question for several deployments.
MAX_REPLICAS = 64


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to plan for. cloud: None for any. spot: compare spot prices instead of on-demand prices."""

    model: PlannedModel
    workload: Workload
    dtype: Dtype
    quantization: Quantization | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    gpu_memory_utilization: float = 0.9
    cloud: Cloud | None = None
    spot: bool = False
    enable_lora: bool = False
    max_loras: int = EngineConfig.max_loras
    max_lora_rank: int = EngineConfig.max_lora_rank

    def engine(self, tensor_parallel_size: int, gpu: Gpu) -> EngineConfig:
        """The configuration of `tramontane serve --max-num-seqs CONCURRENCY` on such GPUs. Raises ConfigError."""
        concurrency = self.workload.concurrency
        return EngineConfig(
            model_path=self.model.name,
            model=self.model.config,
            device="cuda",
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=self.workload.context,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_num_seqs=concurrency,
            max_num_batched_tokens=decide(gpu.sizes, max_num_seqs=concurrency).max_num_batched_tokens,
            enable_lora=self.enable_lora,
            max_loras=self.max_loras,
            max_lora_rank=self.max_lora_rank,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One kind of GPU and one tensor-parallel size. offers: the machines with exactly these GPUs, cheapest first.

    `memory` and `speed` are of one replica, with its share of the requests (`memory.num_sequences`).
    """

    gpu: Gpu
    tensor_parallel_size: int
    memory: RankMemory
    speed: Speed
    offers: tuple[Offer, ...]
    spot: bool
    num_replicas: int = 1

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def price(self) -> Price | None:
        """The price of the cheapest machine, spot or on demand as the question says."""
        return next((p for o in self.offers if (p := o.price(spot=self.spot)) is not None), None)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all replicas."""
        return self.num_replicas * self.speed.tokens_per_s

    def usd_per_hour(self, price: Price) -> float:
        """Cost of all machines."""
        return self.num_replicas * price.usd_per_hour

    def usd_per_million_tokens(self, price: Price) -> float:
        """Cost of one million generated tokens, if the machines are always busy."""
        return self.usd_per_hour(price) / (self.tokens_per_s * 3600) * 1e6


def make_plan(question: Question, gpu: Gpu, tensor_parallel_size: int, *, offers: Iterable[Offer] = ()) -> Plan:
    """One replica for all requests. Raises ConfigError for a size by which the model cannot be divided."""
    config = question.engine(tensor_parallel_size, gpu)
    found = find_offers(offers, gpu.name, tensor_parallel_size, cloud=question.cloud, spot=question.spot)
    return Plan(
        gpu=gpu,
        tensor_parallel_size=tensor_parallel_size,
        memory=rank_memory(config, gpu),
        speed=speed(config, gpu.in_float8() if config.quantization == "fp8" else gpu, question.workload),
        offers=tuple(found),
        spot=question.spot,
    )


def spread(question: Question, plan: Plan) -> Plan:
    """The plan, or if its replica cannot hold all requests, one with as many replicas as hold them; 32 requests are 7 x 5 on an A10G.

    The plan as it is if a replica holds no request at all, or if MAX_REPLICAS are not enough.
    """
    if plan.fits:
        return plan

    def share(concurrency: int) -> Question:
        return replace(question, workload=replace(question.workload, concurrency=concurrency))

    def fits(concurrency: int) -> bool:
        return rank_memory(share(concurrency).engine(plan.tensor_parallel_size, plan.gpu), plan.gpu).fits

    concurrency = question.workload.concurrency
    largest = _largest(concurrency, fits)
    num_replicas = -(-concurrency // largest) if largest else 0
    if not 1 < num_replicas <= MAX_REPLICAS:
        return plan
    one = make_plan(share(-(-concurrency // num_replicas)), plan.gpu, plan.tensor_parallel_size)
    return replace(one, offers=plan.offers, num_replicas=num_replicas)


def make_plans(
    question: Question,
    *,
    gpus: Sequence[Gpu] = tuple(GPUS.values()),
    tensor_parallel_size: int | None = None,
    offers: Sequence[Offer] = (),
) -> list[Plan]:
    """A plan for each GPU and each size that the model allows, or for the given size. The recommended plan is first.

    Sorted: plans that fit machines on sale, by their price per hour; then plans that fit but are not on sale, those with the fewest GPUs
    first; then the rest.
    """
    sizes = sizes_of(question.model.config) if tensor_parallel_size is None else [tensor_parallel_size]
    plans, refusals = [], []
    for gpu, size in itertools.product(gpus, sizes):
        try:
            plans.append(spread(question, make_plan(question, gpu, size, offers=offers)))
        except ConfigError as e:  # a size by which quantised rows cannot be divided
            refusals.append(e)
    if not plans:
        raise refusals[0]

    def rank(plan: Plan) -> tuple[bool, bool, float, int, int]:
        price = plan.price
        cost = float("inf") if price is None else plan.usd_per_hour(price)
        num_gpus = plan.num_replicas * plan.tensor_parallel_size
        return not plan.fits, not plan.offers, cost, num_gpus, plan.num_replicas

    return sorted(plans, key=rank)


def sizes_of(model: ModelConfig) -> list[int]:
    """The tensor-parallel sizes that the engine allows for this model, up to the GPUs of one machine."""
    return [size for size in model.tensor_parallel_sizes if size <= MAX_GPUS]


def refusal(question: Question, plans: Sequence[Plan], *, offers: Sequence[Offer] = ()) -> ConfigError:
    """Says in numbers why none of `plans` fits, and what would fit."""
    closest = min(plans, key=lambda p: p.memory.missing_bytes * p.tensor_parallel_size)
    memory, workload = closest.memory, question.workload
    gpus = f"{closest.tensor_parallel_size} {closest.gpu.name}"
    whole = memory.blocks_per_sequence // memory.num_groups * memory.block_size >= workload.context
    window = "" if whole else " (limited by the window)"
    message = (
        f"{question.model.name} does not fit on {gpus} with {workload.concurrency} x {workload.context:,} tokens: each GPU needs "
        f"{gigabytes(memory.usable_bytes + memory.missing_bytes)}, of which the KV cache{window} takes "
        f"{gigabytes((memory.needed_blocks + 1) * memory.block_bytes)}, and may use {gigabytes(memory.usable_bytes)} of its "
        f"{gigabytes(memory.total_bytes)}; {gigabytes(memory.missing_bytes)} are missing."
    )
    remedies = _remedies(question, closest, offers)
    return ConfigError(
        message,
        remedy=f"Use one of: {'; '.join(remedies)}."
        if remedies
        else "Use a smaller model: no known GPU has enough memory.",
    )


def _remedies(question: Question, closest: Plan, offers: Sequence[Offer]) -> list[str]:
    """Options the user can change: less work on the same GPUs, more GPUs, or other GPUs."""
    remedies = []
    workload, size = question.workload, closest.tensor_parallel_size
    block_size = closest.memory.block_size

    def fits(smaller: Workload) -> bool:
        return rank_memory(replace(question, workload=smaller).engine(size, closest.gpu), closest.gpu).fits

    concurrency = _largest(workload.concurrency, lambda n: fits(replace(workload, concurrency=n)))
    if concurrency:
        remedies.append(f"--concurrency {concurrency}")
    num_blocks = _largest(workload.context // block_size, lambda n: fits(replace(workload, context=n * block_size)))
    if num_blocks:
        remedies.append(f"--context {num_blocks * block_size}")
    in_8_bits = replace(question, kv_cache_dtype="int8")
    if question.kv_cache_dtype == "auto" and rank_memory(in_8_bits.engine(size, closest.gpu), closest.gpu).fits:
        remedies.append("--kv-cache-dtype int8")
    if question.quantization is None and question.model.config.stored is None:
        remedies += _quantizations(question, closest)
    fitting = [p for p in make_plans(question, offers=offers) if p.fits]
    same = [p.tensor_parallel_size for p in fitting if p.gpu == closest.gpu and p.num_replicas == 1]
    if same:
        remedies.append(f"--tensor-parallel-size {min(same)}")
    other = next((p for p in fitting if p.gpu != closest.gpu and p.offers and p.num_replicas == 1), None)
    if other is not None:
        remedies.append(f"--gpu {other.gpu.name} --tensor-parallel-size {other.tensor_parallel_size}")
    return remedies


def _quantizations(question: Question, closest: Plan) -> Iterator[str]:
    """The one that changes the weights least and with which the work fits on the same GPUs."""
    choices: tuple[Quantization, ...] = ("int8", "int4")
    for quantization in choices:
        try:
            engine = replace(question, quantization=quantization).engine(closest.tensor_parallel_size, closest.gpu)
        except ConfigError:  # a model that cannot be quantised
            return
        if rank_memory(engine, closest.gpu).fits:
            yield f"--quantization {quantization}"
            return


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `limit` that fits, if all smaller ones fit; 0 if none fits."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))
