"""Two and four ranks with a fake GPU each: the same collectives in the same order, in graphs and outside, and no more waits than alone."""

import itertools
import socket
from collections import Counter

import pytest
from cuda_host.fake_device import Record
from cuda_host.gpus import A10G
from cuda_host.processes import finish, start_program
from cuda_host.step_table import compare

pytestmark = pytest.mark.cuda_host


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    size = request.param
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [start_program("rank", A10G, str(rank), str(size), str(port)) for rank in range(size)]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def collectives(calls):
    """Gathering sends on one rank and receives on the other."""
    found = [call.removeprefix("captured ") for call in calls]
    return [c.replace("receive", "send") for c in found if c.split()[0] == "collective"]


def test_all_ranks_run_the_same_collectives_in_the_same_order(ranks):
    first, *others = ([call for step in rank["steps"] for call in collectives(step)] for rank in ranks)
    assert len(first) > 100
    for other in others:
        # Rank 0 receives from each of the others what each sends once.
        assert [call for call, _ in itertools.groupby(first)] == [call for call, _ in itertools.groupby(other)]
        assert Counter(first) == Counter(
            {c: n * (len(others) if "send" in c else 1) for c, n in Counter(other).items()}
        )


def test_all_ranks_capture_the_same_graphs_and_have_as_many_blocks(ranks):
    assert len({tuple(rank["captured_sizes"]) for rank in ranks}) == 1
    assert ranks[0]["captured_sizes"]
    assert len({rank["num_blocks"] for rank in ranks}) == 1
    assert all(rank["unknown_calls"] == [] for rank in ranks)


def test_a_decode_step_of_each_rank(ranks):
    for number, rank in enumerate(ranks[:2]):
        captures = [Record(step).captured for step in rank["steps"] if Record(step).captured.calls]
        compare(f"tensor parallel {len(ranks)}, rank {number}, captured: decode 8", captures[-1])
        # Replayed, and none before the last: that one only reads.
        decodes = [Record(step) for step in rank["steps"] if Record(step).num_graphs]
        compare(f"tensor parallel {len(ranks)}, rank {number}, decode 8", decodes[-2])
