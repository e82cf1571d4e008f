"""What is known about the machines before anything is judged. Plain values that travel between nodes as JSON; unknown is None.

Unknown fields are ignored and missing ones have defaults, so the doctor understands nodes with another version of Tramontane.
"""

import msgspec


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that uses a GPU. `name` is its own title, such as ray::RankActor."""

    pid: int
    name: str


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    name: str
    uuid: str
    total_bytes: int | None
    free_bytes: int | None
    compute_capability: tuple[int, int] | None = None
    compute_mode: str | None = None
    is_mig: bool = False
    processes: tuple[GpuProcess, ...] = ()


class Nvidia(msgspec.Struct, frozen=True, kw_only=True):
    """The NVIDIA driver and its GPUs.

    num_devices: number of /dev/nvidiaN files, which a loaded driver creates. failure: why nvidia-smi failed; None if it answered
    or is not installed.
    """

    num_devices: int = 0
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    failure: str | None = None


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """`cuda`: the CUDA release torch was built with; None for a CPU build."""

    tramontane: str | None = None
    python: str | None = None
    torch: str | None = None
    ray: str | None = None
    cuda: str | None = None
    nccl: str | None = None


class Filesystem(msgspec.Struct, frozen=True, kw_only=True):
    """`purpose`: what the path is used for; it follows the word "for" in messages."""

    path: str
    purpose: str
    total_bytes: int
    free_bytes: int


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """A node's network, as its processes see it.

    stack: identifies the kernel and the network namespace; two nodes with the same value share one loopback interface.
    interfaces: IPv4 address by interface name. hostname_address: the address the host's own name resolves to.
    gloo_interface, nccl_interface: the values of GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
    """

    stack: str | None = None
    interfaces: dict[str, str] = {}
    hostname: str = ""
    hostname_address: str | None = None
    gloo_interface: str | None = None
    nccl_interface: str | None = None
    ephemeral_ports: tuple[int, int] | None = None


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something wrong with a checkpoint or a setting: what, and what to do."""

    message: str = msgspec.field(name="sentence")  # nodes of version 0.1.0 and scripts know it by this name
    remedy: str


class CpuKernels(msgspec.Struct, frozen=True, kw_only=True):
    """The compiled kernels that a rank would use: their instruction set and the id of their sources, or why there are none."""

    variant: str | None = None
    build_id: str | None = None
    reason: str | None = None
    fault: Fault | None = None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """missing_build_tools: what Triton, which compiles the GPU kernels, needs and does not find."""

    num_cpus: int = 1
    has_bfloat16: bool = False  # whether ranks on the CPU compute it: see workers/native/bfloat16.py
    memory_bytes: int | None = None  # of the machine, or of the container if that is less
    free_memory_bytes: int | None = None
    versions: Versions = Versions()
    nvidia: Nvidia = Nvidia()
    shm: Filesystem | None = None
    disks: tuple[Filesystem, ...] = ()
    network: Network = Network()
    missing_build_tools: tuple[str, ...] = ()
    cpu_kernels: CpuKernels | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint folder, or GGUF file, as one node sees it.

    kept_bytes: {dtype: what the weights take on a CPU that computes in it}, unless a weight takes just the bytes of the dtype.
    bytes_per_weight, dtype: as the configuration says; None if it cannot be read. fingerprint: of file names, sizes and headers; equal
    on two nodes if the files are the same.
    """

    folder: str
    num_files: int = 0
    num_bytes: int = 0
    bytes_per_weight: int | None = None
    kept_bytes: dict[str, int] = {}
    dtype: str | None = None
    fingerprint: str | None = None
    left_out: str | None = None
    faults: tuple[Fault, ...] = ()


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a Ray cluster, or this machine without Ray.

    machine: None if the node could not be examined; `failure` says why. model: None if no checkpoint was examined there.
    ray_cpus, ray_gpus: what Ray can allocate there; None without Ray.
    """

    address: str
    machine: Machine | None = None
    model: Model | None = None
    failure: str | None = None
    ray_cpus: float | None = None
    ray_gpus: float | None = None


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a process on `source` can talk to one on `target` over TCP, on a port the kernel chose. Both are node addresses."""

    source: str
    target: str
    failure: str | None = None


class AllReduceResult(msgspec.Struct, frozen=True, kw_only=True):
    """Every rank took part in all-reduces with correct results.

    ranks: the node address of each rank. See workers.rank.probe for how latency and bandwidth are measured.
    """

    ranks: tuple[str, ...]
    collectives: str
    interface: str | None
    latency_s: float
    bus_bytes_per_s: float


class PendingRank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank that had not finished when the trial ended. `doing` completes a sentence that starts with the rank."""

    rank: int
    doing: str
    waiting_for: tuple[int, ...] = ()


class AllReduceFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks were started, but their all-reduce failed. `suspects`: the ranks that the failure names as missing."""

    ranks: tuple[str, ...]
    failure: str
    suspects: tuple[int, ...] = ()
    waiting: tuple[PendingRank, ...] = ()


class RunningReplica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that is serving now. `mean_s`: the mean time of its all-reduces so far; None if it is not measured."""

    deployment: str
    replica_id: str
    ranks: tuple[str, ...]
    num_all_reduces: int = 0
    mean_s: float | None = None


class AllReduceSkipped(msgspec.Struct, frozen=True, kw_only=True):
    """No ranks were started: there is no room for them, or it is in use. `running`: what the running replicas measured."""

    reason: str
    remedy: str = "Run this again when they are free, or use fewer ranks with --tensor-parallel-size."
    running: tuple[RunningReplica, ...] = ()
