"""The compiled kernels of ranks on CPUs: which ones each node has, and whether all have the same."""

from collections.abc import Iterator, Sequence

from cluster.doctor.facts import CpuKernels, Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device

CHECK = "cpu kernels"


def judge_cpu_kernels(nodes: Sequence[Node], *, device: Device) -> Iterator[Finding]:
    """nodes: those that can run ranks. On GPUs the kernels are not used."""
    if device != "cpu":
        return
    known = [(node.address, kernels) for node in nodes if (kernels := _kernels(node)) is not None]
    for address, kernels in known:
        yield _judge(kernels, address)
    names = {_name(kernels) for _, kernels in known}
    if len({(kernels.variant, kernels.build_id) for _, kernels in known}) > 1:
        differ = f": {' and '.join(sorted(names))}" if len(names) > 1 else " in their sources"
        yield warning(
            CHECK,
            f"The compiled kernels of the nodes differ{differ}. A stream that moves between such nodes may continue with other tokens.",
            "Install the same release on every node, on CPUs of one kind. Or set TRAMONTANE_CPU_ISA on all nodes to what all have.",
        )


def _judge(kernels: CpuKernels, at: str) -> Finding:
    if kernels.fault is not None:
        return problem(CHECK, kernels.fault.message, kernels.fault.remedy, node=at)
    if kernels.variant is None:
        return ok(CHECK, f"Ranks use torch's kernels, not the compiled ones. {kernels.reason}", node=at)
    return ok(CHECK, f"Ranks use the kernels compiled for {kernels.variant}.", node=at)


def _name(kernels: CpuKernels) -> str:
    return kernels.variant or "torch's"


def _kernels(node: Node) -> CpuKernels | None:
    return None if node.machine is None else node.machine.cpu_kernels
