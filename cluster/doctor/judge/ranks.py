"""Which ranks a trial starts and what its outcome means. Knows the rule by which `serve` places ranks, and no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.doctor.facts import Failed, Node, NotTried, Reduced, RunningReplica
from cluster.doctor.findings import Finding, ok, problem, warning

CHECK = "all-reduce"
MIN_LOCAL_CPU_RANKS = 2
# A decode step of a 7B model has 65 all-reduces: 2 ms each cost more than the step itself.
SLOW_LATENCY_S = 2e-3

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Gang:
    """Ranks to start together. `spread`: each on a node of its own, else where a replica's ranks would be put."""

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


def choose_device(asked: Literal["auto", "cpu", "cuda"], nodes: Sequence[Node]) -> Device:
    """As `serve` does: GPUs where there are some that torch can use."""
    if asked != "auto":
        return asked
    return "cuda" if any(has_usable_gpus(node) for node in nodes) else "cpu"


def holds_ranks(node: Node, device: Device) -> bool:
    """Whether Ray may put a rank there."""
    if device == "cuda":
        return has_usable_gpus(node)
    return node.ray_cpus is None or node.ray_cpus >= 1


def judge_places(nodes: Sequence[Node], device: Device) -> list[Finding]:
    """nodes: of a Ray cluster. Silent where a rank could be somewhere."""
    if any(holds_ranks(node, device) for node in nodes):
        return []
    if device == "cuda":
        remedy = "Add nodes with GPUs, see what is found about the driver on those that have some, or use --device cpu."
        return [problem("ray", "No node has a GPU that both torch and Ray can use.", remedy)]
    remedy = "Start Ray on the nodes that shall hold ranks without --num-cpus=0."
    return [problem("ray", "No node has a CPU that Ray gives away: ranks have no place.", remedy)]


def choose_gang(nodes: Sequence[Node], device: Device, tensor_parallel_size: int | None) -> Gang | None:
    """The ranks of one replica if its size was given, else ranks on all GPUs or, without any, on all nodes. None: one CPU rank."""
    holders = [node for node in nodes if holds_ranks(node, device)]
    if tensor_parallel_size is not None:
        gang = Gang(device=device, tensor_parallel_size=tensor_parallel_size)
    elif device == "cuda":
        gang = Gang(device=device, tensor_parallel_size=sum(map(_num_gpus, holders)))
    elif len(holders) > 1:
        gang = Gang(device=device, tensor_parallel_size=len(holders), spread=True)
    else:
        cpus = holders[0].ray_cpus if holders else 0
        gang = Gang(device=device, tensor_parallel_size=MIN_LOCAL_CPU_RANKS if cpus is None or cpus >= 2 else 1)
    return gang if gang.tensor_parallel_size > 1 or device == "cuda" else None


def judge_all_reduce(outcome: Reduced | Failed | NotTried | None) -> list[Finding]:
    """None: a single CPU rank, which talks to nobody."""
    if outcome is None:
        return [ok(CHECK, "One rank on the CPU needs no collectives.")]
    if isinstance(outcome, NotTried):
        return [_judge_not_tried(outcome)]
    if isinstance(outcome, Failed):
        return [_judge_failure(outcome)]
    size = len(outcome.ranks)
    if size == 1:
        return [ok(CHECK, f"A rank on {outcome.ranks[0]} computes; alone it needs no collectives.")]
    through = f" through {outcome.interface}" if outcome.interface else ""
    figures = (
        f"8 KB in {outcome.latency_s * 1e3:.2f} ms (median), {outcome.bus_bytes_per_s / 1e9:.2f} GB/s of bus bandwidth"
    )
    sentence = f"{size} ranks on {_places(outcome.ranks)} all-reduce by {outcome.collectives}{through}: {figures}."
    if outcome.latency_s > SLOW_LATENCY_S:
        remedy = (
            "Every token waits for two of these a layer. Keep the ranks of a replica on one host (a smaller "
            "--tensor-parallel-size), or look for what else uses these cores and this network."
        )
        return [warning(CHECK, sentence, remedy)]
    return [ok(CHECK, sentence)]


def _judge_failure(outcome: Failed) -> Finding:
    """Names the ranks and, with them, the hosts between which it went wrong."""

    def named(rank: int) -> str:
        return f"rank {rank} ({outcome.ranks[rank]})" if 0 <= rank < len(outcome.ranks) else f"rank {rank}"

    parts = [outcome.failure.rstrip(".") + "."]
    for waiting in outcome.waiting:
        for_whom = ", ".join(map(named, waiting.waiting_for))
        rest = f" and waits for {for_whom}" if for_whom else ""
        parts.append(f"{named(waiting.rank).capitalize()} {waiting.doing}{rest}.")
    if outcome.suspects:
        parts.append(f"Missing: {', '.join(map(named, outcome.suspects))}.")
    places = set(outcome.ranks)
    if len(places) > 1:
        remedy = (
            "Look at the findings on ports and interfaces; the ranks need every TCP port between their "
            "nodes. NCCL_DEBUG=INFO in the environment of `ray start` makes NCCL say more."
        )
    else:
        remedy = "Look at the findings on GPUs, memory and shared memory; on a cluster, Ray's log folder has the ranks' own words."
    return problem(CHECK, f"{len(outcome.ranks)} ranks on {_places(outcome.ranks)} failed: {' '.join(parts)}", remedy)


def _judge_not_tried(outcome: NotTried) -> Finding:
    if not outcome.running:
        return warning(CHECK, f"Not tried: {outcome.reason}", outcome.remedy)
    said = "; ".join(map(_running, outcome.running))
    return ok(
        CHECK, f"Not tried, since it would take from what serves: {outcome.reason} The replicas that run say: {said}."
    )


def _running(replica: RunningReplica) -> str:
    ranks = f"{replica.deployment} {replica.replica_id}, {len(replica.ranks)} ranks on {_places(replica.ranks)}"
    if len(replica.ranks) == 1:
        return f"{replica.deployment} {replica.replica_id}, 1 rank on {replica.ranks[0]}"
    if replica.mean_s is None:
        return f"{ranks}, {replica.num_all_reduces:,} all-reduces"
    return f"{ranks}, {replica.num_all_reduces:,} all-reduces of {replica.mean_s * 1e3:.2f} ms on average"


def _places(ranks: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(ranks))


def _num_gpus(node: Node) -> int:
    assert node.machine is not None, "only machines that were looked at hold ranks on GPUs"
    seen = len(node.machine.nvidia.gpus)
    return seen if node.ray_gpus is None else min(seen, int(node.ray_gpus))
