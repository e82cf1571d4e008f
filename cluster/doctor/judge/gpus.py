"""The driver and the GPUs of one node: whether torch can use them, whether they are free, and whether Ray knows them."""

from collections.abc import Iterator, Sequence

from cluster.doctor.amounts import GIB, format_bytes
from cluster.doctor.facts import Gpu, Machine, Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device, has_usable_gpus
from workers.device.probe import MIN_DRIVERS

FLASH_MIN_CAPABILITY = (8, 0)
BUSY_BYTES = GIB  # an idle GPU has a few hundred MiB in use by the driver
OUR_PROCESS = "ray::RankActor"


def judge_gpus(node: Node, *, device: Device, rank_bytes: int | None = None) -> Iterator[Finding]:
    """rank_bytes: size of one rank's weights. A node without GPUs gives one finding, a problem only if every rank needs a GPU."""
    machine = node.machine
    assert machine is not None
    nvidia, at = machine.nvidia, node.address
    if not nvidia.gpus:
        yield _no_gpu(node, machine, device=device)
        return
    yield _driver(machine, at, device=device)
    if machine.missing_build_tools and device == "cuda":
        yield warning(
            "gpu",
            f"Triton, which compiles the GPU kernels, does not find {' and '.join(machine.missing_build_tools)}. Slower kernels "
            "take the place of its own.",
            "On Debian and Ubuntu, run `apt-get install gcc libc6-dev python3-dev`.",
            node=at,
        )
    if len(models := {gpu.name for gpu in nvidia.gpus}) > 1:
        remedy = (
            "Give each replica GPUs of one kind: use several Ray clusters, or set CUDA_VISIBLE_DEVICES for `ray start`."
        )
        yield warning(
            "gpu",
            f"The GPUs differ: {', '.join(sorted(models))}. A replica is as fast as its slowest GPU.",
            remedy,
            node=at,
        )
    if node.ray_gpus is not None and node.ray_gpus < len(nvidia.gpus):
        yield warning(
            "gpu",
            f"The machine has {len(nvidia.gpus)} GPUs, but Ray manages only {node.ray_gpus:g}.",
            "Run `ray start` without --num-gpus, or check CUDA_VISIBLE_DEVICES in its environment.",
            node=at,
        )
    for gpu in nvidia.gpus:
        yield from _judge_gpu(gpu, at, rank_bytes=rank_bytes)


def judge_unchecked(nodes: Sequence[Node], *, device: Device) -> Finding:
    """What an examination leaves open on these nodes, in one line."""
    if device == "cuda" and any(has_usable_gpus(node) for node in nodes):
        return ok(
            "gpu kernels",
            "Not checked: what the GPUs compute, and how fast. `tramontane doctor --gpu` does it on one GPU.",
        )
    return ok(
        "gpu kernels",
        "Not checked without a GPU: the GPU kernels, their speed, CUDA graphs and NCCL. On a machine with a GPU, `tramontane doctor --gpu` "
        "checks them.",
    )


def _no_gpu(node: Node, machine: Machine, *, device: Device) -> Finding:
    nvidia, at = machine.nvidia, node.address
    if nvidia.failure is not None and (nvidia.num_devices or device == "cuda"):
        remedy = "Install or reload the NVIDIA driver; after an update a reboot is often enough. `dmesg | grep -i nvrm` shows its errors."
        return problem("driver", f"The NVIDIA driver does not work: {nvidia.failure.rstrip('.')}.", remedy, node=at)
    if nvidia.num_devices:
        remedy = "Put nvidia-smi, which comes with the driver, on the PATH of the user that runs Ray."
        return warning("driver", f"There are {nvidia.num_devices} GPUs, but nvidia-smi is missing.", remedy, node=at)
    if device == "cuda" and node.ray_gpus is None:
        remedy = "Use a machine with a GPU, or --device cpu. A container needs `docker run --gpus all`."
        return problem("gpu", "This machine has no NVIDIA GPU.", remedy, node=at)
    if device == "cuda":
        return ok("gpu", "No GPU; ranks run on other nodes.", node=at)
    return ok("gpu", f"No GPU; ranks run on the CPU, which has {machine.num_cpus} cores.", node=at)


