"""Adapters in the engine: the logits of PEFT's merged weights, and the same bits for a row whatever is beside it and wherever it is."""

import random

import msgspec
import pytest
import torch
from support.checkpoints.adapters import write_adapter, write_with_peft
from support.checkpoints.tiny import make_tiny_model, write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request
from support.logits import all_logits
from support.native import native_library
from support.ranks.rank_threads import run_ranks

from workers.checkpoint.model_config import load_model_config
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower
from workers.engine.llm_engine import run_requests, stream_requests
from workers.errors import AdapterNotLoadedError
from workers.lora.peft_config import MODULES
from workers.lora.rank_adapters import adapter_key
from workers.protocol import FinishReason

NUM_ADAPTERS = 8
NUMERICS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"quantization": "int4"},
}
LORA = {"enable_lora": True, "max_lora_rank": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), sliding_window=None)


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Of ranks 1 to 16, on all modules or some."""
    root, model = tmp_path_factory.mktemp("adapters"), load_model_config(folder)
    kinds = [{"rank": 2 * i + 1, "modules": MODULES if i % 2 == 0 else MODULES[i % 5 :]} for i in range(NUM_ADAPTERS)]
    return [write_adapter(root / str(i), model, seed=i, **kind) for i, kind in enumerate(kinds)]


def load_all(engine, adapters):
    return [engine.load_adapter(f"a{i}", adapter) for i, adapter in enumerate(adapters)]


def prompt_of(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(3, 256) for _ in range(length)]


def with_adapter(request, adapter):
    return msgspec.structs.replace(request, adapter=adapter)


def request_with(name, adapter, *, length=9, **sampling):
    return with_adapter(make_request(name, prompt_of(name, length), **({"logprobs": 3} | sampling)), adapter)


def outputs(core, requests):
    """{request id: [(token, its log-probabilities), ...]}"""
    found = {r.request_id: [] for r in requests}
    for delta in stream_requests(core, requests):
        found[delta.request_id] += zip(delta.token_ids, delta.logprobs, strict=True)
    return found


PEFT_KINDS = {
    "all modules": {"r": 4, "lora_alpha": 8, "target_modules": list(MODULES)},
    "attention alone, rslora": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "ranks and scales by pattern, one layer": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["k_proj", "o_proj", "down_proj", "gate_proj"],
        "rank_pattern": {"down_proj": 20, r"layers\.1\.self_attn\.k_proj": 1},
        "alpha_pattern": {"o_proj": 1},
        "layers_to_transform": [1],
    },
}


def compare_with_peft(folder, tmp_path, *, kind, size, **sizes):
    merged = write_with_peft(tmp_path, make_tiny_model(sliding_window=None, **sizes), **PEFT_KINDS[kind])
    base = make_tiny_model(sliding_window=None, **sizes)
    prompt = prompt_of(0, 40)
    with torch.inference_mode():
        expected, without = merged(torch.tensor([prompt])).logits[0], base(torch.tensor([prompt])).logits[0]
    assert (expected - without).abs().max() > 0.1, "the adapter matters"

    def program(tp):
        config = make_config(folder, tensor_parallel_size=size, enable_lora=True, enable_prefix_caching=False)
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        runner.adapters.load("support", tmp_path)
        if tp.rank:
            return run_follower(runner, tp)
        core = EngineCore(config, runner, tp)
        found = all_logits(core, prompt, adapter="support"), all_logits(core, prompt)
        core.shutdown()
        return found

    (found, plain), *_ = run_ranks(size, program)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain, without, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_logits_equal_those_of_the_weights_that_peft_merges(kind, size, folder, tmp_path):
    compare_with_peft(folder, tmp_path, kind=kind, size=size)


SHAPES = {
    "uneven shares": (3, {"hidden_size": 96, "num_attention_heads": 12, "intermediate_size": 98}),
    "two ranks for each KV head": (4, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_that_share_heads_unevenly(shape, tmp_path):
    size, sizes = SHAPES[shape]
    folder = write_tiny_checkpoint(tmp_path / "model", sliding_window=None, **sizes)
    compare_with_peft(folder, tmp_path / "adapter", kind="all modules", size=size, **sizes)


def test_a_checkpoint_in_mistrals_own_layout_whose_rotary_rows_lie_otherwise(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "model", sliding_window=None, layout="mistral")
    compare_with_peft(folder, tmp_path / "adapter", kind="all modules", size=1)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_32_rows_over_8_adapters_and_the_base_have_the_bits_of_each_alone(numerics, folder, adapters):
    """Alone they run in another slot, without graphs and in chunks; the base runs in an engine that knows no adapters."""
    native_library("avx2")
    settings = {**NUMERICS[numerics], "num_kv_blocks": 500}
    engine = make_engine(folder, **LORA, **settings)
    revisions = [*load_all(engine, adapters), None]
    requests = [request_with(str(i), revisions[i % len(revisions)], length=3 + 5 * i % 31) for i in range(32)]
    together = outputs(engine.core, requests)
    assert len({tuple(t for t, _ in output) for output in together.values()}) == 32, "all differ"
    one_by_one = {"cuda_graphs": False, "max_num_batched_tokens": 7, "max_num_seqs": 1, "enable_prefix_caching": False}
    alone = make_engine(folder, **LORA, **settings, **one_by_one, max_loras=1)
    load_all(alone, adapters)
    plain = make_engine(folder, **settings, **one_by_one)
    for request in requests:
        core = plain.core if request.adapter is None else alone.core
        assert outputs(core, [request])[request.request_id] == together[request.request_id], request.adapter


def test_without_the_compiled_kernels_too(folder, adapters, monkeypatch):
    monkeypatch.setattr("workers.engine.build._library", lambda device: None)
    engine = make_engine(folder, **LORA)
    revisions = [*load_all(engine, adapters[:2]), None]
    requests = [request_with(str(i), revisions[i % 3], max_tokens=4) for i in range(6)]
    together = outputs(engine.core, requests)
    for request in requests:
        assert outputs(engine.core, [request])[request.request_id] == together[request.request_id]


@pytest.mark.usefixtures("both_ways")
def test_more_adapters_than_slots_with_blocks_that_come_and_go(folder, adapters):
    roomy = make_engine(folder, **LORA, max_loras=NUM_ADAPTERS)
    revisions = [*load_all(roomy, adapters), None]
    requests = [request_with(str(i), revisions[i % len(revisions)], length=20 + i, max_tokens=12) for i in range(18)]
    expected = outputs(roomy.core, requests)
    tight = make_engine(folder, **LORA, max_loras=2, num_kv_blocks=30)
    load_all(tight, adapters)
    assert outputs(tight.core, requests) == expected
    assert tight.core.load().num_preemptions_total > 0


def test_a_stream_continues_from_its_tokens_elsewhere(folder, adapters):
    first, second = make_engine(folder, **LORA), make_engine(folder, **LORA, max_num_seqs=2)
    revisions = load_all(first, adapters[:3])
    for i, adapter in reversed(list(enumerate(adapters[:3]))):
        second.load_adapter(f"a{i}", adapter)
    requests = [request_with(str(i), revision, top_p=0.9, seed=i) for i, revision in enumerate(revisions)]
    expected = outputs(first.core, requests)
    for cut in (1, 15):
        resumed = [
            msgspec.structs.replace(r, output_token_ids=[t for t, _ in expected[r.request_id][:cut]]) for r in requests
        ]
        continued = outputs(second.core, resumed)
        assert continued == {name: output[cut:] for name, output in expected.items()}


def test_prefixes_are_shared_within_a_revision_alone(folder, adapters):
    engine = make_engine(folder, **LORA)
    first, second = load_all(engine, adapters[:2])
    prompt = prompt_of(0, 40)

    def num_cached(name, adapter):
        request = with_adapter(make_request(name, prompt, max_tokens=1), adapter)
        return next(iter(stream_requests(engine.core, [request]))).num_cached_tokens

    assert [num_cached("0", first), num_cached("1", second), num_cached("2", None)] == [0, 0, 0]
    assert [num_cached("3", first), num_cached("4", second), num_cached("5", None)] == [36, 36, 36]


def test_embeddings_and_log_probabilities_of_prompts_are_the_adapters(folder, adapters):
    engine = make_engine(folder, **LORA, enable_prefix_caching=False)
    (revision,) = load_all(engine, adapters[:1])
    prompt = prompt_of(0, 30)

    def read(name, adapter, **fields):
        request = make_request(name, prompt, max_tokens=0, **fields.pop("sampling", {}))
        (delta,) = stream_requests(engine.core, [msgspec.structs.replace(request, adapter=adapter, **fields)])
        return delta

    assert read("0", revision, embed=True).embedding != read("1", None, embed=True).embedding
    found = read("2", revision, sampling={"prompt_logprobs": 0}).prompt_logprobs
    logits = all_logits(engine.core, prompt, adapter=revision).log_softmax(-1)
    expected = [logits[i, token].item() for i, token in enumerate(prompt[1:])]
    assert [entry.logprob for entry in found[1:]] == pytest.approx(expected, abs=1e-5)


def test_an_unknown_revision_is_refused_alone(folder, adapters):
    engine = make_engine(folder, **LORA)
    (revision,) = load_all(engine, adapters[:1])
    with pytest.raises(AdapterNotLoadedError, match="'a0@000000000000' is not loaded on this replica"):
        engine.generate([request_with("r", "a0@000000000000")])
    with pytest.raises(AdapterNotLoadedError):
        make_engine(folder).generate([request_with("r", revision)])
    assert engine.generate([request_with("r", revision)])


def test_an_adapter_that_is_unloaded_stays_until_its_requests_have_ended(folder, adapters):
    engine = make_engine(folder, **LORA)
    (revision,) = load_all(engine, adapters[:1])
    core, here = engine.core, engine.core.runner.adapters
    request = request_with("r", revision)
    expected = outputs(core, [request])
    core.add_request(request)
    core.step()
    here.unload(revision, at_once=False)
    core.unload_adapter(revision)
    assert here.revisions() == ()
    assert here.put(3, adapter_key(revision)), "it is still on the host"
    with pytest.raises(AdapterNotLoadedError):
        core.add_request(request_with("another", revision))
    tokens = [token for delta in iter_steps(core) for token in delta.token_ids]
    assert tokens == [t for t, _ in expected["r"][1:]]
    core.heartbeat()
    assert not here.put(3, adapter_key(revision)), "it has gone"
    engine.load_adapter("a0", adapters[0])
    assert outputs(core, [request]) == expected, "and comes back"


def iter_steps(core):
    while core.has_work():
        yield from core.step()


def test_a_rank_without_the_adapter_ends_its_requests_alone(folder, adapters):
    """Which the owner of the ranks prevents: it loads on all of them before requests may name the revision."""

    def program(tp):
        config = make_config(folder, tensor_parallel_size=2, **LORA)
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        runner.adapters.load("on both", adapters[0])
        if tp.rank:
            return run_follower(runner, tp)
        runner.adapters.load("on one", adapters[1])
        core = EngineCore(config, runner, tp)
        requests = [request_with("0", "on both"), request_with("1", "on one"), request_with("2", None)]
        for request in requests:
            core.add_request(request)
        ends = {d.request_id: d for d in iter_steps(core) if d.finish_reason is not None}
        again = run_requests(core, [request_with("3", "on both")])
        core.shutdown()
        return ends, again

    (ends, again), _ = run_ranks(2, program)
    assert {name: end.finish_reason for name, end in ends.items()} == {
        "0": FinishReason.LENGTH,
        "1": FinishReason.ERROR,
        "2": FinishReason.LENGTH,
    }
    assert "does not have the adapter on one" in ends["1"].error and ends["1"].elsewhere and not ends["1"].refused
    assert len(again[0]) == 16


def test_what_waits_behind_an_adapter_that_a_rank_lacks_runs(folder, adapters):
    """Only that request could run, and it ends. The next one runs then."""

    def program(tp):
        config = make_config(folder, tensor_parallel_size=2, **LORA, max_num_seqs=1)
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        if tp.rank:
            return run_follower(runner, tp)
        runner.adapters.load("on one", adapters[1])
        core = EngineCore(config, runner, tp)
        core.add_request(request_with("0", "on one"))
        core.add_request(request_with("1", None, max_tokens=2))
        ends = {d.request_id: d.finish_reason for d in iter_steps(core) if d.finish_reason is not None}
        core.shutdown()
        return ends

    ends, _ = run_ranks(2, program)
    assert ends == {"0": FinishReason.ERROR, "1": FinishReason.LENGTH}


def test_graphs_go_on_while_adapters_come_and_go(folder, adapters):
    native_library("avx2")
    engine = make_engine(folder, **LORA, max_loras=1)
    revisions = load_all(engine, adapters[:2])
    request = make_request("r", prompt_of(0, 5), max_tokens=30, logprobs=1)
    first = [outputs(engine.core, [with_adapter(request, adapter)]) for adapter in (*revisions, None)]
    assert engine.core.runner.graphs.captured_sizes == (1,)
    again = [outputs(engine.core, [with_adapter(request, adapter)]) for adapter in (*revisions, None)]
    assert again == first
    without = make_engine(folder, **LORA, cuda_graphs=False)
    load_all(without, adapters[:2])
    assert [outputs(without.core, [with_adapter(request, adapter)]) for adapter in (*revisions, None)] == first
