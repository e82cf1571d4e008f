"""What one step of a 7B model asks of the device, held by a table: launches, copies, synchronizations. They may not grow.

step_counts.json has the numbers. Where one becomes smaller, write it there, so that it stays.
"""

import statistics
import time
from collections.abc import Iterator

import pytest
from cuda_host.engines import make_config, make_core, make_request
from cuda_host.fake_device import FakeDevice
from cuda_host.step_table import compare

from workers.engine.core import EngineCore

pytestmark = pytest.mark.cuda_host

SETTINGS = {"max_num_seqs": 256, "max_num_batched_tokens": 4096}
EVERYTHING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logprobs": 5,
}
NUM_TIMED_STEPS = 50


@pytest.fixture(scope="module")
def core() -> EngineCore:
    """With every graph. It leaves memory for another engine."""
    core = make_core(make_config(**SETTINGS, gpu_memory_utilization=0.45))
    while core.runner.size_to_capture(is_idle=True) is not None:
        core.heartbeat()
    return core


def begin_decoding(core: EngineCore, num_seqs: int, **sampling) -> None:
    """Returns when all of them are in a decode step."""
    for i in range(num_seqs):
        core.add_request(make_request(str(i), 1000, max_tokens=500, **sampling))
    while any(request.num_output_tokens < 4 for request in core.scheduler.running) or core.scheduler.waiting:
        core.step()


def end_all(core: EngineCore) -> None:
    for request in list(core.scheduler.running):
        core.abort(request.request_id)
    while core.has_work():
        core.step()


@pytest.fixture
def decoding(core) -> Iterator[EngineCore]:
    yield core
    end_all(core)


@pytest.mark.parametrize(("num_seqs", "kind"), [(1, "greedy"), (64, "greedy"), (64, "everything"), (256, "greedy")])
def test_a_decode_step(device: FakeDevice, decoding: EngineCore, num_seqs, kind):
    begin_decoding(decoding, num_seqs, **(EVERYTHING if kind == "everything" else {}))
    with device.recorded() as record:
        decoding.step()
    compare(f"decode {num_seqs}, {kind}", record)
    # The targets, whatever the table says.
    assert record.num_graphs == record.num_synchronizations == 1
    assert record.num_launches <= 10
    times = host_ms(decoding)
    print(f"host time of a step: {statistics.median(times):.2f} ms of one core, at best {min(times):.2f} ms")


def host_ms(core: EngineCore) -> list[float]:
    """Of some steps. Time of this thread, so that other processes count little."""
    times = []
    for _ in range(NUM_TIMED_STEPS):
        began = time.thread_time()
        core.step()
        times.append((time.thread_time() - began) * 1e3)
    return times


def test_a_prefill_step(device, core):
    for name in "before", "measured":
        core.add_request(make_request(name, 1024, max_tokens=2))
        with device.recorded() as record:
            core.step()
        while core.has_work():
            core.step()
    compare("prefill 1024", record)


def test_a_step_of_decodes_and_a_chunk(device, decoding):
    begin_decoding(decoding, 64)
    for name in "before", "measured":
        decoding.add_request(make_request(name, 512, max_tokens=2))
        with device.recorded() as record:
            decoding.step()
        decoding.step()
    compare("decode 64 and prefill 512", record)


def test_a_decode_step_without_graphs(device):
    core = make_core(make_config(**SETTINGS, cuda_graphs=False))
    begin_decoding(core, 64)
    with device.recorded() as record:
        core.step()
    compare("decode 64 without graphs", record)
    end_all(core)
    assert core.runner.graphs.captured_sizes == ()


def test_a_deterministic_step_computes_every_product_with_one_tile(device):
    core = make_core(make_config(**SETTINGS, cuda_graphs=False, deterministic=True))
    begin_decoding(core, 64)
    with device.recorded() as record:
        core.step()
    end_all(core)
    products = [launch for launch in record.details("launch") if launch.startswith("matmul_kernel ")]
    assert len(products) == 4 * 32 + 1, "four in each layer and the head"
    assert not record.details("product"), "a product of the library, whose bits depend on the batch"
