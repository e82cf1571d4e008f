"""Findings about several nodes together: versions, network, models, ranks. Tables of facts."""

import pytest
from msgspec.structs import replace
from support.servers.doctor_nodes import CUDA_VERSIONS, MODEL, VERSIONS, cpu_node, gpu_node, network_of

from cluster.doctor.facts import (
    AllReduceFailure,
    AllReduceResult,
    AllReduceSkipped,
    CpuKernels,
    Fault,
    Link,
    Node,
    PendingRank,
    RunningReplica,
)
from cluster.doctor.judge.cpu_kernels import judge_cpu_kernels
from cluster.doctor.judge.models import judge_models
from cluster.doctor.judge.network import judge_links, judge_network
from cluster.doctor.judge.ranks import TrialGang, choose_device, choose_gang, judge_all_reduce, judge_placement
from cluster.doctor.judge.versions import judge_versions

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"
UNREACHABLE = Node(address=C, failure="it did not answer within 60 s", ray_cpus=4.0, ray_gpus=0.0)


def summarized(findings) -> list[tuple[str, str | None, str]]:
    findings = list(findings)
    for finding in findings:
        assert bool(finding.remedy) is (finding.severity != "ok"), finding
    return [(f.severity.value, f.node, f.message) for f in findings]


@pytest.mark.parametrize(
    ("nodes", "device", "expected"),
    [
        pytest.param([cpu_node(A)], "cpu", [("ok", "torch 2.13.0+cpu.")], id="one node"),
        pytest.param(
            [gpu_node(A), gpu_node(B), UNREACHABLE], "cuda", [("ok", "NCCL 2.29.1), on all nodes.")], id="all equal"
        ),
        pytest.param(
            [cpu_node(A), cpu_node(B, versions=replace(VERSIONS, tramontane="0.2.0"))],
            "cpu",
            [("problem", f"Tramontane differs: 0.1.0 on {A}; 0.2.0 on {B}.")],
            id="ours",
        ),
        pytest.param(
            [cpu_node(A, versions=replace(VERSIONS, python="3.12.1")), cpu_node(B), cpu_node(C)],
            "cpu",
            [("problem", f"Python differs: 3.11.7 on {B}, {C}; 3.12.1 on {A}.")],
            id="Python",
        ),
        pytest.param(
            [cpu_node(A), gpu_node(B)],
            "cuda",
            [("ok", "2.13.0+cu130")],
            id="a head node without GPUs has torch for CPUs",
        ),
        pytest.param(
            [gpu_node(A), gpu_node(B, versions=replace(CUDA_VERSIONS, nccl="2.27.0"))],
            "cuda",
            [("problem", f"NCCL differs: 2.27.0 on {B}; 2.29.1 on {A}.")],
            id="NCCL",
        ),
        pytest.param(
            [gpu_node(A), gpu_node(B, driver="590.1")], "cuda", [("warning", "The NVIDIA driver differs")], id="driver"
        ),
        pytest.param([UNREACHABLE], "cpu", [], id="no node answers"),
    ],
)
def test_versions(nodes, device, expected):
    found = summarized(judge_versions(nodes, device=device))
    assert [severity for severity, _, _ in found] == [severity for severity, _ in expected]
    for (_, _, message), (_, part) in zip(found, expected, strict=True):
        assert part in message


def several(node):
    """The node together with a healthy one on another machine."""
    return [cpu_node("10.0.0.9"), node]


