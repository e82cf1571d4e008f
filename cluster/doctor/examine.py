"""The examination: looks at this machine or at a cluster's nodes, tries what can be tried, and has every part judged.

Knows the order and which check needs what; every check is elsewhere. Ray is imported only where it is used.
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from cluster.doctor.collect import Look, look
from cluster.doctor.facts import Failed, Link, Node, NotTried, Reduced
from cluster.doctor.findings import Finding, ok, problem
from cluster.doctor.judge.gpus import busy_gpus, judge_gpus
from cluster.doctor.judge.models import judge_models
from cluster.doctor.judge.network import judge_links, judge_network
from cluster.doctor.judge.ranks import (
    MIN_LOCAL_CPU_RANKS,
    Device,
    Gang,
    choose_device,
    choose_gang,
    holds_ranks,
    judge_all_reduce,
    judge_places,
)
from cluster.doctor.judge.resources import RAY_FILES, judge_disks, judge_memory, judge_shared_memory
from cluster.doctor.judge.versions import judge_versions
from cluster.doctor.local import judge_division, judge_port, locate_model
from cluster.doctor.words import counted, sentence_and_remedy
from cluster.system.data_dir import default_data_dir
from cluster.terminal.phases import Console
from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.doctor.ray_probe import RayNode
    from cluster.ray_runtime.session import RayCluster

log = logging.getLogger(__name__)

NAMESPACE = "tramontane-doctor"
LOOK_TIMEOUT_S = 60.0  # a node starts a process for it, and wakes its GPUs
LOCAL = "this machine"
RAY_REMEDY = "--log-level debug, and the logs below Ray's temporary folder, say more."
Outcome = Reduced | Failed | NotTried


@dataclass(frozen=True, kw_only=True)
class Order:
    """What was asked for. `tensor_parallel_size` None: all the ranks there can be."""

    model: str | None
    revision: str | None
    ray_address: str | None
    tensor_parallel_size: int | None
    device: Literal["auto", "cpu", "cuda"]
    host: str
    port: int
    deployment: str
    tries_ranks: bool
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Examination:
    findings: Sequence[Finding]
    nodes: Sequence[Node]
    all_reduce: Outcome | None


def examine(order: Order, console: Console) -> Examination:
    """Never raises for what it finds: that is in the findings. Whatever it started has ended when it returns."""
    findings: list[Finding] = []
    folder, about_model = locate_model(order.model, order.revision)
    with _joined(order, console, findings) as cluster:
        if cluster is not None:
            nodes, links = asyncio.run(_look_at_nodes(order, folder, console, findings))
            findings += judge_places(nodes, choose_device(order.device, nodes))
        else:
            with console.phase("Looking at this machine"):
                nodes, links = [_this_machine(order, folder)], []
        device = choose_device(order.device, nodes)
        findings += about_model
        if folder is not None and order.tensor_parallel_size is not None:
            findings += judge_division(folder, order.tensor_parallel_size)
        findings += _judge_all(nodes, order=order, device=device)
        findings += judge_links(links, nodes)
        outcome = None
        if order.tries_ranks and (cluster is not None or order.ray_address is None):
            outcome, about_ranks = _try_ranks(order, console, nodes, device=device, cluster=cluster)
            findings += about_ranks
    findings.append(judge_port(order.host, order.port))
    return Examination(findings=findings, nodes=nodes, all_reduce=outcome)


@contextmanager
def _joined(order: Order, console: Console, findings: list[Finding]) -> "Iterator[RayCluster | None]":
    """The cluster that was asked for. None if there was none, or if it cannot be joined, which is a finding."""
    if order.ray_address is None:
        yield None
        return
    from cluster.ray_runtime.session import connect

    with console.phase(f"Joining Ray at {order.ray_address}"):
        try:
            cluster = connect(order.ray_address, namespace=NAMESPACE, log_to_driver=False)
        except ConfigError as e:
            cluster = None
            findings.append(problem("ray", *sentence_and_remedy(e, otherwise=RAY_REMEDY)))
    try:
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()


def _this_machine(order: Order, folder: Path | None) -> Node:
    disks = {
        os.environ.get("RAY_TMPDIR", tempfile.gettempdir()): RAY_FILES,
        str(default_data_dir(order.deployment)): "files and batches",
    }
    seen = msgspec.json.decode(look(disks, None if folder is None else str(folder)), type=Look)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ray_gpus = float(_num_visible(visible)) if visible is not None and seen.machine.nvidia.gpus else None
    return Node(address=LOCAL, machine=seen.machine, model=seen.model, ray_gpus=ray_gpus)


def _num_visible(devices: str) -> int:
    """How many GPUs CUDA_VISIBLE_DEVICES leaves to a Ray of our own; "-1" hides all."""
    return sum(bool(device.strip()) and not device.strip().startswith("-") for device in devices.split(","))


async def _look_at_nodes(
    order: Order, folder: Path | None, console: Console, findings: list[Finding]
) -> tuple[list[Node], list[Link]]:
    from cluster.doctor.ray_probe import Probes, living_nodes

    ray_nodes = living_nodes()
    findings.append(ok("ray", _cluster_sentence(order, ray_nodes)))
    probes = Probes(ray_nodes, timeout_s=LOOK_TIMEOUT_S)
    try:
        with console.phase(f"Looking at {counted(len(ray_nodes), 'node')}"):
            temp_dirs = await probes.temp_dirs()
            disks = [{} if answer.value is None else {answer.value: RAY_FILES} for answer in temp_dirs]
            answers = await probes.run(look, [(d, None if folder is None else str(folder)) for d in disks])
        nodes = []
        for ray_node, answer in zip(ray_nodes, answers, strict=True):
            node = Node(address=ray_node.address, ray_cpus=ray_node.num_cpus, ray_gpus=ray_node.num_gpus)
            if answer.value is None:
                nodes.append(msgspec.structs.replace(node, failure=answer.failure))
            else:
                seen = msgspec.json.decode(answer.value, type=Look)
                nodes.append(msgspec.structs.replace(node, machine=seen.machine, model=seen.model))
        with console.phase("Connecting each node to each"):
            links = await probes.links()
    finally:
        probes.close()
    return nodes, links


def _cluster_sentence(order: Order, nodes: "Sequence[RayNode]") -> str:
    cpus, gpus = sum(n.num_cpus for n in nodes), sum(n.num_gpus for n in nodes)
    return f"The Ray cluster at {order.ray_address} has {counted(len(nodes), 'node')} with {cpus:g} CPUs and {gpus:g} GPUs."


def _judge_all(nodes: Sequence[Node], *, order: Order, device: Device) -> Iterator[Finding]:
    """Everything that facts alone decide."""
    for node in nodes:
        if node.machine is None:
            sentence = f"Nothing of Tramontane could be run there: {(node.failure or 'no answer').rstrip('.')}."
            remedy = (
                "Check with `ray status` that the node is up, and that the same release of Tramontane is installed there, in "
                "the Python that `ray start` runs in."
            )
            yield problem("node", sentence, remedy, node=node.address)
    yield from judge_versions(nodes, device=device)
    # A head that holds no ranks does not need the weights; a machine alone is asked for them whatever else is wrong.
    yield from judge_models([node for node in nodes if node.address == LOCAL or holds_ranks(node, device)])
    yield from judge_network(nodes, device=device)
    size = order.tensor_parallel_size or 1  # as `serve` takes it
    for node in nodes:
        if node.machine is None:
            continue
        rank_bytes = _rank_bytes(node, size=size, device=device)
        num_ranks = _most_ranks(node, size=size, device=device)
        sharing = _most_ranks(node, size=order.tensor_parallel_size or MIN_LOCAL_CPU_RANKS, device=device)
        yield from judge_gpus(node, device=device, rank_bytes=rank_bytes if device == "cuda" else None)
        yield judge_memory(node, device=device, num_ranks=num_ranks, rank_bytes=rank_bytes)
        yield judge_shared_memory(node, device=device, num_ranks=sharing)
        yield from judge_disks(node)


def _most_ranks(node: Node, *, size: int, device: Device) -> int:
    """Of a replica, how many Ray may put there; alone, a machine takes them all."""
    if not holds_ranks(node, device):
        return 0
    room = node.ray_gpus if device == "cuda" else node.ray_cpus
    return size if room is None else min(size, int(room))


def _rank_bytes(node: Node, *, size: int, device: Device) -> int | None:
    """Weights of one rank: as stored on a GPU, in float32 on the CPU. None where no rank can be, or without a readable model."""
    model = node.model
    if model is None or model.bytes_per_weight is None or not holds_ranks(node, device):
        return None
    factor = 4 / model.bytes_per_weight if device == "cpu" else 1
    return int(model.num_bytes * factor / size)


def _try_ranks(
    order: Order, console: Console, nodes: Sequence[Node], *, device: Device, cluster: "RayCluster | None"
) -> tuple[Outcome | None, list[Finding]]:
    """The all-reduce, if there is anything to try, and what is to be said of it. cluster: None for a Ray of our own."""
    gang = choose_gang(nodes, device, order.tensor_parallel_size)
    outcome: Outcome | None = None
    if not any(holds_ranks(node, device) for node in nodes):
        where = "a GPU" if device == "cuda" else "the CPU"
        outcome = NotTried(reason=f"No node can hold a rank on {where}.", remedy="The other findings say why.")
    elif gang is not None and cluster is not None:
        outcome = _run_trial(gang, order, console)
    elif gang is not None and gang.device == "cuda" and (busy := busy_gpus(nodes[0])):
        outcome = NotTried(reason=f"In use by others: GPU {', '.join(map(str, busy))}.")
    elif gang is not None:
        from cluster.ray_runtime.session import connect

        try:
            with console.phase("Starting Ray"):
                own = connect(None, namespace=NAMESPACE, num_cpus=gang.tensor_parallel_size, log_to_driver=False)
        except ConfigError as e:
            return None, [problem("ray", *sentence_and_remedy(e, otherwise=RAY_REMEDY))]
        try:
            outcome = _run_trial(gang, order, console)
        finally:
            own.close()
    return outcome, judge_all_reduce(outcome)


def _run_trial(gang: Gang, order: Order, console: Console) -> Outcome:
    from cluster.doctor.all_reduce import try_all_reduce

    with console.phase(f"All-reduce of {counted(gang.tensor_parallel_size, 'rank')}"):
        return asyncio.run(try_all_reduce(gang, spread=gang.spread, timeout_s=order.timeout_s))
