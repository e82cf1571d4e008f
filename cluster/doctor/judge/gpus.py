"""Driver and GPUs of one node: can this torch use them, are they free, does Ray know them."""

from collections.abc import Iterator, Sequence

from cluster.doctor.facts import Gpu, Machine, Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device
from cluster.doctor.words import GIB, size

# Within a major release of CUDA a driver runs what any newer toolkit of it built ("minor version compatibility").
MIN_DRIVERS = {11: 450, 12: 525, 13: 580}
FLASH_MIN_CAPABILITY = (8, 0)
BUSY_BYTES = GIB  # a driver's own share is some hundred MiB
OUR_PROCESS = "ray::RankActor"


def judge_gpus(node: Node, *, device: Device, rank_bytes: int | None = None) -> Iterator[Finding]:
    """rank_bytes: weights of one rank. On a node without GPUs one finding, which is a problem only where all ranks need one."""
    machine = node.machine
    assert machine is not None
    nvidia, at = machine.nvidia, node.address
    if not nvidia.gpus:
        yield _no_gpu(node, machine, device=device)
        return
    yield _driver(machine, at, device=device)
    if len(models := {gpu.name for gpu in nvidia.gpus}) > 1:
        remedy = (
            "Give each replica GPUs of one kind, through several Ray clusters or CUDA_VISIBLE_DEVICES at `ray start`."
        )
        yield warning(
            "gpu",
            f"Its GPUs differ: {', '.join(sorted(models))}; a replica is as fast as the slowest.",
            remedy,
            node=at,
        )
    if node.ray_gpus is not None and node.ray_gpus < len(nvidia.gpus):
        yield warning(
            "gpu",
            f"The machine has {len(nvidia.gpus)} GPUs, but Ray gives away {node.ray_gpus:g}.",
            "Leave out --num-gpus at `ray start`, or check CUDA_VISIBLE_DEVICES in its environment.",
            node=at,
        )
    for gpu in nvidia.gpus:
        yield from _judge_gpu(gpu, at, rank_bytes=rank_bytes)


def _no_gpu(node: Node, machine: Machine, *, device: Device) -> Finding:
    nvidia, at = machine.nvidia, node.address
    if nvidia.failure is not None and (nvidia.num_devices or device == "cuda"):
        remedy = "Install or reload the NVIDIA driver (a reboot after an update often suffices); `dmesg | grep -i nvrm` says more."
        return problem("driver", f"The NVIDIA driver does not work: {nvidia.failure.rstrip('.')}.", remedy, node=at)
    if nvidia.num_devices:
        remedy = "Put nvidia-smi, which comes with the driver, on the PATH of the user that runs Ray."
        return warning(
            "driver", f"{nvidia.num_devices} GPUs are here, but no nvidia-smi to ask about them.", remedy, node=at
        )
    if device == "cuda" and node.ray_gpus is None:
        remedy = "Use a machine with a GPU or --device cpu; a container needs `docker run --gpus all`."
        return problem("gpu", "There is no NVIDIA GPU here.", remedy, node=at)
    if device == "cuda":
        return ok("gpu", "No GPU here; ranks go to other nodes.", node=at)
    return ok("gpu", f"No GPU here: ranks compute on the CPU, {machine.num_cpus} cores.", node=at)


def _driver(machine: Machine, at: str, *, device: Device) -> Finding:
    versions, driver = machine.versions, machine.nvidia.driver
    if versions.torch is None:
        return problem(
            "driver", "torch is not installed.", "Install Tramontane there: `pip install tramontane`.", node=at
        )
    if versions.cuda is None and device == "cuda":
        remedy = "Install a CUDA build of the same release of torch; see https://pytorch.org/get-started."
        return problem(
            "driver", f"torch {versions.torch} is a build for CPUs and cannot use these GPUs.", remedy, node=at
        )
    if versions.cuda is None:
        remedy = "To use them, install a CUDA build of the same release of torch; see https://pytorch.org/get-started."
        return warning(
            "driver", f"torch {versions.torch} is a build for CPUs: the GPUs here stay idle.", remedy, node=at
        )
    needed = MIN_DRIVERS.get(int(versions.cuda.split(".")[0]))
    major = int(driver.split(".")[0]) if driver and driver.split(".")[0].isdigit() else None
    if needed is not None and major is not None and major < needed:
        return problem(
            "driver",
            f"Driver {driver} is too old for torch {versions.torch}, which was built with CUDA {versions.cuda} and needs driver {needed}.",
            f"Update the driver to {needed} or newer, or install torch built with an older CUDA.",
            node=at,
        )
    return ok("driver", f"Driver {driver} runs torch {versions.torch} (CUDA {versions.cuda}).", node=at)


def _judge_gpu(gpu: Gpu, at: str, *, rank_bytes: int | None) -> Iterator[Finding]:
    name = f"GPU {gpu.index} ({gpu.name})"
    if gpu.is_mig:
        remedy = (
            "Turn it off with `nvidia-smi -mig 0`, or use one instance per replica: NCCL joins no instances of one GPU."
        )
        yield warning("gpu", f"{name} is divided by MIG.", remedy, node=at)
    if gpu.compute_mode == "Prohibited":
        yield problem(
            "gpu", f"{name} takes no processes (compute mode Prohibited).", "Run `nvidia-smi -c DEFAULT`.", node=at
        )
    if gpu.compute_capability is not None and gpu.compute_capability < FLASH_MIN_CAPABILITY:
        capability = ".".join(map(str, gpu.compute_capability))
        remedy = "Use an Ampere GPU (A10G, A100) or a newer one."
        yield warning(
            "gpu",
            f"{name} has compute capability {capability}: no FlashAttention and no fast bfloat16.",
            remedy,
            node=at,
        )
    yield _memory(gpu, name, at, rank_bytes=rank_bytes)


def _memory(gpu: Gpu, name: str, at: str, *, rank_bytes: int | None) -> Finding:
    free, total = gpu.free_bytes, gpu.total_bytes
    if free is None or total is None:
        return ok("gpu", f"{name}; its memory is not reported.", node=at)
    has = f"{name}: {size(free)} of {size(total)} free"
    if rank_bytes is not None and rank_bytes > total:
        remedy = "Divide the model over more GPUs with --tensor-parallel-size, or use larger ones."
        return problem("gpu", f"{has}, less than the {size(rank_bytes)} of a rank's weights.", remedy, node=at)
    if total - free <= BUSY_BYTES:
        return ok("gpu", f"{has}.", node=at)
    if any(process.name.startswith(OUR_PROCESS) for process in gpu.processes):
        return ok("gpu", f"{has}; a rank of a running replica holds the rest.", node=at)
    holders = ", ".join(f"{p.pid} ({p.name})" for p in gpu.processes)
    remedy = (
        f"End what holds it: process {holders}."
        if holders
        else "`nvidia-smi` on the host shows what holds it; a container does not."
    )
    if rank_bytes is not None and rank_bytes > free:
        return problem("gpu", f"{has}, less than the {size(rank_bytes)} of a rank's weights.", remedy, node=at)
    return warning("gpu", f"{has}: the KV cache gets what remains.", remedy, node=at)


def busy_gpus(node: Node) -> Sequence[int]:
    """Indexes of GPUs that somebody uses."""
    gpus = node.machine.nvidia.gpus if node.machine is not None else ()
    return [g.index for g in gpus if g.processes or (g.free_bytes or 0) + BUSY_BYTES < (g.total_bytes or 0)]
