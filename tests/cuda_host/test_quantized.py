"""Quantised weights on the fake device: memory while loading and after it, launches of a step, CUDA graphs, tensor-parallel shares."""

from dataclasses import replace

import pytest
import torch
from cuda_host.engines import make_config, make_core, make_request
from cuda_host.fake_device import FakeDevice

from workers.device.model_bytes import weight_bytes
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.llm_engine import stream_requests
from workers.gpu_check.models import MISTRAL_7B, fill_randomly
from workers.parallel.group import SingleRank
from workers.quant.pack_cuda import MAX_FUSED_ROWS

pytestmark = pytest.mark.cuda_host

TWO_LAYERS = replace(MISTRAL_7B, num_hidden_layers=2)
SETTINGS = {"model": TWO_LAYERS, "num_kv_blocks": 4096, "max_model_len": 4096, "max_num_seqs": 256}


def new_core(quantization: str, **settings) -> EngineCore:
    return make_core(make_config(quantization=quantization, **(SETTINGS | settings)))


def decode_together(core: EngineCore, num_seqs: int) -> None:
    """Returns when all of them are in a decode step."""
    for i in range(num_seqs):
        core.add_request(make_request(str(i), 8, max_tokens=400))
    while any(request.num_output_tokens < 3 for request in core.scheduler.running) or core.scheduler.waiting:
        core.step()


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_loading_takes_less_memory_than_dense_weights(device: FakeDevice, quantization):
    """The weights as the plan counts them, and on the way there one shard of a layer as it was."""
    config = make_config(quantization=quantization, **SETTINGS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = build_runner(config, SingleRank("cuda"), load=fill_randomly).model
    taken, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    other = sum(buffer.nbytes for buffer in model.buffers())  # cosines and sines
    assert taken - other == pytest.approx(weight_bytes(config), rel=0.02)
    dense = weight_bytes(replace(config, quantization=None))
    largest_shard = 2 * TWO_LAYERS.vocab_size * TWO_LAYERS.hidden_size
    assert peak < taken + 5 * largest_shard and taken < 0.7 * dense


@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_every_kind_of_step_runs_and_decodes_are_graphs(device: FakeDevice, quantization):
    core = new_core(quantization, max_num_seqs=8)
    while core.runner.size_to_capture(is_idle=True) is not None:
        core.heartbeat()
    assert core.runner.graphs.captured_sizes == (1, 2, 4, 8)
    requests = [make_request(str(i), 300 * i, max_tokens=6) for i in range(1, 5)]
    assert sum(len(delta.token_ids) for delta in stream_requests(core, requests)) == 24
    assert device.unknown_calls == []


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_number_of_rows_chooses_the_product(device: FakeDevice, quantization):
    core = new_core(quantization, cuda_graphs=False, max_num_batched_tokens=1024)
    decode_together(core, 8)
    with device.recorded() as record:
        core.step()
    fused = [launch for launch in record.details("launch") if launch.startswith("grouped_kernel ")]
    assert len(fused) == 4 * 2 + 1 and not record.details("product"), "four in each layer, and the head"
    core.add_request(make_request("long", MAX_FUSED_ROWS + 1, max_tokens=2))
    with device.recorded() as record:
        core.step()
    written = [launch for launch in record.details("launch") if launch.startswith("dequantize_kernel ")]
    # Slices of 32 MiB: 2 of qkv, 1 of o, 7 of gate and up, 4 of down.
    assert len(written) == len(record.details("product")) == 2 * (2 + 1 + 7 + 4)


def test_with_deterministic_every_number_of_rows_has_one_product(device: FakeDevice):
    core = new_core("int4", cuda_graphs=False, deterministic=True)
    core.add_request(make_request("long", 1000, max_tokens=2))
    with device.recorded() as record:
        core.step()
    fused = [launch for launch in record.details("launch") if launch.startswith("grouped_kernel ")]
    assert len(fused) == 4 * 2 + 1 and not record.details("product")
