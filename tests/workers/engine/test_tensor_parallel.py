"""Two and four ranks give the tokens of one, over shared memory and over Gloo. Group tier: real processes, no Ray."""

import random

import pytest
from support.fakes.engines import make_config, make_engine, make_request
from support.ranks.tp_ranks import generate_on_ranks
from support.tiny import write_tiny_checkpoint

WINDOW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), sliding_window=WINDOW)


def greedy_requests():
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 256) for _ in range(n)] for n in (1, 5, WINDOW, 40, 83)]
    greedy = [make_request(str(i), p, temperature=0.0, max_tokens=24) for i, p in enumerate(prompts)]
    return [*greedy, make_request("sampled", prompts[1], seed=5, top_p=0.9, logprobs=3)]


@pytest.mark.parametrize(
    ("size", "backend", "overlap"), [(2, "shm", True), (2, "gloo", False), (4, "shm", False), (4, "gloo", True)]
)
def test_every_size_gives_the_tokens_of_one(folder, size, backend, overlap):
    expected = make_engine(folder).generate(greedy_requests())
    config = make_config(folder, tensor_parallel_size=size, overlap=overlap)
    assert generate_on_ranks(config, greedy_requests(), backend=backend) == expected
