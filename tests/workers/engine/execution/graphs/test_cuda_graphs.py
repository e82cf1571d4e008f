"""Decode steps in few sizes, and graphs of them: which sizes there are, what pads a batch, when a graph is captured, and that
neither changes a bit. The recorder of these tests repeats the step itself; the real one is tested in tests/cuda_host.
"""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_request
from support.ranks.rank_threads import run_ranks

from workers.attention.sdpa import SdpaBackend
from workers.engine.batch import STOP, capture_message, dummy_batch, is_stop, size_to_capture
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.execution.graphs.cuda_graphs import GraphRecorder
from workers.engine.execution.graphs.decode_padding import (
    CapturePolicy,
    decode_sizes,
    is_decode,
    next_to_capture,
    pad_decode,
    padded_size,
)
from workers.engine.execution.model_runner import ModelRunner
from workers.engine.follower import run_follower
from workers.engine.llm_engine import stream_requests
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.parallel.group import SingleRank


def test_the_worked_example():
    assert decode_sizes(100) == (1, 2, 4, 8, 16, 32, 48, 64, 96, 100)
    assert padded_size(9, decode_sizes(100)) == 16


@given(st.integers(1, 1024))
def test_every_number_of_sequences_has_a_size_that_wastes_little(max_num_seqs):
    sizes = decode_sizes(max_num_seqs)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for n in range(1, max_num_seqs + 1):
        size = padded_size(n, sizes)
        assert n <= size < max(2 * n, n + 1)
        assert n <= 64 or size < n + 32


def test_padding_touches_the_null_block_only():
    batch = dummy_batch(3, 1, 4)
    padded = pad_decode(batch, 8)
    assert is_decode(padded)
    assert padded.pack().size > batch.pack().size, "every array was padded, or `pack` would find a contradiction"
    for name in ("token_ids", "positions", "query_lens", "seq_lens"):
        assert np.array_equal(getattr(padded, name)[:3], getattr(batch, name)), name
    for name in ("slot_mapping", "block_table"):
        assert np.array_equal(getattr(padded, name)[:, :3], getattr(batch, name)), name
    assert (padded.unread_rows[3:] == -1).all()
    assert (padded.block_table[0, 3:] == NULL_BLOCK).all()
    assert set(padded.slot_mapping[0, 3:]) == {0}, "the first place of the null block"
    assert (padded.positions[3:].tolist(), padded.seq_lens[3:].tolist()) == ([0] * 5, [1] * 5), "sees only itself"
    assert padded.logits_indices.tolist() == [0, 1, 2], "nothing is sampled from a row that pads"
    assert pad_decode(batch, 3) is batch


def test_a_prefill_and_a_step_that_reads_a_prompt_are_no_decode_steps():
    assert is_decode(dummy_batch(3, 1, 4))
    assert not is_decode(dummy_batch(3, 2, 4))
    assert not is_decode(dummy_batch(3, 1, 4, num_prompt_logits=1))


def test_idle_engines_capture_the_smallest_size_next_and_busy_ones_what_they_use():
    sizes = (1, 2, 4, 8)
    assert next_to_capture(sizes, {1, 4}, wanted=None) == 2
    assert next_to_capture(sizes, sizes, wanted=None) is None
    assert next_to_capture(sizes, {1}, wanted=8) == 8
    assert next_to_capture(sizes, {1, 8}, wanted=8) is None


def test_the_message_to_followers_is_neither_a_batch_nor_the_stop():
    assert size_to_capture(capture_message(48)) == 48
    assert not is_stop(capture_message(48))
    assert size_to_capture(STOP) is size_to_capture(dummy_batch(1, 1, 4).pack()) is None


class RepeatingRecorder(GraphRecorder):
    """Repeats the step. `broken_from`: the number of the recording from which on all fail."""

    policy = CapturePolicy()

    def __init__(self, broken_from: int | None = None) -> None:
        self.broken_from = broken_from
        self.num_recorded = self.num_failed = self.num_replayed = 0

    def reserve(self, steps) -> int:
        return 0

    def record(self, step):
        # As the real one does before it captures: all ranks take part.
        step()
        if self.num_recorded == self.broken_from:
            self.num_failed += 1
            raise RuntimeError("operation not permitted when stream is capturing\nand more that nobody reads")
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            step()

        return replay


class TensorAttention(SdpaBackend):
    """Decodes by tensors alone, as a kernel does, so that a step can be repeated with other lengths."""

    def forward(self, q, k_cache, v_cache, metadata):
        if metadata.max_query_len > 1:
            return super().forward(q, k_cache, v_cache, metadata)
        group = self.num_heads // self.num_kv_heads
        keys, values = (
            cache[metadata.block_table.long()].flatten(1, 2).repeat_interleave(group, dim=2)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("nhd,nkhd->nhk", q, keys) * self.head_dim**-0.5
        is_future = torch.arange(keys.shape[1]) >= metadata.seq_lens[:, None]
        weights = scores.masked_fill(is_future[:, None], -torch.inf).softmax(dim=-1)
        return torch.einsum("nhk,nkhd->nhd", weights, values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), sliding_window=None)