@pytest.mark.parametrize(
    ("nodes", "device", "severity", "said"),
    [
        pytest.param([cpu_node(A)], "cpu", "ok", "on one host", id="alone"),
        pytest.param(several(cpu_node(A)), "cpu", "ok", "through eth0 (10.0.0.1).", id="two hosts"),
        pytest.param(
            several(network_of(cpu_node(A), hostname_address="127.0.1.1")), "cpu", "ok", "127.0.1.1, which ranks do not use", id="Debian"
        ),
        pytest.param(several(replace(cpu_node(A), address="127.0.0.1")), "cpu", "problem", "which other nodes cannot reach", id="loopback"),
        pytest.param(
            [replace(network_of(cpu_node(A), stack="same"), address="127.0.0.1")] * 2, "cpu", "ok", "one host", id="one machine"
        ),
        pytest.param(several(replace(cpu_node(A), address="203.0.113.5")), "cpu", "problem", "none of its interfaces has", id="NAT"),
        pytest.param([network_of(cpu_node(A), gloo_interface="eth7")], "cpu", "problem", "eth7, which does not exist", id="no such"),
        pytest.param(several(network_of(cpu_node(A), gloo_interface="lo")), "cpu", "problem", "GLOO_SOCKET_IFNAME names lo", id="lo"),
        pytest.param(
            several(network_of(cpu_node(A), gloo_interface="ib0", interfaces={"eth0": A, "ib0": "10.9.0.1"})),
            "cpu",
            "warning",
            "names ib0",
            id="Gloo elsewhere",
        ),
        pytest.param(
            several(network_of(gpu_node(A), interfaces={"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": A, "virbr0": "192.168.122.1"})),
            "cuda",
            "warning",
            "NCCL may use virbr0 in addition to eth0",
            id="NCCL sees more",
        ),
        pytest.param(
            several(network_of(gpu_node(A), interfaces={"eth0": A, "virbr0": "192.168.122.1"}, nccl_interface="^virbr,docker")),
            "cuda",
            "ok",
            "eth0",
            id="NCCL_SOCKET_IFNAME is set",
        ),
        pytest.param(
            several(network_of(gpu_node(A), interfaces={"eth0": A, "eth01": "192.168.122.1"}, nccl_interface="=eth0")),
            "cuda",
            "ok",
            "eth0",
            id="NCCL_SOCKET_IFNAME is exact",
        ),
        pytest.param(
            several(network_of(gpu_node(A), interfaces={"eth0": A, "ib0": "10.9.0.1"}, nccl_interface="ib")),
            "cuda",
            "warning",
            "ib0",
            id="NCCL_SOCKET_IFNAME excludes the right one",
        ),
    ],
)  # fmt: skip
def test_interfaces(nodes, device, severity, said):
    found = summarized(judge_network(nodes, device=device))
    assert len(found) == len(nodes)
    assert found[-1][0] == severity and said in found[-1][2], found


def test_a_node_that_does_not_answer_counts_as_another_host():
    ((severity, _, message),) = summarized(judge_network([cpu_node(A), UNREACHABLE], device="cpu"))
    assert severity == "ok" and "other hosts through eth0" in message


def test_a_loopback_address_comes_with_the_addresses_to_use():
    (_, finding) = judge_network(several(replace(cpu_node(A), address="127.0.0.1")), device="cpu")
    assert "--node-ip-address" in finding.remedy and f"{A} (eth0)" in finding.remedy


def test_links():
    nodes = [cpu_node(A), cpu_node(B)]
    good, bad = Link(source=A, target=B), Link(source=B, target=A, failure="no answer within 5 s")
    assert summarized(judge_links([], [cpu_node(A)])) == []
    ((severity, _, _),) = summarized(judge_links([good, replace(good, source=B, target=A)], nodes))
    assert severity == "ok"
    (finding,) = judge_links([good, bad], nodes)
    assert (finding.severity, finding.node) == ("problem", B)
    assert finding.message == f"{B} cannot reach {A} on a port the kernel chose: no answer within 5 s."
    assert "TCP 32768 to 60999" in finding.remedy
    many = summarized(judge_links([replace(bad, source=f"10.0.1.{i}") for i in range(9)], nodes))
    assert len(many) == 5 and "5 more pairs" in many[-1][2]


def with_model(address, **changes):
    return replace(cpu_node(address), model=replace(MODEL, **changes))


