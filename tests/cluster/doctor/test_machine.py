"""Reading a machine: this one, and files of /proc and /sys from other machines and containers."""

import pytest
import torch

from cluster.doctor.facts import CpuKernels, Fault
from cluster.doctor.machine import read_cpu_kernels, read_filesystem, read_network, read_versions
from cluster.doctor.snapshot import parse_snapshot, take_snapshot
from workers.native.library import load_library


@pytest.fixture
def write(tmp_path):
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def test_a_snapshot_of_this_machine(tmp_path):
    snapshot = parse_snapshot(take_snapshot({str(tmp_path / "not" / "yet"): "testing"}, None))
    machine = snapshot.machine
    assert snapshot.model is None
    assert machine.num_cpus >= 1
    assert machine.memory_bytes > machine.free_memory_bytes > 0
    assert machine.network.interfaces["lo"] == "127.0.0.1" and machine.network.stack is not None
    (disk,) = machine.disks
    assert disk.path.endswith("/not/yet") and disk.total_bytes >= disk.free_bytes > 0


def test_a_snapshot_from_another_version_is_read():
    machine = parse_snapshot(b'{"machine": {"num_cpus": 3, "num_tpus": 4, "versions": {"tramontane": "9.9"}}}').machine
    assert (machine.num_cpus, machine.versions.tramontane, machine.shm) == (3, "9.9", None)


def test_the_faults_of_a_model_from_version_0_1_0_are_read():
    model = parse_snapshot(
        b'{"machine": {}, "model": {"folder": "/m", "faults": [{"sentence": "It is truncated.", "remedy": "Copy it."}]}}'
    ).model
    assert model is not None and model.faults == (Fault(message="It is truncated.", remedy="Copy it."),)


def test_versions_are_those_that_would_be_imported():
    versions = read_versions()
    # The index's CUDA build says which CUDA it has in torch.__version__ only.
    assert versions.torch is not None and versions.torch.split("+")[0] == torch.__version__.split("+")[0]
    assert versions.cuda == torch.version.cuda
    assert versions.tramontane and versions.ray and versions.python.startswith("3.")


@pytest.fixture
def _load_again():
    """The kernels are loaded once per process."""
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.mark.usefixtures("_load_again")
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("none", CpuKernels(reason="TRAMONTANE_CPU_ISA=none turns them off.")),
        (
            "sse",
            CpuKernels(fault=Fault(message="TRAMONTANE_CPU_ISA=sse names no instruction set.", remedy="Use one of")),
        ),
    ],
)
def test_the_compiled_kernels(limit, expected, monkeypatch):
    monkeypatch.setenv("TRAMONTANE_CPU_ISA", limit)
    found = read_cpu_kernels()
    assert (found.reason, found.variant) == (expected.reason, None)
    if expected.fault:
        assert found.fault.message == expected.fault.message and found.fault.remedy.startswith(expected.fault.remedy)


def test_a_folder_that_does_not_exist_yet(tmp_path):
    assert read_filesystem(tmp_path / "a" / "b", "x").total_bytes == read_filesystem(tmp_path, "x").total_bytes


def test_the_network(tmp_path, write, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    network = read_network(tmp_path)
    assert (network.gloo_interface, network.ephemeral_ports, network.stack) == ("eth7", None, None)
    write("proc/sys/net/ipv4/ip_local_port_range", "1024\t60999\n")
    write("proc/sys/kernel/random/boot_id", "some-boot\n")
    (tmp_path / "proc" / "self" / "ns").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "ns" / "net").symlink_to("net:[42]")
    network = read_network(tmp_path)
    assert (network.ephemeral_ports, network.stack) == ((1024, 60999), "some-boot net:[42]")
