"""What a machine's CPU and memory are, read from files of /proc and /sys of other machines and containers."""

import pytest

from workers.device.cpu import CpuFacts, read_cpu
from workers.device.memory import Memory, gigabytes, read_memory

MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\n"
MACHINE = Memory(total_bytes=32_000_000 * 1024, available_bytes=20_000_000 * 1024)


@pytest.fixture
def write(tmp_path):
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16", "amx_bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "avx512_bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", None),
        ("flags\t\t: fpu avx2", None),
        ("Features\t: fp asimd sve bf16 i8mm", "bf16"),
        ("Features\t: fp asimd", None),
        ("model name\t: Some CPU with bf16", None),
    ],
)
def test_bfloat16_is_found_in_the_flags_of_a_core(tmp_path, write, line, flag):
    write("proc/cpuinfo", f"processor\t: 0\n{line}\n\n")
    cpu = read_cpu(tmp_path)
    assert (cpu.bfloat16_flag, cpu.has_bfloat16) == (flag, flag is not None)


def test_a_system_without_cpuinfo_has_no_bfloat16(tmp_path):
    cpu = read_cpu(tmp_path)
    assert cpu == CpuFacts(num_cores=cpu.num_cores) and cpu.num_cores >= 1


def test_this_machine():
    memory = read_memory()
    assert memory is not None and memory.total_bytes > memory.available_bytes > 0


def test_memory_of_a_machine_without_limits(tmp_path, write):
    assert read_memory(tmp_path) is None
    write("proc/meminfo", MEMINFO)
    assert read_memory(tmp_path) == MACHINE
    write("sys/fs/cgroup/memory.max", "max\n")
    assert read_memory(tmp_path) == MACHINE


def test_the_limit_of_a_container(tmp_path, write):
    """The page cache counts as free, because the kernel gives it back."""
    write("proc/meminfo", MEMINFO)
    write("sys/fs/cgroup/memory.max", "8000000000\n")
    write("sys/fs/cgroup/memory.current", "5000000000\n")
    write("sys/fs/cgroup/memory.stat", "anon 2000000000\ninactive_file 3000000000\n")
    assert read_memory(tmp_path) == Memory(total_bytes=8_000_000_000, available_bytes=6_000_000_000)


@pytest.mark.parametrize("group", ["/a.slice/b.scope", "/a.slice"])
def test_the_least_limit_of_the_groups_around_this_process_counts(tmp_path, write, group):
    write("proc/meminfo", MEMINFO)
    write("proc/self/cgroup", f"0::{group}\n")
    for path, limit in (("a.slice", 4_000_000_000), ("a.slice/b.scope", 9_000_000_000)):
        write(f"sys/fs/cgroup/{path}/memory.max", f"{limit}\n")
        write(f"sys/fs/cgroup/{path}/memory.current", "1000000000\n")
        write(f"sys/fs/cgroup/{path}/memory.stat", "inactive_file 0\n")
    assert read_memory(tmp_path) == Memory(total_bytes=4_000_000_000, available_bytes=3_000_000_000)


def test_the_first_version_of_control_groups(tmp_path, write):
    write("proc/meminfo", MEMINFO)
    write("proc/self/cgroup", "5:cpu:/\n4:memory:/pod/1\n0::/\n")
    write("sys/fs/cgroup/memory/pod/1/memory.limit_in_bytes", "6000000000\n")
    write("sys/fs/cgroup/memory/pod/1/memory.usage_in_bytes", "2500000000\n")
    write("sys/fs/cgroup/memory/pod/1/memory.stat", "inactive_file 7\ntotal_inactive_file 500000000\n")
    assert read_memory(tmp_path) == Memory(total_bytes=6_000_000_000, available_bytes=4_000_000_000)


def test_a_group_of_the_host_that_is_not_mounted_here(tmp_path, write):
    write("proc/meminfo", MEMINFO)
    write("proc/self/cgroup", "0::/../../docker/1\n")
    assert read_memory(tmp_path) == MACHINE


def test_amounts_are_written_in_decimal_gigabytes():
    assert (gigabytes(14_496_047_104), gigabytes(499_000_000)) == ("14.5 GB", "0.50 GB")
