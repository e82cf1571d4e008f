"""Two ranks, each with a fake GPU: the same collectives in the same order, inside graphs and outside, and no more waits than one rank."""

import socket

import pytest
from cuda_host.fake_device import Record
from cuda_host.gpus import A10G
from cuda_host.processes import finish, start_program
from cuda_host.step_table import compare

pytestmark = pytest.mark.cuda_host


@pytest.fixture(scope="module")
def ranks():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [start_program("rank", A10G, str(rank), str(port)) for rank in range(2)]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def collectives(calls):
    """Gathering sends on one rank and receives on the other."""
    found = [call.removeprefix("captured ") for call in calls]
    return [c.replace("receive", "send") for c in found if c.split()[0] == "collective"]


def test_both_ranks_run_the_same_collectives_in_the_same_order(ranks):
    first, second = ([call for step in rank["steps"] for call in collectives(step)] for rank in ranks)
    assert len(first) > 100
    assert first == second


def test_both_ranks_capture_the_same_graphs_and_have_as_many_blocks(ranks):
    assert ranks[0]["captured_sizes"] == ranks[1]["captured_sizes"] != []
    assert ranks[0]["num_blocks"] == ranks[1]["num_blocks"] > 1000
    assert ranks[0]["unknown_calls"] == ranks[1]["unknown_calls"] == []


def test_a_decode_step_of_each_rank(ranks):
    for number, rank in enumerate(ranks):
        captures = [Record(step).captured for step in rank["steps"] if Record(step).captured.calls]
        compare(f"tensor parallel 2, rank {number}, captured: decode 8", captures[-1])
        # Replayed, and none before the last: that one only reads.
        decodes = [Record(step) for step in rank["steps"] if Record(step).num_graphs]
        compare(f"tensor parallel 2, rank {number}, decode 8", decodes[-2])