def test_models():
    assert summarized(judge_models([cpu_node(A)])) == []
    (fine,) = summarized(judge_models([with_model(A), with_model(B), cpu_node(C)]))
    assert fine[0] == "ok" and "the same on 2 nodes" in fine[2]
    ((severity, _, message),) = summarized(judge_models([with_model(A), with_model(B, fingerprint="other")]))
    assert severity == "problem" and f"not the same on {A} and {B}" in message
    fault = Fault(message="model-00002-of-00003.safetensors is truncated.", remedy="Download it again.")
    broken, whole = summarized(judge_models([with_model(A), with_model(B, faults=(fault,))]))
    assert broken == ("problem", B, fault.message) and whole[0] == "ok"


def cpu_gang(size: int, *, spread: bool = False) -> TrialGang:
    return TrialGang(device="cpu", tensor_parallel_size=size, spread=spread)


def cuda_gang(size: int) -> TrialGang:
    return TrialGang(device="cuda", tensor_parallel_size=size)


@pytest.mark.parametrize(
    ("nodes", "device", "size", "expected"),
    [
        pytest.param([cpu_node(A)], "auto", None, cpu_gang(2), id="one CPU node"),
        pytest.param([replace(cpu_node(A), ray_cpus=1.0)], "auto", None, None, id="one CPU"),
        pytest.param([replace(cpu_node(A), ray_cpus=None)], "cpu", 1, None, id="one rank requested"),
        pytest.param([cpu_node(A), cpu_node(B)], "auto", None, cpu_gang(2, spread=True), id="two"),
        pytest.param([cpu_node(A), replace(cpu_node(B), ray_cpus=0.0)], "auto", None, cpu_gang(2), id="0"),
        pytest.param([cpu_node(A), cpu_node(B)], "auto", 4, cpu_gang(4), id="the size of a replica"),
        pytest.param([cpu_node(A), gpu_node(B), gpu_node(C)], "auto", None, cuda_gang(8), id="all GPUs"),
        pytest.param([gpu_node(A, num_gpus=1)], "auto", None, cuda_gang(1), id="one GPU"),
        pytest.param([gpu_node(A)], "cpu", None, cpu_gang(2), id="device cpu"),
        pytest.param([gpu_node(A, versions=VERSIONS)], "auto", None, cpu_gang(2), id="torch for CPUs"),
        pytest.param([replace(gpu_node(A), ray_gpus=2.0)], "auto", None, cuda_gang(2), id="Ray manages two"),
    ],
)  # fmt: skip
def test_which_ranks_are_tried(nodes, device, size, expected):
    assert choose_gang(nodes, choose_device(device, nodes), size) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "said"),
    [
        ([cpu_node(A), gpu_node(B)], "cuda", None),
        ([cpu_node(A), UNREACHABLE], "cuda", "No node has a GPU"),
        ([gpu_node(A, versions=VERSIONS)], "cuda", "No node has a GPU"),
        ([replace(cpu_node(A), ray_cpus=0.0), cpu_node(B)], "cpu", None),
        ([replace(cpu_node(A), ray_cpus=0.0)], "cpu", "No node has a CPU"),
    ],
)
def test_a_cluster_that_cannot_run_ranks(nodes, device, said):
    found = summarized(judge_placement(nodes, device))
    assert [(severity, message.startswith(said or "")) for severity, _, message in found] == (
        [] if said is None else [("problem", True)]
    )


MEASURED = AllReduceResult(ranks=(A, B), collectives="Gloo", interface="eth0", latency_s=0.0004, bus_bytes_per_s=1.2e9)


