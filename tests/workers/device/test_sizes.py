"""The default sizes of each GPU, and what options and unlike GPUs change about them."""

from dataclasses import replace

import pytest

from cluster.plan.models import V0_3
from workers.config import EngineConfig
from workers.device.probe import CudaDevice
from workers.device.sizes import CPU, DEVICE_SIZES, GIB, SMALLEST_GPU, Sizes, decide, sized_for, sizes_of_gpu

CONFIG = EngineConfig(model_path="", model=V0_3, device="cuda", dtype="bfloat16")
# GPU, GiB as the driver reports them, compute capability -> sequences, tokens a step, of these for batches.
TABLE = [
    ("A10G", 21.98, (8, 6), (256, 2048, 64)),
    ("L4", 21.95, (8, 9), (256, 2048, 64)),
    ("L40S", 44.39, (8, 9), (256, 4096, 128)),
    ("A100", 39.39, (8, 0), (256, 4096, 128)),
    ("A100-80GB", 79.14, (8, 0), (256, 4096, 128)),
    ("H100", 79.1, (9, 0), (256, 8192, 256)),
    ("H200", 139.8, (9, 0), (256, 8192, 256)),
    ("B200", 178.0, (10, 0), (256, 8192, 256)),
    ("a slice of an H100", 9.5, (9, 0), (256, 2048, 64)),
]


@pytest.mark.parametrize(("name", "gib", "capability", "expected"), TABLE)
def test_the_sizes_of_a_gpu(name: str, gib: float, capability: tuple[int, int], expected: tuple[int, int, int]) -> None:
    found = sizes_of_gpu(memory_bytes=int(gib * GIB), compute_capability=capability)
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.max_background_tokens) == expected


@pytest.mark.parametrize(
    ("seqs", "tokens", "expected"),
    [
        (None, None, (256, 2048, 64)),
        (8, None, (8, 2048, 64)),
        (4000, None, (4000, 4000, 64)),  # a step has a token for every sequence
        (None, 32, (32, 32, 32)),
        (None, 16_384, (256, 16_384, 64)),
        (16, 32, (16, 32, 32)),
        (64, 32, (64, 32, 32)),  # both were given: EngineConfig refuses them
    ],
)
def test_what_an_option_sets_wins(seqs: int | None, tokens: int | None, expected: tuple[int, int, int]) -> None:
    found = decide(SMALLEST_GPU, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert found == Sizes(
        max_num_seqs=expected[0], max_num_batched_tokens=expected[1], max_background_tokens=expected[2]
    )


def test_on_the_cpu_the_sizes_are_those_of_the_configuration() -> None:
    config = replace(CONFIG, device="cpu")
    assert decide(CPU) == CPU == Sizes(max_num_seqs=64, max_num_batched_tokens=1024, max_background_tokens=4)
    assert sized_for(config, None, min) is config
    assert config.background_tokens == CPU.max_background_tokens


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (256, 4096, 128)), ({"max_num_seqs": 12}, (12, 4096, 128)), ({"max_background_tokens": 7}, (256, 4096, 7))],
)
def test_a_replica_has_the_sizes_of_the_least_of_its_gpus(
    given: dict[str, int], expected: tuple[int, int, int]
) -> None:
    """This rank is on an H200, the other on an A100."""
    free = tuple(name for name in DEVICE_SIZES if name not in given)
    config = replace(CONFIG, **given, sized_by_device=free)
    h200 = CudaDevice(name="NVIDIA H200", memory_bytes=int(139.8 * GIB), compute_capability=(9, 0))
    of_the_other = iter((256, 4096, 128))
    found = sized_for(config, h200, lambda own: min(own, next(of_the_other)))
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.background_tokens) == expected
