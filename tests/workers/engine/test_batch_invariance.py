"""A token's logits and log-probabilities are the same bits whatever else the step computes and however its context was computed.

That is what lets another replica take up a stream in the middle: it prefills what the first one decoded. Group tier where
two ranks take part; the ranks are threads.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints.quantized.checkpoints import KINDS, write_quantized
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request
from support.native import native_library
from support.paths import DEMO_MODEL
from support.ranks.rank_threads import run_ranks

from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower
from workers.engine.llm_engine import stream_requests
from workers.engine.outputs import next_tokens
from workers.protocol import GenerateRequest, SamplingParams
from workers.sampling.device_sampler import DeviceSampler
from workers.sampling.sampler import SamplingRow, sample

DEMO = DEMO_MODEL
NUM_OUTPUT = 9
PROMPT_LENS = (
    1,
    37,
    63,
    130,
    300,
)  # below, at and across the tiles of 64 keys, and past the demo model's window of 256
MODELS = {
    "window": {"sliding_window": 16},
    "wide window": {"sliding_window": 100, "num_key_value_heads": 2},
    "no window": {"sliding_window": None, "head_dim": 32},
    "one query head per KV head": {"sliding_window": None, "num_key_value_heads": 8},
    "a window in two of three layers": {
        "sliding_window": 16,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}


# Float32 keeps the promise with torch's kernels too, the others with the compiled ones.
NUMERICS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8 KV": {"kv_cache_dtype": "int8"},
    "fp8 KV": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}
# With torch's own kernels: in fp32 they keep the promise in every form of the KV cache.
ON_TORCH = {"float32", "int8 KV"}


def checkpoint(model, tmp_path):
    if model in KINDS:
        return write_quantized(tmp_path, model)[0]
    return DEMO if model == "demo" else write_tiny_checkpoint(tmp_path, **MODELS[model])


class SeenLogits:
    """The logits that follow each context, which is the tokens so far. Another run that meets the same context must find the same bits."""

    def __init__(self) -> None:
        self.by_context: dict[tuple[int, ...], torch.Tensor] = {}
        # (tokens, how many of them are the context, logits): with overlap, the last token of a context becomes known later.
        self._unread: list[tuple[list[int], int, torch.Tensor]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        sample_on_device = DeviceSampler.sample

        def on_host(logits, rows, **kwargs):
            self._unread += [
                (row.token_ids, len(row.token_ids), x.clone()) for row, x in zip(rows, logits, strict=True)
            ]
            self.compare()
            return sample(logits, rows, **kwargs)

        def on_device(sampler, logits, rows):
            self._unread += [
                (row.token_ids, len(row.token_ids) + row.num_in_flight, x.clone())
                for row, x in zip(rows, logits, strict=True)
            ]
            self.compare()
            return sample_on_device(sampler, logits, rows)

        patch.setattr(next_tokens, "sample", on_host)
        patch.setattr(DeviceSampler, "sample", on_device)

    def compare(self) -> None:
        """All whose tokens are known by now."""
        unread, self._unread = self._unread, []
        for token_ids, num_tokens, logits in unread:
            if len(token_ids) < num_tokens:
                self._unread.append((token_ids, num_tokens, logits))
                continue
            expected = self.by_context.setdefault(tuple(token_ids[:num_tokens]), logits)
            off = (logits - expected).abs().max().item()
            assert torch.equal(logits, expected), f"{off:.1e} off after {num_tokens} tokens"

    def __len__(self) -> int:
        self.compare()
        assert not self._unread, "a token was never read"
        return len(self.by_context)


@pytest.fixture
def logits_of(monkeypatch):
    seen = SeenLogits()
    seen.install(monkeypatch)
    return seen


def make_requests():
    rng = random.Random(0)
    kinds = [{"temperature": 0.0}, {"top_p": 0.9}, {"temperature": 0.7, "repetition_penalty": 1.1}]
    return [
        make_request(
            str(n), [rng.randrange(3, 256) for _ in range(n)], seed=n, max_tokens=NUM_OUTPUT, logprobs=5, **kind
        )
        for n, kind in zip(PROMPT_LENS, kinds * 2, strict=False)
    ]


def resumed(request, tokens):
    return GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        output_token_ids=tokens,
    )


def run(core, requests):
    """{request id: [(token, its log-probabilities), ...]}"""
    outputs = {r.request_id: [] for r in requests}
    for delta in stream_requests(core, requests):
        outputs[delta.request_id] += zip(delta.token_ids, delta.logprobs, strict=True)
    return outputs


def engine(folder, **overrides):
    settings = {"enable_prefix_caching": False, "max_num_batched_tokens": 512, "num_kv_blocks": 500}
    return make_engine(folder, **(settings | overrides)).core


def tokens_of(output):
    return [token for token, _ in output]


@dataclass(frozen=True)
class Reference:
    """What each request computes when it is prefilled at once, alone, and decoded without overlap."""

    folder: Path
    settings: dict[str, Any]
    requests: list[GenerateRequest]
    expected: dict[str, list]
    seen: SeenLogits


@pytest.fixture(
    scope="module",
    params=[
        ("demo", 1, "float32"),
        ("demo", 2, "float32"),
        *((model, 1, "float32") for model in MODELS),
        *(("demo", 1, numerics) for numerics in NUMERICS if numerics != "float32"),
        ("wide window", 1, "bfloat16"),
        ("window", 1, "int8 KV"),
        ("no window", 1, "fp8 KV"),
        ("gptq, act-order, asymmetric", 1, "bfloat16"),
        ("int-quantized", 1, "float32"),
        ("fp8, dynamic", 1, "bfloat16"),
    ],
    ids=lambda param: f"{param[0]}, {param[1]} threads, {param[2]}",
)
def reference(request, tmp_path_factory):
    model, num_threads, numerics = request.param
    if numerics not in ON_TORCH:
        native_library("avx2")  # skips where there can be none
    settings = {"num_threads": num_threads, **NUMERICS[numerics]}
    folder = checkpoint(model, tmp_path_factory.mktemp("model"))
    # Two threads on cores that others use as well wait for each other at every operation: only the long prompts then.
    requests = make_requests()[0 if num_threads == 1 else 3 :]
    alone, expected, seen = engine(folder, overlap=False, **settings), {}, SeenLogits()
    with pytest.MonkeyPatch.context() as patch:
        seen.install(patch)
        for one in requests:
            expected |= run(alone, [one])
    assert len(seen) == NUM_OUTPUT * len(requests), "every position was recorded"
    return Reference(folder, settings, requests, expected, seen)


@pytest.mark.usefixtures("both_ways")
def test_every_way_to_compute_a_context_gives_the_same_bits(reference, monkeypatch):
    """`seen` compares the logits with the reference's; here the log-probabilities are compared."""
    folder, settings = reference.folder, reference.settings
    requests, expected = reference.requests, reference.expected
    reference.seen.install(monkeypatch)
    assert run(engine(folder, **settings), requests) == expected, "decoded along with others"

    rng = random.Random(1)
    for budget, block_size in ((512, 16), (67, 1)):
        core = engine(
            folder,
            **settings,
            max_num_batched_tokens=budget,
            max_num_seqs=8,
            block_size=block_size,
            num_kv_blocks=8000 // block_size,
        )
        cuts = {r.request_id: rng.randrange(1, NUM_OUTPUT) for r in requests}
        continued = run(core, [resumed(r, tokens_of(expected[r.request_id])[: cuts[r.request_id]]) for r in requests])
        for name, output in continued.items():
            assert output == expected[name][cuts[name] :], f"prefilled in chunks of at most {budget} tokens"

    cached = engine(folder, **settings, enable_prefix_caching=True, num_kv_blocks=2000)
    assert run(cached, requests) == expected, "with prefix caching, cold"
    for cut in (1, NUM_OUTPUT - 1):
        continued = run(cached, [resumed(r, tokens_of(expected[r.request_id])[:cut]) for r in requests])
        assert continued == {name: output[cut:] for name, output in expected.items()}, "from a cached prefix"
    assert cached.load().prefix_hits_total > 0

    # Room for the longest request and little more.
    blocks = cached.kv_cache.max_blocks_held(PROMPT_LENS[-1] + NUM_OUTPUT, 64) + 12
    tight = engine(folder, **settings, num_kv_blocks=blocks, max_num_batched_tokens=64)
    assert run(tight, requests) == expected, "with blocks that come and go"
    assert len(reference.seen) == NUM_OUTPUT * len(requests), "no context but the reference's"