def _driver(machine: Machine, at: str, *, device: Device) -> Finding:
    versions, driver = machine.versions, machine.nvidia.driver
    if versions.torch is None:
        return problem(
            "driver", "torch is not installed.", "Install Tramontane there: `pip install tramontane`.", node=at
        )
    if versions.cuda is None and device == "cuda":
        remedy = "Install a CUDA build of the same torch release; see https://pytorch.org/get-started."
        return problem("driver", f"torch {versions.torch} is a CPU build and cannot use these GPUs.", remedy, node=at)
    if versions.cuda is None:
        remedy = "To use them, install a CUDA build of the same torch release; see https://pytorch.org/get-started."
        return warning("driver", f"torch {versions.torch} is a CPU build, so the GPUs stay idle.", remedy, node=at)
    needed = MIN_DRIVERS.get(int(versions.cuda.split(".")[0]))
    major = int(driver.split(".")[0]) if driver and driver.split(".")[0].isdigit() else None
    if needed is not None and major is not None and major < needed:
        return problem(
            "driver",
            f"Driver {driver} is too old for torch {versions.torch}: its CUDA {versions.cuda} needs driver {needed} or newer.",
            f"Update the driver to {needed} or newer, or install a torch built with an older CUDA.",
            node=at,
        )
    return ok("driver", f"Driver {driver} supports torch {versions.torch} (CUDA {versions.cuda}).", node=at)


def _judge_gpu(gpu: Gpu, at: str, *, rank_bytes: int | None) -> Iterator[Finding]:
    name = f"GPU {gpu.index} ({gpu.name})"
    if gpu.is_mig:
        remedy = "Turn MIG off with `nvidia-smi -mig 0`, or use one instance per replica: NCCL cannot join instances of the same GPU."
        yield warning("gpu", f"{name} is partitioned by MIG.", remedy, node=at)
    if gpu.compute_mode == "Prohibited":
        yield problem(
            "gpu",
            f"{name} accepts no processes: its compute mode is Prohibited.",
            "Run `nvidia-smi -c DEFAULT`.",
            node=at,
        )
    if gpu.compute_capability is not None and gpu.compute_capability < FLASH_MIN_CAPABILITY:
        capability = ".".join(map(str, gpu.compute_capability))
        remedy = "Use an Ampere GPU (A10G, A100) or a newer one."
        yield warning(
            "gpu",
            f"{name} has compute capability {capability}: it has neither FlashAttention nor fast bfloat16.",
            remedy,
            node=at,
        )
    yield _memory(gpu, name, at, rank_bytes=rank_bytes)


def _memory(gpu: Gpu, name: str, at: str, *, rank_bytes: int | None) -> Finding:
    free, total = gpu.free_bytes, gpu.total_bytes
    if free is None or total is None:
        return ok("gpu", f"{name}. The driver does not report its memory.", node=at)
    has = f"{name} has {format_bytes(free)} of {format_bytes(total)} free"
    if rank_bytes is not None and rank_bytes > total:
        remedy = "Split the model over more GPUs with --tensor-parallel-size, or use larger GPUs."
        return problem("gpu", f"{has}, but the weights of a rank need {format_bytes(rank_bytes)}.", remedy, node=at)
    if total - free <= BUSY_BYTES:
        return ok("gpu", f"{has}.", node=at)
    if any(process.name.startswith(OUR_PROCESS) for process in gpu.processes):
        return ok("gpu", f"{has}; a running replica uses the rest.", node=at)
    processes = ", ".join(f"{p.pid} ({p.name})" for p in gpu.processes)
    remedy = (
        f"Stop the processes that use it: {processes}."
        if processes
        else "Stop the processes that use it. `nvidia-smi` on the host shows them; inside a container it does not."
    )
    if rank_bytes is not None and rank_bytes > free:
        return problem("gpu", f"{has}, but the weights of a rank need {format_bytes(rank_bytes)}.", remedy, node=at)
    return warning("gpu", f"{has}, so the KV cache will be smaller.", remedy, node=at)


def busy_gpus(node: Node) -> Sequence[int]:
    """Indexes of the GPUs that are in use."""
    gpus = node.machine.nvidia.gpus if node.machine is not None else ()
    return [g.index for g in gpus if g.processes or (g.free_bytes or 0) + BUSY_BYTES < (g.total_bytes or 0)]
