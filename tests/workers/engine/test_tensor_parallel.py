"""Two and four ranks give the tokens of one, over shared memory and over Gloo. Group tier: real processes, no Ray."""

import random

import pytest
from msgspec.structs import replace
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request
from support.ranks.tp_ranks import generate_on_ranks

WINDOW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), sliding_window=WINDOW)


def greedy_requests(max_tokens=12):
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 256) for _ in range(n)] for n in (1, 5, WINDOW, 40, 83)]
    greedy = [make_request(str(i), p, temperature=0.0, max_tokens=max_tokens) for i, p in enumerate(prompts)]
    return [*greedy, make_request("sampled", prompts[1], seed=5, top_p=0.9, logprobs=3)]


@pytest.mark.parametrize(
    ("size", "backend", "overlap"), [(2, "shm", True), (2, "gloo", False), (4, "shm", False), (4, "gloo", True)]
)
def test_every_size_gives_the_tokens_of_one(folder, size, backend, overlap):
    expected = make_engine(folder).generate(greedy_requests())
    config = make_config(folder, tensor_parallel_size=size, overlap=overlap)
    assert generate_on_ranks(config, greedy_requests(), backend=backend) == expected


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "backend"), [(9, 3, 9, "gloo"), (8, 2, 8, "shm"), (12, 4, 3, "shm")]
)
def test_ranks_that_divide_or_share_key_value_heads(tmp_path, heads, kv_heads, size, backend):
    """SmolLM2's heads on 9 ranks, which have 32 or 64 columns of the intermediate size; 8 ranks of which four have the same KV head; and 3
    ranks of which each has one or two of the KV heads more than once.
    """
    sizes = {
        "hidden_size": 8 * heads,
        "intermediate_size": 320,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    folder = write_tiny_checkpoint(tmp_path, sliding_window=WINDOW, **sizes)
    expected = make_engine(folder).generate(greedy_requests())
    config = make_config(folder, tensor_parallel_size=size)
    assert config.kv_block_bytes * kv_heads == make_config(folder).kv_block_bytes * (4 if size == 3 else 1)
    assert generate_on_ranks(config, greedy_requests(), backend=backend) == expected


def test_a_replica_of_uneven_ranks_continues_the_streams_of_another(tmp_path):
    """Byte for byte: seven units of 32 columns on three ranks, and a prompt that is read in other chunks."""
    sizes = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 224}
    folder = write_tiny_checkpoint(tmp_path, sliding_window=WINDOW, **sizes)
    requests = greedy_requests(max_tokens=20)
    whole = generate_on_ranks(make_config(folder, tensor_parallel_size=3), requests, backend="shm")
    continued = [replace(r, output_token_ids=tokens[:10]) for r, tokens in zip(requests, whole, strict=True)]
    other = make_config(folder, tensor_parallel_size=3, max_num_batched_tokens=16, max_num_seqs=16)
    assert generate_on_ranks(other, continued, backend="shm") == [tokens[10:] for tokens in whole]
