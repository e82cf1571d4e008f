"""The KV cache that a 7B model gets on each GPU with all defaults, and that the rest fits beside it: the longest steps and every graph."""

import json

import pytest
from cuda_host.conftest import free_memory
from cuda_host.engines import make_config, make_runner
from cuda_host.gpus import A10G, GPUS
from cuda_host.processes import finish, start_program

from workers.attention import triton_paged

pytestmark = pytest.mark.cuda_host

# A change of these numbers is a change of what users can run. (blocks of 16 tokens, sequences, tokens a step)
EXPECTED = {
    "A10G": (2734, 256, 2048),
    "A100-40GB": (10592, 256, 4096),
    "A100-80GB": (28906, 256, 4096),
    "H200": (56584, 256, 8192),
}
# The same of a 7B model with quantised weights, on an A10G.
QUANTIZED = {"int8": (5870, 256, 2048), "int4": (7560, 256, 2048), "fp8": (6087, 256, 2048)}
# Of the context and the CUDA libraries, which cudaMemGetInfo counts and no allocation shows.
CONTEXT_BYTES = 450 << 20


@pytest.fixture(scope="module")
def sized():
    processes = {name: start_program("kv_cache_size", gpu) for name, gpu in GPUS.items()}
    processes |= {form: start_program("kv_cache_size", A10G, form) for form in QUANTIZED}
    try:
        return {name: finish(process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.parametrize("name", [*GPUS, *QUANTIZED])
def test_a_7b_model_on_each_gpu(sized, name):
    found, total = sized[name], GPUS.get(name, A10G).memory_bytes
    used = found["peak_used_bytes"] + CONTEXT_BYTES
    print(f"\n{name}: {json.dumps(found)}, at most {used / total:.1%} of the memory used")
    blocks, seqs, tokens = (EXPECTED | QUANTIZED)[name]
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (seqs, tokens)
    assert found["num_blocks"] == pytest.approx(blocks, rel=0.01)
    assert found["captured_sizes"][-1] == seqs
    # --gpu-memory-utilization is 0.9. What the sampler allocates comes later, and from the rest.
    assert 0.88 <= used / total <= 0.92


def test_the_sums_of_segments_of_long_contexts_have_room(device, monkeypatch):
    """With steps of few tokens, they are what a step needs the most memory for."""

    def num_blocks():
        free_memory()
        return make_runner(make_config(max_num_seqs=64, max_num_batched_tokens=512, cuda_graphs=False)).num_blocks

    with_splits, most = num_blocks(), triton_paged.MAX_PARTIAL_BYTES
    monkeypatch.setattr(triton_paged, "choose_num_splits", lambda *args, **sizes: 1)
    block_bytes = make_config().kv_block_bytes
    assert 0.5 * most < (num_blocks() - with_splits) * block_bytes <= most
