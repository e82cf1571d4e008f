"""Memory, shared memory and disks of one node: whether there is room for what serving puts there."""

from collections.abc import Iterator

from cluster.doctor.amounts import GIB, MIB, format_bytes
from cluster.doctor.facts import Filesystem, Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device

KV_CACHE_BYTES = GIB  # the default of --kv-cache-memory, for each CPU rank
SHM_PER_RANK_BYTES = 2 * MIB + 4096  # the two buffers of workers.parallel.shared_memory, and its counters
NCCL_SHM_BYTES = GIB  # what NCCL's documentation recommends for containers
RAY_FILES = "Ray's files"
RAY_MAX_USED = 0.95  # Ray stops creating objects on a fuller disk
SCARCE_BYTES, LOW_BYTES = GIB, 5 * GIB


def judge_memory(node: Node, *, device: Device, num_ranks: int, rank_bytes: int | None) -> Finding:
    """num_ranks: how many ranks of one replica may run there. rank_bytes: one rank's weights in the type it computes with."""
    assert node.machine is not None
    free, total = node.machine.free_memory_bytes, node.machine.memory_bytes
    if free is None or total is None:
        return ok("memory", "The free memory is not known on this system.", node=node.address)
    has = f"{format_bytes(free)} of {format_bytes(total)} of memory are free"
    if device == "cuda" or rank_bytes is None:
        if free < 2 * GIB:
            remedy = "Stop other processes; torch, Ray and the gateway need about 2 GiB before the first request."
            return warning("memory", f"Only {has}.", remedy, node=node.address)
        return ok("memory", f"{has}.", node=node.address)
    need = rank_bytes + KV_CACHE_BYTES
    if free < need:
        remedy = (
            "Use --quantization int8 or int4, --dtype bfloat16, a smaller --kv-cache-memory, a larger --tensor-parallel-size on more "
            "nodes, or a machine with more memory."
        )
        message = f"{has}; one rank needs {format_bytes(need)} for weights and KV cache."
        return problem("memory", message, remedy, node=node.address)
    if num_ranks > 1 and free < need * num_ranks:
        remedy = "Spread the ranks over more nodes, or give each a smaller --kv-cache-memory."
        message = f"{has}; {num_ranks} ranks on this node would need {format_bytes(need * num_ranks)}."
        return warning("memory", message, remedy, node=node.address)
    return ok("memory", f"{has}; a rank needs {format_bytes(need)}.", node=node.address)


def judge_shared_memory(node: Node, *, device: Device, num_ranks: int) -> Finding:
    """num_ranks: how many ranks of one replica may run there."""
    assert node.machine is not None
    shm, at = node.machine.shm, node.address
    if shm is None:
        remedy = "Mount it: `mount -t tmpfs tmpfs /dev/shm`."
        return warning(
            "shared memory", "There is no /dev/shm, so ranks on this host use Gloo, which is slower.", remedy, node=at
        )
    has = f"{format_bytes(shm.free_bytes)} of {format_bytes(shm.total_bytes)} are free in /dev/shm"
    need = SHM_PER_RANK_BYTES * num_ranks
    remedy = (
        "Remove what `ls -lS /dev/shm` shows. Give a container more with `docker run --shm-size=8g`, or on Kubernetes with an "
        "emptyDir of medium Memory at /dev/shm."
    )
    if num_ranks > 1 and shm.free_bytes < need:
        return problem("shared memory", f"{has}; {num_ranks} ranks need {format_bytes(need)}.", remedy, node=at)
    num_gpus = len(node.machine.nvidia.gpus) if device == "cuda" else 0
    if num_gpus > 1 and shm.free_bytes < NCCL_SHM_BYTES:
        return warning(
            "shared memory",
            f"{has}; NCCL needs about {format_bytes(NCCL_SHM_BYTES)} for {num_gpus} GPUs.",
            remedy,
            node=at,
        )
    return ok("shared memory", f"{has}.", node=at)


def judge_disks(node: Node) -> Iterator[Finding]:
    assert node.machine is not None
    for disk in node.machine.disks:
        yield _judge_disk(disk, node.address)


def _judge_disk(disk: Filesystem, at: str) -> Finding:
    has = f"{format_bytes(disk.free_bytes)} of {format_bytes(disk.total_bytes)} are free at {disk.path}, for {disk.purpose}"
    remedy = "Remove files that are not needed."
    if disk.purpose == RAY_FILES:
        remedy += " To move Ray's files to another disk, set RAY_TMPDIR, or use --temp-dir with `ray start`."
        if disk.free_bytes < disk.total_bytes * (1 - RAY_MAX_USED):
            return problem(
                "disk", f"{has}; Ray stops creating objects on a disk that is {RAY_MAX_USED:.0%} full.", remedy, node=at
            )
    if disk.free_bytes < SCARCE_BYTES:
        return problem("disk", f"Only {has}.", remedy, node=at)
    if disk.free_bytes < LOW_BYTES:
        return warning("disk", f"Only {has}.", remedy, node=at)
    return ok("disk", f"{has}.", node=at)
