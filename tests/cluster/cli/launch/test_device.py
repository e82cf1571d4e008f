"""Where ranks compute, by what was asked for and what is there. A GPU that is asked for is used, or the command ends."""

import pytest

from cluster.cli.launch import device
from cluster.cli.launch.device import Choice, before_ray, in_ray_cluster, on_this_machine
from workers.device.probe import CudaDevice, NoGpu
from workers.errors import ConfigError

A10G = CudaDevice(name="NVIDIA A10G", memory_bytes=23_603_000_000, compute_capability=(8, 6))
NO_GPU = NoGpu(message="This machine has no NVIDIA GPU.", remedy="Use a machine with one.", has_gpu=False)
CPU_BUILD = NoGpu(message="torch was built without CUDA.", remedy="Install another.", has_gpu=True)


@pytest.fixture
def finds(monkeypatch):
    return lambda found: monkeypatch.setattr(device, "probe", lambda: found)


@pytest.mark.parametrize("found", [NO_GPU, CPU_BUILD])
def test_cuda_without_a_usable_gpu_is_refused_with_the_reason(finds, found):
    finds(found)
    with pytest.raises(ConfigError) as refused:
        on_this_machine("cuda")
    assert (refused.value.message, refused.value.remedy, refused.value.param) == (
        found.message,
        found.remedy,
        "--device",
    )


@pytest.mark.parametrize(
    ("requested", "found", "choice"),
    [
        ("auto", (A10G,), Choice(device="cuda")),
        ("auto", NO_GPU, Choice(device="cpu")),
        ("auto", CPU_BUILD, Choice(device="cpu", note="The GPU is not used. torch was built without CUDA.")),
        ("cuda", (A10G,), Choice(device="cuda")),
        ("cpu", (A10G,), Choice(device="cpu")),
        ("cpu", CPU_BUILD, Choice(device="cpu")),
    ],
)
def test_on_this_machine(finds, requested, found, choice):
    finds(found)
    assert on_this_machine(requested) == choice
    assert before_ray(requested, ray_address=None, num_gpus=1) == choice


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_too_few_gpus_are_refused_before_ray_starts(finds, requested):
    finds((A10G, A10G))
    assert on_this_machine(requested, num_gpus=2).device == "cuda"
    with pytest.raises(ConfigError, match="--tensor-parallel-size 4 needs as many GPUs, and this machine has 2"):
        on_this_machine(requested, num_gpus=4)


@pytest.mark.parametrize(
    ("requested", "num_gpus", "expected"),
    [
        ("auto", 1, "cuda"),  # even for two ranks: another node may be about to join
        ("auto", 8, "cuda"),
        ("auto", 0, "cpu"),
        ("cuda", 0, "cuda"),  # the replica waits for GPUs
        ("cpu", 8, "cpu"),
    ],
)
def test_in_a_ray_cluster(requested, num_gpus, expected):
    choice = in_ray_cluster(requested, num_gpus=num_gpus)
    assert choice.device == expected
    assert (choice.note is not None) == (requested == "auto" and not num_gpus)


def test_a_cluster_that_is_joined_is_not_judged_by_this_machine(finds):
    finds(NO_GPU)
    assert before_ray("cuda", ray_address="h:6379", num_gpus=4) == Choice(device="cuda")
    assert before_ray("auto", ray_address="h:6379", num_gpus=4) == Choice(device="cpu")
