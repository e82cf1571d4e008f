"""The KV cache that a 7B model gets on each GPU with all defaults, and that the rest fits beside it: the longest steps and every graph."""

import json

import pytest
from cuda_host.gpus import GPUS
from cuda_host.processes import finish, start_program

pytestmark = pytest.mark.cuda_host

# A change of these numbers is a change of what users can run. (blocks of 16 tokens, sequences, tokens a step)
EXPECTED = {
    "A10G": (2734, 256, 2048),
    "A100-40GB": (10592, 256, 4096),
    "A100-80GB": (28906, 256, 4096),
    "H200": (56584, 256, 8192),
}
# Of the context and the CUDA libraries, which cudaMemGetInfo counts and no allocation shows.
CONTEXT_BYTES = 450 << 20


@pytest.fixture(scope="module")
def sized():
    processes = {name: start_program("kv_cache_size", gpu) for name, gpu in GPUS.items()}
    try:
        return {name: finish(process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.parametrize("name", GPUS)
def test_a_7b_model_on_each_gpu(sized, name):
    found, total = sized[name], GPUS[name].memory_bytes
    used = found["peak_used_bytes"] + CONTEXT_BYTES
    print(f"\n{name}: {json.dumps(found)}, at most {used / total:.1%} of the memory used")
    blocks, seqs, tokens = EXPECTED[name]
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (seqs, tokens)
    assert found["num_blocks"] == pytest.approx(blocks, rel=0.01)
    assert found["captured_sizes"][-1] == seqs
    # --gpu-memory-utilization is 0.9. What the sampler allocates comes later, and from the rest.
    assert 0.88 <= used / total <= 0.92
