"""Versions over all nodes: ranks of one group and everything that Ray pickles must be of the same release."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from cluster.doctor.facts import Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device, holds_ranks

CHECK = "versions"
ON_ALL = ("tramontane", "python", "ray")
WHERE_RANKS_ARE = ("torch", "cuda", "nccl")  # a head without GPUs may well have torch for CPUs
WORDS = {"cuda": "the CUDA of torch", "nccl": "NCCL", "python": "Python"}


def judge_versions(nodes: Sequence[Node], *, device: Device) -> Iterator[Finding]:
    seen = [node for node in nodes if node.machine is not None]
    ranks = [node for node in seen if holds_ranks(node, device)]
    differing = [
        finding
        for names, among in ((ON_ALL, seen), (WHERE_RANKS_ARE, ranks))
        for name in names
        if (finding := _compare(name, among)) is not None
    ]
    if drivers := _differing(
        {n.address: n.machine.nvidia.driver for n in ranks if n.machine and n.machine.nvidia.gpus}
    ):
        remedy = "Bring the nodes to one image; NCCL is tested with one driver on all of them."
        differing.append(warning(CHECK, f"The NVIDIA driver differs: {drivers}.", remedy))
    yield from differing
    if not differing and seen:
        yield ok(CHECK, f"{_all(ranks[0] if ranks else seen[0])}{', on all nodes' if len(seen) > 1 else ''}.")


def _compare(name: str, nodes: Sequence[Node]) -> Finding | None:
    where = _differing({n.address: getattr(n.machine.versions, name) for n in nodes if n.machine is not None})
    if where is None:
        return None
    word = WORDS.get(name, name)
    remedy = (
        "Use one release of Python for the environments of all nodes."
        if name == "python"
        else "Install the same releases on every node, such as with `pip install -c constraints.txt tramontane` of one checkout."
    )
    return problem(CHECK, f"{word[:1].upper()}{word[1:]} differs: {where}.", remedy)


def _differing(values: dict[str, str | None]) -> str | None:
    """None where all are equal, else who has what."""
    by_value: dict[str, list[str]] = defaultdict(list)
    for address, value in values.items():
        by_value[value or "none"].append(address)
    if len(by_value) < 2:
        return None
    return "; ".join(f"{value} on {', '.join(addresses)}" for value, addresses in sorted(by_value.items()))


def _all(node: Node) -> str:
    assert node.machine is not None
    v = node.machine.versions
    cuda = f" (CUDA {v.cuda}, NCCL {v.nccl or 'unknown'})" if v.cuda else ""
    return f"Tramontane {v.tramontane}, Python {v.python}, Ray {v.ray}, torch {v.torch}{cuda}"
