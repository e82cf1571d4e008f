"""The type that --dtype auto means: a pure decision from the checkpoint and the CPUs on which ranks may run, and its reason in words.

All replicas of a deployment have one type, because a stream must continue with the same bits on any of them. So `serve` decides before
it starts ranks, by all CPUs that it can know: one without bfloat16 makes it float32. Knows no Ray and no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config.engine import Device
from workers.config import Dtype, ModelConfig
from workers.errors import CheckpointError
from workers.native.bfloat16 import Bfloat16Support, bfloat16_support, keeps_narrow_weights


@dataclass(frozen=True, kw_only=True)
class NodeCpu:
    """`where`: how a sentence names the machine. `bfloat16`: None if it did not answer."""

    where: str
    bfloat16: Bfloat16Support | None


Cpus = Callable[[], Sequence[NodeCpu]]


@dataclass(frozen=True, kw_only=True)
class DtypeChoice:
    """`reason`: a sentence for the person who started the command; None where an option or the checkpoint alone decides."""

    dtype: Dtype
    reason: str | None = None


def this_machine() -> Sequence[NodeCpu]:
    """The one CPU of a command that computes on its own machine."""
    return [NodeCpu(where="this machine", bfloat16=bfloat16_support())]


def choose_dtype(
    requested: Literal["auto"] | Dtype,
    *,
    device: Device,
    stored: Dtype,
    cpus: Cpus,
    keeps_more: bool = False,
) -> DtypeChoice:
    """auto: on CUDA the checkpoint's own type. On the CPU bfloat16 if the checkpoint has it and every CPU supports it, else float32:
    without instructions bfloat16 computes more slowly, and float32 needs little more memory (EngineConfig.narrow_weights).

    stored: the type of the checkpoint's weights. keeps_more: see `keeps_more_in_float32`. cpus: called only if they decide; empty where no
    node is known yet.
    """
    if requested != "auto":
        return DtypeChoice(dtype=requested)
    if device == "cuda":
        return DtypeChoice(dtype=stored)
    if keeps_more:
        return DtypeChoice(
            dtype="float32", reason="float32, because the GGUF file keeps what it does not quantize in float32."
        )
    if stored != "bfloat16":
        return DtypeChoice(dtype="float32", reason=f"float32, because the checkpoint is in {stored}.")
    found = cpus()
    if not found:
        return DtypeChoice(dtype="float32", reason="float32, because no node with CPUs has joined the Ray cluster yet.")
    for cpu in found:
        if cpu.bfloat16 is None:
            return DtypeChoice(dtype="float32", reason=f"float32, because {cpu.where} does not say what its CPU has.")
        if cpu.bfloat16.obstacle is not None:
            return DtypeChoice(dtype="float32", reason=f"float32, because {cpu.where} {cpu.bfloat16.obstacle}")
    flags = dict.fromkeys(str(cpu.bfloat16.instructions).upper() for cpu in found if cpu.bfloat16 is not None)
    return DtypeChoice(
        dtype="bfloat16", reason=f"bfloat16, as the checkpoint; the CPU has instructions for it ({', '.join(flags)})."
    )


def keeps_more_in_float32(model: ModelConfig) -> bool:
    """Of a quantised GGUF file: its norms and scales are float32, its matrices take the same memory either way, and the same products of
    whole numbers compute them.
    """
    return model.layout == "gguf" and model.stored is not None


def keeps_narrow(dtype: Dtype, *, device: Device, stored: Dtype, model: ModelConfig) -> bool:
    """EngineConfig.narrow_weights: ranks that find no compiled kernels on their own machine correct it. stored: the type of the weights."""
    if device != "cpu" or dtype != "float32" or stored != "bfloat16" or model.stored is not None:
        return False
    return keeps_narrow_weights()


def stored_dtype(folder: Path, model: ModelConfig) -> Dtype:
    """The type of most of the checkpoint's weights, from the headers of its files; the configuration's if these cannot be read.

    params.json of Mistral's layout names no type, and a hand-made config.json may name a wrong one.
    """
    if model.layout == "gguf":
        return model.dtype
    # Late: importing the command line imports no module of weights.
    from workers.weights.files import weight_files
    from workers.weights.header import read_header

    names: dict[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    sizes = dict.fromkeys(names.values(), 0)
    try:
        for file in weight_files(folder, model.layout):
            for tensor in read_header(file)[1].values():
                if tensor.dtype in names:
                    sizes[names[tensor.dtype]] += tensor.end - tensor.start
    except CheckpointError:  # which the check of the checkpoint reports
        return model.dtype
    return max(sizes, key=lambda dtype: sizes[dtype]) if any(sizes.values()) else model.dtype
