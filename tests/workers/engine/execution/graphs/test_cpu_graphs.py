"""Decode steps as one call of the compiled kernels: the same bits as step by step, in every form of weights and of the KV cache."""

import logging

import pytest
import torch
from support.checkpoints.quantized.checkpoints import write_quantized
from support.checkpoints.tiny import TINY, write_tiny_checkpoint
from support.fakes.engines import make_config, make_request
from support.ranks.rank_threads import run_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, Ministral3Config

from workers.config import EngineConfig
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower
from workers.engine.llm_engine import LLMEngine, stream_requests
from workers.native.exchange import native_exchange
from workers.native.library import NativeLibrary, load_library
from workers.parallel.timed import TimedGroup
from workers.profile.steps import profile_core

pytestmark = pytest.mark.skipif(
    not isinstance(load_library(), NativeLibrary), reason="there are no compiled kernels for this CPU"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("tiny"), sliding_window=24, hidden_size=64, intermediate_size=96
    )


def config(folder, **settings) -> EngineConfig:
    return make_config(folder, max_num_seqs=6, attention_backend="native", **settings)


def outputs(core: EngineCore):
    """Requests that end at different steps, so that the number of sequences goes down."""
    requests = [make_request(str(n), list(range(5, 5 + n)), max_tokens=12 + 9 * n, logprobs=2) for n in (1, 2, 3, 5)]
    found: dict[str, list[object]] = {}
    for delta in stream_requests(core, requests):
        found.setdefault(delta.request_id, []).append((delta.token_ids, delta.logprobs))
    return found


FORMS = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "quantization": "int8"},
    {"dtype": "float32", "quantization": "int4"},
    {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_graphs_change_no_bit(folder, form):
    core = LLMEngine(config(folder, **form)).core
    expected = outputs(LLMEngine(config(folder, cuda_graphs=False, **form)).core)
    assert outputs(core) == expected, "while they are recorded"
    assert len(core.runner.graphs.captured_sizes) >= 3
    assert outputs(core) == expected, "with them from the start"


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("kind", "dense"),
    [("gptq, act-order, asymmetric", ("lm_head",)), ("int-quantized", ("lm_head", "k_proj")), ("fp8, static", ())],
)
def test_graphs_keep_the_bits_of_stored_weights(tmp_path, kind, dense):
    """Inputs in another order, and a layer whose shards differ in form."""
    folder, _ = write_quantized(tmp_path, kind, dense=dense)
    core = LLMEngine(config(folder, dtype="bfloat16")).core
    expected = outputs(LLMEngine(config(folder, dtype="bfloat16", cuda_graphs=False)).core)
    assert outputs(core) == outputs(core) == expected
    assert len(core.runner.graphs.captured_sizes) >= 3


@pytest.mark.usefixtures("both_ways")
def test_graphs_read_the_blocks_of_each_group_of_layers(tmp_path):
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    folder = write_tiny_checkpoint(tmp_path, sliding_window=8, num_hidden_layers=3, layer_types=layer_types)
    core = LLMEngine(config(folder)).core
    expected = outputs(LLMEngine(config(folder, cuda_graphs=False)).core)
    assert outputs(core) == outputs(core) == expected
    assert len(core.runner.graphs.captured_sizes) >= 3


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.1,
}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(LlamaConfig, {"attention_bias": True, "mlp_bias": True}), (Ministral3Config, {"rope_parameters": YARN})],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_add_biases_and_scale_queries(tmp_path, kind, fields, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(kind(**{**TINY, **fields}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    core = LLMEngine(config(tmp_path, dtype=dtype)).core
    expected = outputs(LLMEngine(config(tmp_path, dtype=dtype, cuda_graphs=False)).core)
    assert outputs(core) == outputs(core) == expected
    assert len(core.runner.graphs.captured_sizes) >= 3


@pytest.mark.group
@pytest.mark.parametrize("exchange", [None, native_exchange()], ids=["python", "compiled"])
def test_two_ranks_exchange_in_their_graphs(tmp_path, exchange):
    """Also with a vocabulary that they do not divide evenly: the rows of logits end with padding."""
    folder = write_tiny_checkpoint(tmp_path, sliding_window=24, hidden_size=64, intermediate_size=96, vocab_size=255)

    def program(tp):
        tp = TimedGroup(tp)
        made = config(folder, tensor_parallel_size=2, dtype="bfloat16")
        runner = build_runner(made, tp)
        runner.allocate_kv_cache()
        if tp.rank:
            run_follower(runner, tp)
            return runner.graphs.captured_sizes, tp.num_all_reduces_total
        core = EngineCore(made, runner, tp)
        found = [outputs(core), outputs(core)]
        core.shutdown()
        return found, tp.num_all_reduces_total

    (found, num_led), (captured, num_followed) = run_ranks(2, program, exchange=exchange)
    assert len(captured) >= 3
    assert num_led == num_followed > 0
    (expected,) = run_ranks(1, lambda tp: outputs(LLMEngine(config(folder, cuda_graphs=False)).core))
    assert found[0] == found[1]
    assert found[0].keys() == expected.keys()


def test_a_step_that_torch_computes_in_stays_without_a_graph(folder, caplog):
    core = LLMEngine(config(folder)).core
    norm = core.runner.model.model.norm
    forward = norm.forward
    norm.forward = lambda x, residual: tuple(part.sin() for part in forward(x, residual))
    with caplog.at_level(logging.WARNING, "workers.engine.execution.graphs.cuda_graphs"):
        outputs(core)
    assert core.runner.graphs.captured_sizes == ()
    (record,) = [r for r in caplog.records if r.name == "workers.engine.execution.graphs.cuda_graphs"]
    assert "aten.sin" in record.getMessage()


def test_a_profile_sees_every_kernel(folder):
    core = LLMEngine(config(folder)).core
    outputs(core)
    assert core.runner.graphs.captured_sizes
    profiled = profile_core(core, num_steps=20)
    outputs(profiled)
    names = [event.name for event in profiled.finish().decoded()]
    assert names.count("attention") >= 20


def test_they_can_be_turned_off(folder):
    runner = build_runner(config(folder, cuda_graphs=False), LLMEngine(config(folder)).core.tp)
    assert runner.size_to_capture(is_idle=True) is None
    assert runner.graphs.next_size(1) is None
