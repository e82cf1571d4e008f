"""The examination: reads the facts of this machine or of a cluster's nodes, tries an all-reduce, and judges everything.

Knows the order of the checks and what each one needs; the checks themselves are elsewhere. Imports Ray only when it is used.
"""

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from cluster.doctor.amounts import counted
from cluster.doctor.facts import AllReduceFailure, AllReduceResult, AllReduceSkipped, Link, Node
from cluster.doctor.findings import Finding, ok, problem
from cluster.doctor.judge.cpu_kernels import judge_cpu_kernels
from cluster.doctor.judge.gpus import busy_gpus, judge_gpus, judge_unchecked
from cluster.doctor.judge.models import judge_models
from cluster.doctor.judge.network import judge_links, judge_network
from cluster.doctor.judge.ranks import (
    MIN_LOCAL_CPU_RANKS,
    Device,
    TrialGang,
    can_run_ranks,
    choose_device,
    choose_gang,
    judge_all_reduce,
    judge_placement,
)
from cluster.doctor.judge.resources import RAY_FILES, judge_disks, judge_memory, judge_shared_memory
from cluster.doctor.judge.versions import judge_versions
from cluster.doctor.local import judge_division, judge_port, locate_model
from cluster.doctor.snapshot import parse_snapshot, take_snapshot
from cluster.ray_runtime.surroundings import ray_parent
from cluster.system.data_dir import default_data_dir
from cluster.terminal.phases import Console
from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.doctor.ray_probe import RayNode
    from cluster.ray_runtime.session import RayCluster

log = logging.getLogger(__name__)

