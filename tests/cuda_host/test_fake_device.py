"""The fake device itself: what it must refuse as CUDA does, so that the other tests can fail."""

import contextlib
import threading

import pytest
import torch
from cuda_host.gpus import A100_80

pytestmark = [pytest.mark.cuda_host, pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")]


def capture(work, *, mode="thread_local"):
    """Captures `work` on a stream of its own."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        work()
    return graph


def test_it_is_the_gpu_that_it_plays(device):
    properties = torch.cuda.get_device_properties(0)
    assert (properties.name, properties.major, properties.multi_processor_count) == (A100_80.name, 8, 108)
    assert torch.cuda.mem_get_info()[1] == A100_80.memory_bytes


def test_memory_is_counted_and_ends(device):
    before = device.used_bytes
    tensor = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    assert device.used_bytes - before >= 1 << 30
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(A100_80.memory_bytes, dtype=torch.uint8, device="cuda")
    del tensor
    torch.cuda.empty_cache()
    assert device.used_bytes <= before


def test_it_computes_nothing(device):
    with device.recorded() as record:
        assert (torch.ones(3, device="cuda") + 1).tolist() == [0, 0, 0]
    assert record.summary() == {"launches": 2, "copies D2H pageable": 1, "synchronizations": 1}


def test_a_product_and_a_pinned_copy_are_counted(device):
    a = torch.empty(8, 16, dtype=torch.bfloat16, device="cuda")
    host = torch.zeros(8, 8, dtype=torch.bfloat16, pin_memory=True)
    with device.recorded() as record:
        host.copy_(torch.nn.functional.linear(a, a), non_blocking=True)
    assert record.summary() == {"launches": 1, "copies D2H pinned": 1}
    assert record.details("product") == ["cublasGemmEx m=8 n=8 k=16"]


def test_a_graph_is_one_launch(device):
    x = torch.zeros(4, device="cuda")
    x + 1
    with device.recorded() as record:
        graph = capture(lambda: x + 1 + 2)
    assert record.captured.num_launches == 2
    assert record.num_launches == 0
    with device.recorded() as record:
        graph.replay()
    assert record.summary() == {"graphs": 1}


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.zeros(4).to("cuda"),
        lambda x: x.nonzero(),
    ],
    ids=["item", "synchronize", "pageable copy", "a shape that follows from values"],
)
def test_what_waits_cannot_be_captured(device, work):
    x = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        capture(lambda: work(x))
    # The stream works again.
    x + 1


def test_another_thread_may_go_on_while_this_one_captures(device):
    x = torch.zeros(4, device="cuda")
    event = torch.cuda.Event()
    event.record()

    def query():
        with contextlib.suppress(RuntimeError):
            event.query()

    def poll():
        thread = threading.Thread(target=query)
        thread.start()
        thread.join()
        x + 1

    capture(poll)
    with pytest.raises(RuntimeError, match="captur"):
        capture(poll, mode="global")


def test_a_side_stream_must_come_back(device):
    x, side = torch.zeros(4, device="cuda"), torch.cuda.Stream()

    def fork(*, join):
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            x.add_(1)
        if join:
            main.wait_stream(side)

    capture(lambda: fork(join=True))
    with pytest.raises(RuntimeError, match="unjoined"):
        capture(lambda: fork(join=False))


def test_a_kernel_of_triton_is_launched_and_must_be_loaded_before_it_is_captured(device):
    from workers.kernels.layers.silu_mul import silu_mul

    gate_up = torch.empty(4, 64, dtype=torch.float16, device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        capture(lambda: silu_mul(gate_up))
    with device.recorded() as record:
        silu_mul(gate_up)
    assert record.num_launches == 1
    with device.recorded() as record:
        capture(lambda: silu_mul(gate_up))
    assert record.captured.num_launches == 1


def test_a_launch_beyond_the_devices_limits_fails(device):
    import triton
    import triton.language as tl

    @triton.jit
    def nothing(x_ptr):
        tl.store(x_ptr, 0)

    x = torch.zeros(1, dtype=torch.int32, device="cuda")
    nothing[(1, 65535)](x)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        nothing[(1, 65536)](x)


def test_a_host_that_asks_before_it_waits_waits_once(device):
    event = torch.cuda.Event()
    with device.recorded() as record:
        for _ in range(2):
            event.record()
            if not event.query():
                event.synchronize()
            assert event.query(), "reached by then"
    assert record.num_synchronizations == 2
