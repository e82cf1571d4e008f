"""The facts of healthy nodes, and helpers that change one thing about them."""

from typing import Any

from msgspec.structs import replace

from cluster.doctor.facts import Filesystem, Gpu, Machine, Model, Network, Node, Nvidia, Versions

GIB = 2**30
VERSIONS = Versions(tramontane="0.1.0", python="3.11.7", torch="2.13.0+cpu", ray="2.60.0")
CUDA_VERSIONS = replace(VERSIONS, torch="2.13.0+cu130", cuda="13.0", nccl="2.29.1")
NETWORK = Network(
    stack="boot net:[1]",
    interfaces={"lo": "127.0.0.1", "eth0": "10.0.0.1"},
    hostname="node1",
    hostname_address="10.0.0.1",
    ephemeral_ports=(32768, 60999),
)
MACHINE = Machine(
    num_cpus=8,
    memory_bytes=64 * GIB,
    free_memory_bytes=60 * GIB,
    versions=VERSIONS,
    shm=Filesystem(path="/dev/shm", purpose="the ranks of one host", total_bytes=32 * GIB, free_bytes=32 * GIB),
    disks=(Filesystem(path="/tmp", purpose="Ray's files", total_bytes=100 * GIB, free_bytes=50 * GIB),),
    network=NETWORK,
)


def a10g(index: int = 0, **changes: Any) -> Gpu:
    gpu = Gpu(
        index=index,
        name="NVIDIA A10G",
        uuid=f"GPU-{index}",
        total_bytes=23028 * 2**20,
        free_bytes=22731 * 2**20,
        compute_capability=(8, 6),
        compute_mode="Default",
    )
    return replace(gpu, **changes)


def cpu_node(address: str = "10.0.0.1", **changes: Any) -> Node:
    """changes: fields of Machine."""
    number = address.rpartition(".")[2]
    network = replace(NETWORK, stack=f"boot net:[{number}]", interfaces={"lo": "127.0.0.1", "eth0": address})
    return Node(
        address=address, machine=replace(MACHINE, **{"network": network, **changes}), ray_cpus=8.0, ray_gpus=0.0
    )


def gpu_node(address: str = "10.0.0.1", *, num_gpus: int = 4, driver: str = "580.65.06", **changes: Any) -> Node:
    """changes: fields of Machine."""
    nvidia = Nvidia(num_devices=num_gpus, driver=driver, gpus=tuple(a10g(i) for i in range(num_gpus)))
    node = cpu_node(address, **{"versions": CUDA_VERSIONS, "nvidia": nvidia, **changes})
    return replace(node, ray_gpus=float(num_gpus))


def network_of(node: Node, **changes: Any) -> Node:
    """The node with these fields of its Network changed."""
    assert node.machine is not None
    return replace(node, machine=replace(node.machine, network=replace(node.machine.network, **changes)))


MODEL = Model(folder="/models/m", num_files=3, num_bytes=14 * GIB, bytes_per_weight=2, fingerprint="abc")