@pytest.mark.parametrize(
    ("outcome", "severity", "parts"),
    [
        (None, "ok", ["A single rank"]),
        (
            MEASURED,
            "ok",
            [f"2 ranks on {A}, {B} all-reduce with Gloo through eth0: 0.40 ms for 8 KB (median), 1.20 GB/s"],
        ),
        (replace(MEASURED, latency_s=0.005), "warning", ["5.00 ms"]),
        (replace(MEASURED, ranks=(A,), collectives="none"), "ok", [f"A rank on {A} works"]),
        (AllReduceSkipped(reason="Needed: 2 ranks with 1 CPU each."), "warning", ["Not tried: Needed"]),
        (
            AllReduceSkipped(
                reason="Needed: 2 ranks.",
                running=(
                    RunningReplica(deployment="t", replica_id="r0", ranks=(A, A), num_all_reduces=1200, mean_s=0.00021),
                    RunningReplica(deployment="t", replica_id="r1", ranks=(B,)),
                    RunningReplica(deployment="t", replica_id="r2", ranks=(A, B), num_all_reduces=5),
                ),
            ),
            "ok",
            [
                f"t r0, 2 ranks on {A}, 1,200 all-reduces of 0.21 ms",
                f"t r1, 1 rank on {B}",
                f"r2, 2 ranks on {A}, {B}, 5 all-reduces",
            ],
        ),
        (
            AllReduceFailure(
                ranks=(A, B),
                failure="Rank 1 could not reach rank 0's lifeline: timed out.",
                suspects=(0,),
                waiting=(PendingRank(rank=0, doing="is joining the group at 10.0.0.1:4242", waiting_for=(1,)),),
            ),
            "problem",
            [
                "Rank 1 could not reach rank 0's lifeline: timed out. ",
                f"Rank 0 ({A}) is joining the group at 10.0.0.1:4242 and waits for rank 1 ({B}).",
                f"Missing: rank 0 ({A}).",
            ],
        ),
        (AllReduceFailure(ranks=(A, A), failure="Cannot make 4 MiB of shared memory"), "problem", ["shared memory."]),
    ],
)
def test_all_reduce(outcome, severity, parts):
    ((said, _, message),) = summarized(judge_all_reduce(outcome))
    assert said == severity
    for part in parts:
        assert part in message


AVX512 = CpuKernels(variant="avx512", build_id="a")


@pytest.mark.parametrize(
    ("first", "second", "worst"),
    [
        pytest.param(AVX512, AVX512, "ok", id="equal"),
        pytest.param(AVX512, CpuKernels(variant="avx2", build_id="b"), "differ: avx2 and avx512.", id="instructions"),
        pytest.param(AVX512, replace(AVX512, build_id="b"), "differ in their sources.", id="sources"),
        pytest.param(AVX512, CpuKernels(reason="They are not built."), "differ: avx512 and torch's.", id="not built"),
        pytest.param(AVX512, None, "ok", id="a node of an older version"),
    ],
)
def test_cpu_kernels_that_differ_are_a_warning(first: CpuKernels, second: CpuKernels | None, worst: str) -> None:
    nodes = [cpu_node(A, cpu_kernels=first), cpu_node(B, cpu_kernels=second)]
    found = summarized(judge_cpu_kernels(nodes, device="cpu"))
    assert found[0] == ("ok", A, "Ranks use the kernels compiled for avx512.")
    assert [severity for severity, _, _ in found[1:]].count("warning") == (worst != "ok")
    assert worst == "ok" or worst in found[-1][2]
    assert summarized(judge_cpu_kernels(nodes, device="cuda")) == []


def test_why_there_are_no_compiled_kernels_is_said_and_a_wrong_setting_is_a_problem() -> None:
    fault = Fault(message="TRAMONTANE_CPU_ISA=sse names no instruction set.", remedy="Unset it.")
    nodes = [
        cpu_node(A, cpu_kernels=CpuKernels(reason="They are not built.")),
        cpu_node(B, cpu_kernels=CpuKernels(fault=fault)),
    ]
    found = summarized(judge_cpu_kernels(nodes, device="cpu"))
    assert found == [
        ("ok", A, "Ranks use torch's kernels, not the compiled ones. They are not built."),
        ("problem", B, fault.message),
    ]