def make_core(folder, *, recorder=None, pads=True, tensor_attention=False, tp=None, **settings):
    tp = tp or SingleRank()
    config = make_config(folder, max_num_seqs=6, tensor_parallel_size=tp.size, **settings)
    built = build_runner(config, tp)
    if tensor_attention:
        for layer in built.model.model.layers:
            backend = layer.self_attn.backend
            layer.self_attn.backend = TensorAttention(
                num_heads=backend.num_heads,
                num_kv_heads=backend.num_kv_heads,
                head_dim=backend.head_dim,
                sliding_window=None,
            )
    runner = ModelRunner(
        config,
        built.model,
        tp,
        dtype=built.dtype,
        attention_backend="sdpa",
        num_threads=1,
        pads_decodes=pads,
        graph_recorder=recorder,
    )
    runner.allocate_kv_cache()
    if tp.rank:
        return runner
    core = EngineCore(config, runner, tp)
    # As on CUDA. Otherwise the chunks of prompts would follow the machine's speed, and the bits of TensorAttention depend on them.
    core.scheduler.pace = None
    return core


def requests():
    """Ends at different steps, so that the number of sequences goes down; one reads its prompt, one is embedded."""
    made = [make_request(str(n), list(range(5, 5 + n)), max_tokens=3 + n, logprobs=3) for n in (1, 2, 5, 9, 30)]
    made.append(make_request("prompt", list(range(9, 80)), max_tokens=2, logprobs=1, prompt_logprobs=1))
    return made


def outputs(core):
    found = {}
    for delta in stream_requests(core, requests()):
        found.setdefault(delta.request_id, []).append((delta.token_ids, delta.logprobs, delta.prompt_logprobs))
    return found


@pytest.mark.usefixtures("both_ways")
def test_padding_changes_no_bit(folder):
    assert outputs(make_core(folder)) == outputs(make_core(folder, pads=False))


@pytest.mark.usefixtures("both_ways")
def test_graphs_change_no_bit(folder):
    recorder = RepeatingRecorder()
    core = make_core(folder, recorder=recorder, tensor_attention=True)
    assert outputs(core) == outputs(make_core(folder, tensor_attention=True))
    assert core.runner.graphs.captured_sizes == (1, 2, 4, 6), "each was needed while requests ended"
    first = recorder.num_replayed
    assert outputs(core) == outputs(make_core(folder, tensor_attention=True))
    assert recorder.num_replayed > first > 0
    assert recorder.num_recorded == 4


@pytest.mark.usefixtures("both_ways")
def test_an_idle_engine_captures_one_size_at_each_heartbeat(folder):
    core = make_core(folder, recorder=RepeatingRecorder())
    for expected in ((1,), (1, 2), (1, 2, 4), (1, 2, 4, 6), (1, 2, 4, 6)):
        core.heartbeat()
        assert core.runner.graphs.captured_sizes == expected


@pytest.mark.usefixtures("both_ways")
def test_after_a_failed_capture_the_engine_goes_on_without(folder, caplog):
    recorder = RepeatingRecorder(broken_from=1)
    core = make_core(folder, recorder=recorder, tensor_attention=True)
    with caplog.at_level(logging.WARNING, "workers.engine.execution.graphs.cuda_graphs"):
        assert outputs(core) == outputs(make_core(folder, tensor_attention=True))
    core.heartbeat()
    assert (recorder.num_recorded, recorder.num_failed) == (1, 1), "no second attempt"
    (record,) = [r for r in caplog.records if r.name == "workers.engine.execution.graphs.cuda_graphs"]
    assert record.getMessage().endswith("so far: operation not permitted when stream is capturing.")


@pytest.mark.group
@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("broken_rank", [None, 1])
def test_two_ranks_capture_the_same_sizes_or_none(folder, broken_rank):
    def program(tp):
        recorder = RepeatingRecorder(broken_from=2 if tp.rank == broken_rank else None)
        core = make_core(folder, recorder=recorder, tensor_attention=True, tp=tp)
        if tp.rank:
            run_follower(core, tp)
            return recorder.num_replayed, core.graphs.captured_sizes
        found = outputs(core)
        assert outputs(core) == found
        core.shutdown()
        return recorder.num_replayed, core.runner.graphs.captured_sizes

    first, second = run_ranks(2, program)
    assert first == second
    assert first[0] > 0
    assert len(first[1]) == (4 if broken_rank is None else 2)
