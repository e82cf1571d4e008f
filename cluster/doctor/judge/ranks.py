"""Which ranks the all-reduce trial starts, and what its outcome means. Knows how `serve` places ranks; does not know Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.doctor.facts import AllReduceFailure, AllReduceResult, AllReduceSkipped, Node, RunningReplica
from cluster.doctor.findings import Finding, ok, problem, warning

CHECK = "all-reduce"
MIN_LOCAL_CPU_RANKS = 2
# A decode step of a 7B model has 65 all-reduces; at 2 ms each they take longer than the step itself.
SLOW_LATENCY_S = 2e-3

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class TrialGang:
    """The ranks to start. `spread`: each on a node of its own; otherwise placed like a replica's ranks."""

    device: Device
    tensor_parallel_size: int
    spread: bool = False


def has_usable_gpus(node: Node) -> bool:
    machine = node.machine
    return (
        machine is not None
        and bool(machine.nvidia.gpus)
        and machine.versions.cuda is not None
        and (node.ray_gpus is None or node.ray_gpus >= 1)
    )


def choose_device(requested: Literal["auto", "cpu", "cuda"], nodes: Sequence[Node]) -> Device:
    """As `serve` chooses: GPUs if there are any that torch can use."""
    if requested != "auto":
        return requested
    return "cuda" if any(has_usable_gpus(node) for node in nodes) else "cpu"


def can_run_ranks(node: Node, device: Device) -> bool:
    """Whether Ray can place a rank on the node."""
    if device == "cuda":
        return has_usable_gpus(node)
    return node.ray_cpus is None or node.ray_cpus >= 1


def judge_placement(nodes: Sequence[Node], device: Device) -> list[Finding]:
    """nodes: all nodes of a Ray cluster. Empty if at least one of them can run a rank."""
    if any(can_run_ranks(node, device) for node in nodes):
        return []
    if device == "cuda":
        remedy = "Add nodes with GPUs, or use --device cpu. On nodes that have GPUs, see the findings about the driver."
        return [problem("ray", "No node has a GPU that both torch and Ray can use.", remedy)]
    remedy = "Start Ray without --num-cpus=0 on the nodes that should run ranks."
    return [problem("ray", "No node has a CPU that Ray can use, so no rank can start.", remedy)]


def choose_gang(nodes: Sequence[Node], device: Device, tensor_parallel_size: int | None) -> TrialGang | None:
    """The ranks of one replica if its size is given, else one rank per GPU or, without GPUs, one per node. None: a single CPU rank."""
    usable = [node for node in nodes if can_run_ranks(node, device)]
    if tensor_parallel_size is not None:
        gang = TrialGang(device=device, tensor_parallel_size=tensor_parallel_size)
    elif device == "cuda":
        gang = TrialGang(device=device, tensor_parallel_size=sum(map(_num_gpus, usable)))
    elif len(usable) > 1:
        gang = TrialGang(device=device, tensor_parallel_size=len(usable), spread=True)
    else:
        cpus = usable[0].ray_cpus if usable else 0
        gang = TrialGang(device=device, tensor_parallel_size=MIN_LOCAL_CPU_RANKS if cpus is None or cpus >= 2 else 1)
    return gang if gang.tensor_parallel_size > 1 or device == "cuda" else None


def judge_all_reduce(outcome: AllReduceResult | AllReduceFailure | AllReduceSkipped | None) -> list[Finding]:
    """outcome: None for a single CPU rank, which has no other rank to reach."""
    if outcome is None:
        return [ok(CHECK, "A single rank on the CPU needs no collectives.")]
    if isinstance(outcome, AllReduceSkipped):
        return [_judge_skipped(outcome)]
    if isinstance(outcome, AllReduceFailure):
        return [_judge_failure(outcome)]
    size = len(outcome.ranks)
    if size == 1:
        return [ok(CHECK, f"A rank on {outcome.ranks[0]} works; a single rank needs no collectives.")]
    through = f" through {outcome.interface}" if outcome.interface else ""
    figures = (
        f"{outcome.latency_s * 1e3:.2f} ms for 8 KB (median), {outcome.bus_bytes_per_s / 1e9:.2f} GB/s of bus bandwidth"
    )
    message = f"{size} ranks on {_nodes(outcome.ranks)} all-reduce with {outcome.collectives}{through}: {figures}."
    if outcome.latency_s > SLOW_LATENCY_S:
        remedy = (
            "Every token waits for two of these per layer. Keep the ranks of a replica on one host with a smaller "
            "--tensor-parallel-size, or find out what else uses these cores and this network."
        )
        return [warning(CHECK, message, remedy)]
    return [ok(CHECK, message)]


def _judge_failure(outcome: AllReduceFailure) -> Finding:
    """Names the ranks that failed and the nodes they ran on."""

    def named(rank: int) -> str:
        return f"rank {rank} ({outcome.ranks[rank]})" if 0 <= rank < len(outcome.ranks) else f"rank {rank}"

    parts = [outcome.failure.rstrip(".") + "."]
    for waiting in outcome.waiting:
        others = ", ".join(map(named, waiting.waiting_for))
        rest = f" and waits for {others}" if others else ""
        parts.append(f"{named(waiting.rank).capitalize()} {waiting.doing}{rest}.")
    if outcome.suspects:
        parts.append(f"Missing: {', '.join(map(named, outcome.suspects))}.")
    if len(set(outcome.ranks)) > 1:
        remedy = (
            "See the findings about ports and interfaces; the ranks need every TCP port between their nodes. For more "
            "from NCCL, set NCCL_DEBUG=INFO in the environment of `ray start`."
        )
    else:
        remedy = "See the findings about GPUs, memory and shared memory. On a cluster, Ray's log folder has the errors of the ranks."
    return problem(CHECK, f"{len(outcome.ranks)} ranks on {_nodes(outcome.ranks)} failed: {' '.join(parts)}", remedy)


def _judge_skipped(outcome: AllReduceSkipped) -> Finding:
    if not outcome.running:
        return warning(CHECK, f"Not tried: {outcome.reason}", outcome.remedy)
    measured = "; ".join(map(_describe_replica, outcome.running))
    return ok(
        CHECK, f"Not tried, because running replicas use the resources. {outcome.reason} They measured: {measured}."
    )


def _describe_replica(replica: RunningReplica) -> str:
    ranks = f"{replica.deployment} {replica.replica_id}, {len(replica.ranks)} ranks on {_nodes(replica.ranks)}"
    if len(replica.ranks) == 1:
        return f"{replica.deployment} {replica.replica_id}, 1 rank on {replica.ranks[0]}"
    if replica.mean_s is None:
        return f"{ranks}, {replica.num_all_reduces:,} all-reduces"
    return f"{ranks}, {replica.num_all_reduces:,} all-reduces of {replica.mean_s * 1e3:.2f} ms on average"


def _nodes(ranks: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(ranks))


def _num_gpus(node: Node) -> int:
    assert node.machine is not None, "only examined machines run ranks on GPUs"
    found = len(node.machine.nvidia.gpus)
    return found if node.ray_gpus is None else min(found, int(node.ray_gpus))
