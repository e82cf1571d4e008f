"""Where the ranks compute: on the CPU or on GPUs, decided before anything is configured for it.

A GPU that is asked for is used, or the command ends with the reason. Knows the option --device; asks workers/device about this machine.
The nodes of a Ray cluster are known by what Ray counts there, and each rank checks its own GPU.
"""

from dataclasses import dataclass
from typing import Literal

from cluster.config.engine import Device
from workers.device.probe import NoGpu, probe
from workers.errors import ConfigError

RequestedDevice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """note: a line for the person who started the command, where "auto" leaves GPUs unused or may come too early."""

    device: Device
    note: str | None = None


def before_ray(requested: RequestedDevice, *, ray_address: str | None, num_gpus: int) -> Choice:
    """What can be decided before Ray answers. In a cluster that is joined, "auto" is the CPU until `in_ray_cluster` decides.

    num_gpus: how many a replica needs. Raises ConfigError as `on_this_machine`.
    """
    if ray_address is None:
        return on_this_machine(requested, num_gpus=num_gpus)
    return Choice(device="cpu" if requested == "auto" else requested)


def on_this_machine(requested: RequestedDevice, *, num_gpus: int = 1) -> Choice:
    """num_gpus: how many a replica needs. Raises ConfigError if GPUs were asked for, or are there, and cannot be used or are too few."""
    if requested == "cpu":
        return Choice(device="cpu")
    found = probe()
    if isinstance(found, NoGpu):
        if requested == "cuda":
            raise ConfigError(found.message, remedy=found.remedy, param="--device")
        return Choice(device="cpu", note=f"The GPU is not used. {found.message}" if found.has_gpu else None)
    if len(found) < num_gpus:
        raise ConfigError(
            f"--tensor-parallel-size {num_gpus} needs as many GPUs, and this machine has {len(found)} for it.",
            remedy="Use fewer ranks, a machine with more GPUs, or --device cpu.",
            param="--tensor-parallel-size",
        )
    return Choice(device="cuda")


def in_ray_cluster(requested: RequestedDevice, *, num_gpus: float) -> Choice:
    """num_gpus: what Ray counts on the nodes that have joined.

    One GPU is enough for "auto": the others may be on nodes that are still to join, and the replica waits for them.
    """
    if requested != "auto":
        return Choice(device=requested)
    if num_gpus:
        return Choice(device="cuda")
    note = (
        "No node of the Ray cluster has a GPU, so the ranks compute on the CPU. With --device cuda they wait for GPUs."
    )
    return Choice(device="cpu", note=note)
