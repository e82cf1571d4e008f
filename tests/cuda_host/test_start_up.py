"""From the command and from an engine to the last token, on --device cuda."""

import subprocess
import sys

import pytest
from cuda_host.engines import make_config, make_core, make_request
from cuda_host.gpus import A10G
from cuda_host.processes import environment
from support.paths import DEMO_MODEL

from workers.checkpoint.model_config import load_model_config
from workers.engine.llm_engine import LLMEngine, stream_requests

pytestmark = pytest.mark.cuda_host


def test_generate_runs_to_the_end():
    command = [sys.executable, "-m", "cluster.cli.main", "generate", "--device", "cuda", "--max-tokens", "6"]
    done = subprocess.run(command, env=environment(A10G), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "falls back" not in done.stderr + done.stdout
    assert done.stdout.startswith("def fibonacci(n):")


def test_an_engine_with_the_demo_model_runs_every_kind_of_request(device, caplog):
    model = load_model_config(DEMO_MODEL)
    engine = LLMEngine(make_config(model_path=str(DEMO_MODEL), model=model, max_model_len=1024, max_num_seqs=8))
    assert engine.core.runner.attention_backend == "triton"
    kinds = {
        "greedy": {},
        "drawn": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
        "logprobs": {"logprobs": 5},
        "prompt logprobs": {"prompt_logprobs": 1},
        "bias": {"logit_bias": {5: 1.0}, "min_tokens": 3},
        "bad words": {"bad_words": [[7, 8], [9]]},
    }
    requests = [make_request(name, 20 + 50 * i, max_tokens=8, **kind) for i, (name, kind) in enumerate(kinds.items())]
    ended = {delta.request_id: delta.finish_reason for delta in engine.stream(*requests) if delta.finish_reason}
    assert set(ended) == set(kinds)
    assert engine.core.kv_cache.pool.num_used == 0
    assert device.unknown_calls == [], "the fake device lacks something that runs on a real one"
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(("backend", "block_size"), [("triton", 16), ("flash", 256), ("sdpa", 16)])
def test_every_attention_backend_prefills_and_decodes(backend, block_size):
    core = make_core(
        make_config(
            attention_backend=backend,
            block_size=block_size,
            num_kv_blocks=8192 // block_size,
            max_model_len=4096,
            max_num_seqs=4,
        )
    )
    requests = [make_request(str(i), 100 * i, max_tokens=8) for i in range(1, 5)]
    assert sum(len(delta.token_ids) for delta in stream_requests(core, requests)) == 32
    # The specification plans on the host.
    assert core.runner.graphs.captured_sizes == (() if backend == "sdpa" else (4,))