NAMESPACE = "tramontane-doctor"
SNAPSHOT_TIMEOUT_S = 60.0  # the node has to start a process and wake its GPUs
LOCAL = "this machine"
RAY_REMEDY = "Run this again with --log-level debug, and read the logs in Ray's temporary folder."
Outcome = AllReduceResult | AllReduceFailure | AllReduceSkipped


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to examine. `tensor_parallel_size` None: as many ranks as there is room for."""

    model: str | None
    revision: str | None
    gguf_file: str | None
    ray_address: str | None
    tensor_parallel_size: int | None
    device: Literal["auto", "cpu", "cuda"]
    host: str
    port: int
    deployment: str
    run_all_reduce: bool
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Examination:
    findings: Sequence[Finding]
    nodes: Sequence[Node]
    all_reduce: Outcome | None


def examine(options: Options, console: Console) -> Examination:
    """What is wrong becomes a finding, never an exception. Every process it started has ended when it returns."""
    findings: list[Finding] = []
    folder, about_model = locate_model(options.model, options.revision, options.gguf_file)
    with _joined(options, console, findings) as cluster:
        if cluster is not None:
            nodes, links = asyncio.run(_read_nodes(options, folder, console, findings))
            findings += judge_placement(nodes, choose_device(options.device, nodes))
        else:
            with console.phase("Reading this machine"):
                nodes, links = [_this_machine(options, folder)], []
        device = choose_device(options.device, nodes)
        findings += about_model
        if folder is not None and options.tensor_parallel_size is not None:
            findings += judge_division(folder, options.tensor_parallel_size)
        findings += _judge_nodes(nodes, options=options, device=device)
        findings += judge_links(links, nodes)
        outcome = None
        if options.run_all_reduce and (cluster is not None or options.ray_address is None):
            outcome, about_ranks = _try_ranks(options, console, nodes, device=device, cluster=cluster)
            findings += about_ranks
    findings += [judge_unchecked(nodes, device=device), judge_port(options.host, options.port)]
    return Examination(findings=findings, nodes=nodes, all_reduce=outcome)


@contextmanager
def _joined(options: Options, console: Console, findings: list[Finding]) -> "Iterator[RayCluster | None]":
    """The Ray cluster at --ray-address. None without that option, and if the cluster cannot be joined, which becomes a finding."""
    if options.ray_address is None:
        yield None
        return
    from cluster.ray_runtime.session import connect

    with console.phase(f"Joining Ray at {options.ray_address}"):
        try:
            cluster = connect(options.ray_address, namespace=NAMESPACE, log_to_driver=False)
        except ConfigError as e:
            cluster = None
            findings.append(problem("ray", e.message, e.remedy or RAY_REMEDY))
    try:
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()


def _this_machine(options: Options, folder: Path | None) -> Node:
    disks = {
        ray_parent(os.environ)[0]: RAY_FILES,
        str(default_data_dir(options.deployment)): "files and batches",
    }
    snapshot = parse_snapshot(take_snapshot(disks, None if folder is None else str(folder)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ray_gpus = float(num_visible_gpus(visible)) if visible is not None and snapshot.machine.nvidia.gpus else None
    return Node(address=LOCAL, machine=snapshot.machine, model=snapshot.model, ray_gpus=ray_gpus)


def num_visible_gpus(devices: str) -> int:
    """How many GPUs a value of CUDA_VISIBLE_DEVICES leaves visible; "-1" hides all."""
    return sum(bool(device.strip()) and not device.strip().startswith("-") for device in devices.split(","))


async def _read_nodes(
    options: Options, folder: Path | None, console: Console, findings: list[Finding]
) -> tuple[list[Node], list[Link]]:
    from cluster.doctor.ray_probe import Probes, living_nodes

    ray_nodes = living_nodes()
    findings.append(ok("ray", _describe_cluster(options, ray_nodes)))
    probes = Probes(ray_nodes, timeout_s=SNAPSHOT_TIMEOUT_S)
    try:
        with console.phase(f"Reading {counted(len(ray_nodes), 'node')}"):
            temp_dirs = await probes.temp_dirs()
            disks = [{} if answer.value is None else {answer.value: RAY_FILES} for answer in temp_dirs]
            answers = await probes.run(take_snapshot, [(d, None if folder is None else str(folder)) for d in disks])
        nodes = []
        for ray_node, answer in zip(ray_nodes, answers, strict=True):
            node = Node(address=ray_node.address, ray_cpus=ray_node.num_cpus, ray_gpus=ray_node.num_gpus)
            if answer.value is None:
                nodes.append(msgspec.structs.replace(node, failure=answer.failure))
            else:
                snapshot = parse_snapshot(answer.value)
                nodes.append(msgspec.structs.replace(node, machine=snapshot.machine, model=snapshot.model))
        with console.phase("Connecting every pair of nodes"):
            links = await probes.links()
    finally:
        probes.close()
    return nodes, links


def _describe_cluster(options: Options, nodes: "Sequence[RayNode]") -> str:
    cpus, gpus = sum(n.num_cpus for n in nodes), sum(n.num_gpus for n in nodes)
    return f"The Ray cluster at {options.ray_address} has {counted(len(nodes), 'node')} with {cpus:g} CPUs and {gpus:g} GPUs."


def _judge_nodes(nodes: Sequence[Node], *, options: Options, device: Device) -> Iterator[Finding]:
    """Every finding that follows from the facts alone."""
    for node in nodes:
        if node.machine is None:
            message = f"The doctor could not run on this node: {(node.failure or 'no answer').rstrip('.')}."
            remedy = (
                "Check with `ray status` that the node is up. Install the same release of Tramontane there, in the Python "
                "environment that `ray start` runs in."
            )
            yield problem("node", message, remedy, node=node.address)
    yield from judge_versions(nodes, device=device)
    # A head node without ranks does not need the weights. A single machine is checked for them whatever else is wrong.
    yield from judge_models([node for node in nodes if node.address == LOCAL or can_run_ranks(node, device)])
    yield from judge_cpu_kernels([node for node in nodes if can_run_ranks(node, device)], device=device)
    yield from judge_network(nodes, device=device)
    size = options.tensor_parallel_size or 1  # the default of `serve`
    # As --dtype auto decides, for all ranks together: see cluster/config/dtype.py.
    running = [node for node in nodes if can_run_ranks(node, device)]
    has_bfloat16 = all(node.machine is not None and node.machine.has_bfloat16 for node in running)
    for node in nodes:
        if node.machine is None:
            continue
        rank_bytes = _rank_bytes(node, size=size, device=device, has_bfloat16=has_bfloat16)
        num_ranks = _max_ranks(node, size=size, device=device)
        num_sharing = _max_ranks(node, size=options.tensor_parallel_size or MIN_LOCAL_CPU_RANKS, device=device)
        yield from judge_gpus(node, device=device, rank_bytes=rank_bytes if device == "cuda" else None)
        yield judge_memory(node, device=device, num_ranks=num_ranks, rank_bytes=rank_bytes)
        yield judge_shared_memory(node, device=device, num_ranks=num_sharing)
        yield from judge_disks(node)


def _max_ranks(node: Node, *, size: int, device: Device) -> int:
    """How many ranks of one replica Ray can put on the node. All of them on a machine without Ray."""
    if not can_run_ranks(node, device):
        return 0
    room = node.ray_gpus if device == "cuda" else node.ray_cpus
    return size if room is None else min(size, int(room))


def _rank_bytes(node: Node, *, size: int, device: Device, has_bfloat16: bool) -> int | None:
    """Bytes of one rank's weights: as stored on a GPU and for bfloat16 on CPUs that have it, otherwise in float32.

    None if no rank can run on the node or the model there cannot be read.
    """
    model = node.model
    if model is None or model.bytes_per_weight is None or not can_run_ranks(node, device):
        return None
    as_stored = device == "cuda" or (has_bfloat16 and model.dtype == "bfloat16")
    if device == "cpu" and model.kept_bytes:
        return model.kept_bytes[model.dtype if as_stored and model.dtype in model.kept_bytes else "float32"] // size
    factor = 1 if as_stored else 4 / model.bytes_per_weight
    return int(model.num_bytes * factor / size)


def _try_ranks(
    options: Options, console: Console, nodes: Sequence[Node], *, device: Device, cluster: "RayCluster | None"
) -> tuple[Outcome | None, list[Finding]]:
    """The all-reduce, if there are ranks to start, and the findings about it. cluster None: start a Ray on this machine."""
    gang = choose_gang(nodes, device, options.tensor_parallel_size)
    outcome: Outcome | None = None
    if not any(can_run_ranks(node, device) for node in nodes):
        where = "a GPU" if device == "cuda" else "the CPU"
        outcome = AllReduceSkipped(reason=f"No node can run a rank on {where}.", remedy="See the other findings.")
    elif gang is not None and cluster is not None:
        outcome = _run_trial(gang, options, console)
    elif gang is not None and gang.device == "cuda" and (busy := busy_gpus(nodes[0])):
        outcome = AllReduceSkipped(reason=f"Other processes use GPU {', '.join(map(str, busy))}.")
    elif gang is not None:
        from cluster.ray_runtime.session import connect

        try:
            with console.phase("Starting Ray"):
                own = connect(None, namespace=NAMESPACE, num_cpus=gang.tensor_parallel_size, log_to_driver=False)
        except ConfigError as e:
            return None, [problem("ray", e.message, e.remedy or RAY_REMEDY)]
        try:
            outcome = _run_trial(gang, options, console)
        finally:
            own.close()
    return outcome, judge_all_reduce(outcome)


def _run_trial(gang: TrialGang, options: Options, console: Console) -> Outcome:
    from cluster.doctor.all_reduce import try_all_reduce

    with console.phase(f"All-reduce of {counted(gang.tensor_parallel_size, 'rank')}"):
        return asyncio.run(try_all_reduce(gang, spread=gang.spread, timeout_s=options.timeout_s))
