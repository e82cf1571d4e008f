"""How `serve` and `batch run` connect to Ray, what they say about it first, and the spec they give the controller."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from cluster.cli.launch.device import Choice, RequestedDevice, in_ray_cluster
from cluster.cli.launch.memory import check_memory
from cluster.config.dtype import Cpus, NodeCpu
from cluster.config.engine import Device
from cluster.config.serve import ServeConfig
from cluster.protocol.names import server_of
from cluster.protocol.spec import ClusterSpec
from cluster.terminal.phases import Console
from workers.config import describe_dtype, requested_num_threads
from workers.device.fit import need_of
from workers.device.memory import read_memory
from workers.native.bfloat16 import bfloat16_support

if TYPE_CHECKING:
    from cluster.ray_runtime.session import RayCluster

OWN_CLUSTER_PLACEMENT_TIMEOUT_S = 10.0  # no nodes join it: what does not fit now never will
NODE_TIMEOUT_S = 30.0  # a node has to start a process to say what its CPU has


def _headline(config: ServeConfig) -> str:
    engine = config.engine
    ranks = f"{engine.tensor_parallel_size} tensor-parallel rank{'s' * (engine.tensor_parallel_size > 1)}"
    low, high = config.min_replicas, config.max_replicas
    replicas = "" if (low, high) == (1, 1) else f"{high if low == high else f'{low} to {high}'} replicas of "
    return (
        f"Tramontane {version('tramontane')}: {config.model_name}, {describe_dtype(engine.dtype, engine.weight_form)}, "
        f"{replicas}{ranks} on {engine.device}"
    )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A deployment before Ray answers. `config`, `device`: as `before_ray` chose. `configure`: makes the configuration for a device."""

    config: ServeConfig
    device: Choice
    requested: RequestedDevice
    configure: Callable[[Device, Cpus], ServeConfig]


@contextmanager
def open_ray(
    console: Console,
    config: ServeConfig,
    device: Choice,
    *,
    requested: RequestedDevice,
    configure: Callable[[Device, Cpus], ServeConfig],
) -> Iterator[tuple["RayCluster", ServeConfig]]:
    """`open_ray_for` one deployment."""
    planned = Planned(config=config, device=device, requested=requested, configure=configure)
    with open_ray_for(console, [planned]) as (cluster, configs):
        yield cluster, configs[0]


@contextmanager
def open_ray_for(
    console: Console, planned: Sequence[Planned]
) -> Iterator[tuple["RayCluster", tuple[ServeConfig, ...]]]:
    """Connects to Ray, decides where the ranks compute, and says it. Yields the cluster and the configurations for these devices.

    In a cluster that is joined, its nodes decide, and the configurations are made again.
    """
    configs = tuple(p.config for p in planned)
    address, namespace = configs[0].ray_address, server_of(configs[0].deployment)
    if address is None:
        for plan in planned:
            _announce(console, plan.config, plan.device)
        _check_memory(console, configs)
    with console.phase(f"Joining Ray at {address}" if address else "Starting Ray"):
        from cluster.ray_runtime.session import connect

        num_ranks = sum(config.engine.tensor_parallel_size * config.max_replicas for config in configs)
        cluster = connect(address, namespace=namespace, num_cpus=num_ranks)
    try:
        if address is not None:
            decided = []
            for plan in planned:
                device = in_ray_cluster(plan.requested, num_gpus=cluster.num_gpus())
                decided.append(plan.configure(device.device, lambda: _node_cpus(cluster)))
                _announce(console, decided[-1], device)
            configs = tuple(decided)
        yield cluster, configs
    finally:
        cluster.close()


def _node_cpus(cluster: "RayCluster") -> list[NodeCpu]:
    """The CPUs of the nodes that have joined and may run ranks."""
    found = cluster.run_on_cpu_nodes(bfloat16_support, timeout_s=NODE_TIMEOUT_S)
    return [NodeCpu(where=f"node {address}", bfloat16=support) for address, support in found]


def _announce(console: Console, config: ServeConfig, device: Choice) -> None:
    console.line(_headline(config))
    for note in (device.note, config.dtype_reason):
        if note is not None:
            console.line(f"  {note}")


def _check_memory(console: Console, configs: Sequence[ServeConfig]) -> None:
    """All replicas are on this machine. Raises ConfigError."""
    memory = read_memory()
    for config in configs:
        left = memory
        if left is not None:
            others = sum(_started_bytes(other) for other in configs if other is not config)
            left = replace(left, available_bytes=max(0, left.available_bytes - others))
        num_started = max(1, config.min_replicas)
        warning = check_memory(config.engine, num_started=num_started, num_replicas=config.max_replicas, memory=left)
        if warning is not None:
            console.line(f"  {warning if len(configs) == 1 else f'{config.model_name}: {warning}'}")


def _started_bytes(config: ServeConfig) -> int:
    """Of this machine's memory, what its first replicas hold before the first request."""
    if config.engine.device != "cpu":
        return 0
    return max(1, config.min_replicas) * config.engine.tensor_parallel_size * need_of(config.engine).loaded_bytes


def spec_of(config: ServeConfig, *, own_cluster: bool, num_ranks: int | None = None) -> ClusterSpec:
    """The deployment that the controller should run. num_ranks: the most that share this machine; None: those of this deployment."""
    engine = config.engine
    patience_s = None if math.isinf(config.placement_timeout_s) else config.placement_timeout_s
    if own_cluster and engine.device == "cpu" and engine.num_threads is None:
        # All replicas share this machine. Without a limit, each would use all of its cores.
        num_ranks = num_ranks or engine.tensor_parallel_size * config.max_replicas
        num_threads = requested_num_threads(os.environ) or max(1, (os.cpu_count() or 1) // num_ranks)
        engine = replace(engine, num_threads=num_threads)
    return ClusterSpec(
        model_name=config.model_name,
        engine=engine,
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        num_gateways=config.num_gateways,
        drain_timeout_s=config.drain_timeout_s,
        scale_down_after_s=config.scale_down_after_s,
        ttft_objective_s=config.ttft_objective_s,
        placement_timeout_s=OWN_CLUSTER_PLACEMENT_TIMEOUT_S if own_cluster else patience_s,
        single_host=own_cluster,
        preemption_notices=config.preemption_notices,
        log_level=config.log_level.upper(),
        data_dir=config.data_dir,
        tracing=config.tracing,
    )
