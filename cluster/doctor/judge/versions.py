"""Versions on all nodes: the ranks of a replica, and everything Ray pickles, need the same releases."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from cluster.doctor.facts import Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device, can_run_ranks

CHECK = "versions"
ON_ALL_NODES = ("tramontane", "python", "ray")
ON_NODES_WITH_RANKS = ("torch", "cuda", "nccl")  # a head node without GPUs may have torch for CPUs
DISPLAY_NAMES = {"cuda": "the CUDA of torch", "nccl": "NCCL", "python": "Python"}


def judge_versions(nodes: Sequence[Node], *, device: Device) -> Iterator[Finding]:
    examined = [node for node in nodes if node.machine is not None]
    with_ranks = [node for node in examined if can_run_ranks(node, device)]
    differing = [
        finding
        for names, among in ((ON_ALL_NODES, examined), (ON_NODES_WITH_RANKS, with_ranks))
        for name in names
        if (finding := _compare(name, among)) is not None
    ]
    if drivers := _differing(
        {n.address: n.machine.nvidia.driver for n in with_ranks if n.machine and n.machine.nvidia.gpus}
    ):
        remedy = "Use the same image on all nodes; NCCL is tested with one driver version on all of them."
        differing.append(warning(CHECK, f"The NVIDIA driver differs: {drivers}.", remedy))
    yield from differing
    if not differing and examined:
        everywhere = ", on all nodes" if len(examined) > 1 else ""
        yield ok(CHECK, f"{_all_versions(with_ranks[0] if with_ranks else examined[0])}{everywhere}.")


def _compare(name: str, nodes: Sequence[Node]) -> Finding | None:
    where = _differing({n.address: getattr(n.machine.versions, name) for n in nodes if n.machine is not None})
    if where is None:
        return None
    shown = DISPLAY_NAMES.get(name, name)
    remedy = (
        "Create the environments of all nodes with the same release of Python."
        if name == "python"
        else "Install the same releases on every node, for example with `pip install -c constraints.txt tramontane`."
    )
    return problem(CHECK, f"{shown[:1].upper()}{shown[1:]} differs: {where}.", remedy)


def _differing(values: dict[str, str | None]) -> str | None:
    """None if all values are equal, else which addresses have which value."""
    by_value: dict[str, list[str]] = defaultdict(list)
    for address, value in values.items():
        by_value[value or "none"].append(address)
    if len(by_value) < 2:
        return None
    return "; ".join(f"{value} on {', '.join(addresses)}" for value, addresses in sorted(by_value.items()))


def _all_versions(node: Node) -> str:
    assert node.machine is not None
    v = node.machine.versions
    cuda = f" (CUDA {v.cuda}, NCCL {v.nccl or 'unknown'})" if v.cuda else ""
    return f"Tramontane {v.tramontane}, Python {v.python}, Ray {v.ray}, torch {v.torch}{cuda}"
