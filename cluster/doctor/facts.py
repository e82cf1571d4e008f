"""What is known of the machines before anybody judges it. Plain values, which travel between nodes as JSON; unknown is None.

Unknown fields are ignored and missing ones have defaults, so that nodes with another version of Tramontane are still understood.
"""

import msgspec


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process with a context on a GPU. `name`: what it calls itself, such as ray::RankActor."""

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
    """`num_devices`: /dev/nvidiaN, which are there with a loaded driver. `failure`: why nvidia-smi did not answer; None without it too."""

    num_devices: int = 0
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    failure: str | None = None


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """`cuda`: what torch was built with; None for a CPU build."""

    tramontane: str | None = None
    python: str | None = None
    torch: str | None = None
    ray: str | None = None
    cuda: str | None = None
    nccl: str | None = None


class Filesystem(msgspec.Struct, frozen=True, kw_only=True):
    """`purpose` follows "for" in a sentence."""

    path: str
    purpose: str
    total_bytes: int
    free_bytes: int


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """`stack` names the kernel and network namespace: equal on two nodes, they share one loopback. `interfaces`: IPv4 address by name.

    `hostname_address`: what the host's own name resolves to. `gloo_interface` and `nccl_interface`: those variables of the environment.
    """

    stack: str | None = None
    interfaces: dict[str, str] = {}
    hostname: str = ""
    hostname_address: str | None = None
    gloo_interface: str | None = None
    nccl_interface: str | None = None
    ephemeral_ports: tuple[int, int] | None = None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    num_cpus: int = 1
    memory_bytes: int | None = None  # of the machine, or of the container where that is less
    free_memory_bytes: int | None = None
    versions: Versions = Versions()
    nvidia: Nvidia = Nvidia()
    shm: Filesystem | None = None
    disks: tuple[Filesystem, ...] = ()
    network: Network = Network()


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    sentence: str
    remedy: str


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint folder as one node sees it. `fingerprint`: of names, sizes and headers, equal where the files are the same."""

    folder: str
    num_files: int = 0
    num_bytes: int = 0
    bytes_per_weight: int | None = None  # as stored; None where the configuration cannot be read
    fingerprint: str | None = None
    faults: tuple[Fault, ...] = ()


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as a node of a Ray cluster, or alone. `machine` is None where it could not be looked at, which `failure` explains.

    `ray_cpus`, `ray_gpus`: what Ray gives away there; None without Ray. `model`: None where no rank can be, or none was asked for.
    """

    address: str
    machine: Machine | None = None
    model: Model | None = None
    failure: str | None = None
    ray_cpus: float | None = None
    ray_gpus: float | None = None


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a process on `source` could talk to one on `target` over TCP, on a port the kernel chose. Both are node addresses."""

    source: str
    target: str
    failure: str | None = None


class Reduced(msgspec.Struct, frozen=True, kw_only=True):
    """All ranks took part in right all-reduces. `ranks`: each rank's node address. See workers.rank.probe for the figures."""

    ranks: tuple[str, ...]
    collectives: str
    interface: str | None
    latency_s: float
    bus_bytes_per_s: float


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A rank that had not ended when the others were given up. `doing` ends a sentence that begins with the rank."""

    rank: int
    doing: str
    waiting_for: tuple[int, ...] = ()


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks were started but did not all-reduce. `suspects`: those that the failure names as missing."""

    ranks: tuple[str, ...]
    failure: str
    suspects: tuple[int, ...] = ()
    waiting: tuple[Waiting, ...] = ()


class RunningReplica(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks that serve now. `mean_s`: of their all-reduces so far, None where that is not measured."""

    deployment: str
    replica_id: str
    ranks: tuple[str, ...]
    num_all_reduces: int = 0
    mean_s: float | None = None


class NotTried(msgspec.Struct, frozen=True, kw_only=True):
    """No ranks were started: there is no place for them, or it is somebody's. `running`: who says what the trial would have said."""

    reason: str
    remedy: str = "Run this again when they are free, or ask for fewer ranks with --tensor-parallel-size."
    running: tuple[RunningReplica, ...] = ()
