"""Plans for one machine that computes on its CPU: one per form of the weights, the recommended one first. Pure: values in, values out."""

import bisect
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cluster.config.dtype import keeps_more_in_float32
from cluster.plan.cpu.machine import CpuMachine
from cluster.plan.memory import activation_bytes, blocks_per_sequence, chunk_blocks
from cluster.plan.models import PlannedModel
from cluster.plan.roofline import Speed, Workload, speed
from workers.config import Dtype, EngineConfig, KVCacheDtype, Quantization, describe_dtype
from workers.device.fit import PROCESS_BYTES, need_of
from workers.device.memory import gigabytes
from workers.device.sizes import CPU, decide
from workers.errors import ConfigError

# Ray and one gateway, and what the system keeps for itself.
SERVER_BYTES = 1_000_000_000
USABLE_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class CpuQuestion:
    """dtype None: what `serve` would choose, and bfloat16. quantization "all": weights as they are, in 8 and in 4 bits. keeps_narrow:
    EngineConfig.narrow_weights in float32.
    """

    model: PlannedModel
    machine: CpuMachine
    workload: Workload
    dtype: Dtype | None = None
    quantization: Quantization | Literal["all"] | None = "all"
    kv_cache_dtype: KVCacheDtype = "auto"
    keeps_narrow: bool = False

    @property
    def default_dtype(self) -> Dtype:
        """As --dtype auto chooses: see cluster/config/dtype.py."""
        config = self.model.config
        if keeps_more_in_float32(config) or config.dtype != "bfloat16":
            return "float32"
        return "bfloat16" if self.machine.has_bfloat16 else "float32"

    def engine(self, dtype: Dtype, quantization: Quantization | None) -> EngineConfig:
        """The configuration of `tramontane serve --device cpu --max-num-seqs CONCURRENCY`. Raises ConfigError."""
        work = self.workload
        sizes = decide(CPU, max_num_seqs=work.concurrency)
        return EngineConfig(
            model_path=self.model.name,
            model=self.model.config,
            dtype=dtype,
            quantization=quantization,
            narrow_weights=self.keeps_narrow and dtype == "float32",
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=work.context,
            max_num_seqs=work.concurrency,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class CpuPlan:
    """Bytes of one rank with all cores. kv_cache_bytes: for every request of the workload at its full length. other_bytes: activations,
    processes and the system.
    """

    engine: EngineConfig
    weight_bytes: int
    kv_cache_bytes: int
    other_bytes: int
    usable_bytes: int
    speed: Speed
    command: str

    @property
    def name(self) -> str:
        return describe_dtype(self.engine.dtype, self.engine.weight_form)

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.kv_cache_bytes + self.other_bytes

    @property
    def missing_bytes(self) -> int:
        """0 if it fits."""
        return max(0, self.needed_bytes - self.usable_bytes)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.usable_bytes


def make_cpu_plans(question: CpuQuestion) -> list[CpuPlan]:
    """The plans that fit come first; among them, the one that changes the weights least. Raises ConfigError for a form that is asked for
    and cannot work; of all forms, those that cannot are left out.
    """
    plans = []
    forms = _forms(question)
    for dtype, quantization in forms:
        try:
            plans.append(_make_plan(question, question.engine(dtype, quantization)))
        except ConfigError:
            if len(forms) == 1 or quantization is None:
                raise
    return sorted(plans, key=lambda plan: not plan.fits)


def refusal(question: CpuQuestion, plans: list[CpuPlan]) -> ConfigError:
    """Says in numbers why no plan fits, and what would."""
    closest = min(plans, key=lambda plan: plan.needed_bytes)
    work = question.workload

    def fits_as(asked: CpuQuestion) -> bool:
        return _make_plan(asked, asked.engine(closest.engine.dtype, closest.engine.quantization)).fits

    def fits(smaller: Workload) -> bool:
        return fits_as(replace(question, workload=smaller))

    remedies = []
    if concurrency := _largest(work.concurrency, lambda n: fits(replace(work, concurrency=n))):
        remedies.append(f"--concurrency {concurrency}")
    block = closest.engine.block_size
    if blocks := _largest(work.context // block, lambda n: fits(replace(work, context=n * block))):
        remedies.append(f"--context {blocks * block}")
    if question.kv_cache_dtype == "auto" and fits_as(replace(question, kv_cache_dtype="int8")):
        remedies.append("--kv-cache-dtype int8")
    remedies.append(f"a machine with {gigabytes(int(closest.needed_bytes / USABLE_SHARE) + 1)} of memory")
    return ConfigError(
        f"{question.model.name} does not fit in {gigabytes(question.machine.memory_bytes)} of memory with {work.concurrency} x "
        f"{work.context:,} tokens: with {closest.name} it needs {gigabytes(closest.needed_bytes)}, of which the weights take "
        f"{gigabytes(closest.weight_bytes)} and the KV cache {gigabytes(closest.kv_cache_bytes)}.",
        remedy=f"Use {'one of: ' if len(remedies) > 1 else ''}{'; '.join(remedies)}.",
    )


def _forms(question: CpuQuestion) -> list[tuple[Dtype, Quantization | None]]:
    default = question.dtype or question.default_dtype
    if question.quantization is not None and question.quantization != "all":
        return [(default, question.quantization)]
    forms: list[tuple[Dtype, Quantization | None]] = [(default, None)]
    if question.dtype is None and default != "bfloat16":
        forms.append(("bfloat16", None))
    if question.quantization == "all":
        forms += [(default, "int8"), (default, "int4")]
    return forms


def _make_plan(question: CpuQuestion, engine: EngineConfig) -> CpuPlan:
    machine = question.machine
    num_blocks = engine.max_num_seqs * blocks_per_sequence(engine) + chunk_blocks(engine)
    kv_cache_bytes = (num_blocks + 1) * engine.kv_block_bytes
    return CpuPlan(
        engine=engine,
        weight_bytes=need_of(engine).weight_bytes,
        kv_cache_bytes=kv_cache_bytes,
        other_bytes=activation_bytes(engine) + PROCESS_BYTES + SERVER_BYTES,
        usable_bytes=int(USABLE_SHARE * machine.memory_bytes),
        speed=speed(engine, machine.rates(engine.dtype), question.workload),
        command=_command(question, engine, kv_cache_bytes),
    )


def _command(question: CpuQuestion, engine: EngineConfig, kv_cache_bytes: int) -> str:
    """`serve` with the options that differ from its defaults."""
    words = ["tramontane", "serve", question.model.name]
    if question.model.revision is not None:
        words += ["--revision", question.model.revision]
    if question.model.gguf_file is not None:
        words += ["--gguf-file", question.model.gguf_file]
    words += ["--device", "cpu"]
    if engine.dtype != question.default_dtype:
        words += ["--dtype", engine.dtype]
    if engine.quantization is not None:
        words += ["--quantization", engine.quantization]
    if engine.kv_cache_dtype != "auto":
        words += ["--kv-cache-dtype", engine.kv_cache_dtype]
    words += ["--max-model-len", str(engine.max_model_len), "--max-num-seqs", str(engine.max_num_seqs)]
    words += ["--kv-cache-memory", f"{-(-kv_cache_bytes // 2**20)}MiB"]
    return shlex.join(words)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `limit` that fits, if all smaller ones fit; 0 if none fits."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))