@pytest.mark.group
@pytest.mark.parametrize(
    ("model", "overlap", "numerics"),
    [
        ("demo", (False, True), "float32"),
        ("window", (True, False), "float32"),
        ("demo", (False, False), "int4"),
        ("demo", (True, False), "int8 KV"),
    ],
)
def test_two_ranks_keep_the_promise_too(model, overlap, numerics, tmp_path, logits_of):
    """overlap: of the replica that begins, and of the one that goes on."""
    folder, requests = checkpoint(model, tmp_path), make_requests()

    def program(tp):
        def make_core(**overrides):
            settings = {"enable_prefix_caching": False, "max_num_seqs": 8, "num_kv_blocks": 500}
            config = make_config(folder, tensor_parallel_size=2, **(settings | NUMERICS[numerics] | overrides))
            runner = build_runner(config, tp)
            runner.allocate_kv_cache()
            return EngineCore(config, runner, tp) if tp.rank == 0 else runner

        def on_both(core, requests):
            if tp.rank:
                return run_follower(core, tp)
            outputs = run(core, requests)
            core.shutdown()
            return outputs

        expected = on_both(make_core(max_num_batched_tokens=512, overlap=overlap[0]), requests)
        parts = [resumed(r, tokens_of(expected[r.request_id])[:7]) for r in requests] if expected else []
        return expected, on_both(make_core(max_num_batched_tokens=29, overlap=overlap[1]), parts)

    (expected, continued), _ = run_ranks(2, program)
    assert len(logits_of) >= NUM_OUTPUT * len(requests)
    assert continued == {name: output[7:] for name, output in expected.items()}


@pytest.mark.parametrize("vocab_size", [50, 4096, 32_768])
def test_a_rows_log_probabilities_do_not_depend_on_other_rows(vocab_size):
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    kinds = [
        {"temperature": 0.0, "logprobs": 5},
        {"logprobs": 0},
        {"top_p": 0.7, "temperature": 0.5, "logprobs": 20},
        {"top_k": 5, "min_p": 0.01},
        {"frequency_penalty": 0.5, "logprobs": 3},
    ]
    rows = [
        SamplingRow(SamplingParams(max_tokens=9, seed=i, **kinds[i % len(kinds)]), [5, 3, 3, 4], 2) for i in range(24)
    ]
    together = sample(logits.clone(), rows, eos_token_ids=(2,))
    alone = [sample(logits[i : i + 1].clone(), [row], eos_token_ids=(2,))[0] for i, row in enumerate(rows)]
    assert together == alone
