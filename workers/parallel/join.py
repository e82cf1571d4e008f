"""Chooses and joins a rank's tensor-parallel group. Knows the implementations and when each applies."""

import logging
from typing import Literal

import torch

from workers.errors import ConfigError
from workers.parallel import shared_file
from workers.parallel.compiled import Exchange
from workers.parallel.distributed import DistributedGroup
from workers.parallel.group import SingleRank, TensorParallel, rank_device
from workers.parallel.shared_memory import SharedMemoryGroup

logger = logging.getLogger(__name__)


def join_group(
    *,
    rank: int,
    size: int,
    device: torch.device | str,
    replica_id: str,
    master_address: str,
    master_port: int,
    same_host: bool,
    timeout_s: float = 30.0,
    join_timeout_s: float = 120.0,
    backend: Literal["auto", "shm", "gloo", "nccl"] = "auto",
    deterministic: bool = False,
    exchange: Exchange | None = None,
) -> TensorParallel:
    """Returns when all `size` ranks have joined. `timeout_s` limits each collective, `join_timeout_s` the joining.

    `replica_id` must differ between incarnations of a replica. `master_address:master_port` is on rank 0's host; "shm" does not use it.
    `deterministic`: the ranks' sums have a fixed order on CUDA too, see `DistributedGroup`.
    exchange: compiled collectives for shared memory; None does without.
    "auto" is NCCL on CUDA; on the CPU shared memory where all ranks are on one host and it works there, else Gloo.
    Raises GroupError if a rank stays away, ConfigError if backend and device do not fit.
    """
    device = rank_device(device)
    if size == 1:
        return SingleRank(device)
    if backend == "auto":
        if device.type == "cuda":
            backend = "nccl"
        elif same_host and shared_file.available():
            backend = "shm"
        else:
            backend = "gloo"
            if same_host:
                logger.info("ranks of this host use Gloo, because shared memory needs /dev/shm and an x86-64 processor")
    if (backend == "nccl") != (device.type == "cuda"):
        raise ConfigError(
            f"The collectives {backend!r} do not work on {device.type}.",
            remedy="Use 'nccl' on cuda, 'shm' or 'gloo' on cpu.",
        )
    if backend == "shm":
        if not same_host:
            raise ConfigError("Shared-memory collectives need all ranks on one host.", remedy="Use 'gloo'.")
        return SharedMemoryGroup(
            replica_id,
            rank=rank,
            size=size,
            timeout_s=timeout_s,
            join_timeout_s=join_timeout_s,
            exchange=exchange,
        )
    return DistributedGroup(
        rank=rank,
        size=size,
        device=device,
        master_address=master_address,
        master_port=master_port,
        timeout_s=timeout_s,
        join_timeout_s=join_timeout_s,
        deterministic=deterministic,
    )
