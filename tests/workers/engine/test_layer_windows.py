"""An engine whose layers have different windows: what it holds, what it tells, and that ranks agree. Its bits: test_batch_invariance.py."""

import pytest
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request
from support.ranks.tp_ranks import generate_on_ranks

from workers.engine.llm_engine import stream_requests

WINDOW, SIZE = 16, 4
# Groups: one layer without a window, three with it.
LAYERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("layers"), sliding_window=WINDOW, **LAYERS)


@pytest.mark.usefixtures("both_ways")
def test_the_cache_of_layers_with_a_window_stops_growing(folder):
    core = make_engine(folder).core
    assert [group.window for group in core.config.model.layer_groups] == [None, WINDOW, WINDOW, WINDOW]
    request = make_request("long", list(range(5, 25)), max_tokens=200)
    num_used = [core.kv_cache.pool.num_used for _ in stream_requests(core, [request])]
    num_used = [n for n in num_used if n > 0]
    in_sight = -(-(WINDOW - 1) // SIZE) + 1
    whole = -(-220 // SIZE)
    assert whole <= max(num_used) <= whole + 3 * in_sight, "one group grows, three do not"
    assert num_used[-1] - num_used[-101] == 100 // SIZE
    assert core.kv_cache.pool.num_used == 0


def test_a_layer_with_and_one_without_a_window_use_the_same_memory(folder):
    core = make_engine(folder, num_kv_blocks=40).core
    config, caches = core.config, core.runner.kv_cache
    assert config.model.layers_per_group == 1
    assert len({keys.data_ptr() for keys, _ in caches}) == 1
    assert sum(tensor.nbytes for tensor in caches[0]) == 41 * config.kv_block_bytes
    assert config.kv_block_bytes * 4 == SIZE * config.kv_token_bytes


def test_what_the_gateway_is_told_counts_whole_tokens(folder):
    """As if one block held all layers: 4 blocks of the pool hold 4 tokens in all layers."""
    core = make_engine(folder, num_kv_blocks=403).core
    facts = core.facts("r")
    assert (facts.num_blocks, facts.sliding_window) == (100, None)
    seen = []
    for _ in stream_requests(core, [make_request("r", list(range(5, 105)), max_tokens=3)]):
        load = core.load()
        assert load.num_blocks == 100
        seen.append(load.num_used_blocks)
    # The chunk of tokens 64..99 sees keys from 49 on, in blocks 12..24, so 25 + 3 * 13 = 64 blocks are used, a quarter of which is 16.
    # Token 100 is in block 25, and sees keys from 85 on, in blocks 21..25: 26 + 3 * 5 = 41.
    assert seen == [16, 11, 0]
    events = core.take_cache_events()
    assert events is not None and len(events.stored) == 25, "one for each full block of tokens, not one for each group"


def test_a_cache_too_small_for_the_longest_request_says_so(folder, caplog):
    engine = make_engine(folder, num_kv_blocks=120, max_num_batched_tokens=16, max_num_seqs=8)
    assert engine.core.max_model_len == engine.core.kv_cache.longest_sequence(512, 16) < 512
    assert "holds one sequence of" in caplog.text
    (tokens,) = engine.generate([make_request("r", [7] * (engine.core.max_model_len - 20), max_tokens=20)])
    assert len(tokens) == 20


@pytest.mark.group
@pytest.mark.parametrize("size", [2, 8])
def test_every_size_gives_the_tokens_of_one(folder, size):
    requests = [make_request(str(n), list(range(3, 3 + n)), temperature=0.0, max_tokens=12) for n in (1, 20, 70)]
    expected = make_engine(folder).generate(requests)
    config = make_config(folder, tensor_parallel_size=size)
    assert generate_on_ranks(config, requests, backend="shm") == expected
