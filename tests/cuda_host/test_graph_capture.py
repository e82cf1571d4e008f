"""CUDA graphs of decode steps by the rules of CUDA's stream capture: what is captured, its memory, and what happens when it fails."""

import logging

import pytest
import torch
from cuda_host.engines import make_config, make_core, make_request, make_runner
from cuda_host.step_table import compare

from workers.engine.llm_engine import stream_requests

pytestmark = pytest.mark.cuda_host


def capture_all(runner):
    while (size := runner.size_to_capture(is_idle=True)) is not None:
        runner.capture(size)


def test_graphs_take_no_memory_once_the_cache_is_sized(device):
    """Their pool is as large as it gets before the KV cache takes the rest."""
    runner = make_runner(make_config(max_num_seqs=128))
    with device.recorded() as record:
        capture_all(runner)
    assert runner.graphs.captured_sizes == (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
    # One piece of the smallest size: torch keeps the state of random numbers for graphs in it.
    assert sum(map(int, record.details("malloc"))) <= 2 << 20
    assert record.num_graphs == 0


@pytest.mark.parametrize("size", [1, 64])
def test_a_graph_has_the_kernels_of_the_step_without_it(device, size):
    runner = make_runner(make_config(max_num_seqs=64, num_kv_blocks=1000))
    with device.recorded() as record:
        runner.capture(size)
    captured = record.captured
    # First it runs, then it is captured.
    ran = [call for call in record.calls if call.split()[0] in {call.split()[0] for call in captured.calls}]
    assert ran[-len(captured.calls) :] == captured.calls
    compare(f"captured: decode {size}", captured)


def test_a_step_that_waits_for_the_device_cannot_be_captured_and_runs_without(device, caplog):
    core = make_core(make_config(max_num_seqs=8, num_kv_blocks=1000))
    forward = core.runner.model.forward

    def waiting(*args):
        hidden_states = forward(*args)
        torch.cuda.current_stream().synchronize()
        return hidden_states

    core.runner.model.forward = waiting
    with caplog.at_level(logging.WARNING):
        tokens = sum(len(delta.token_ids) for delta in stream_requests(core, [make_request("a", 30, max_tokens=9)]))
    assert tokens == 9
    assert core.runner.graphs.captured_sizes == ()
    (message,) = [
        record.getMessage() for record in caplog.records if record.name == "workers.engine.execution.graphs.cuda_graphs"
    ]
    assert message.startswith("Decode steps of 1 sequences stay without a graph")
    assert "capturing" in message
